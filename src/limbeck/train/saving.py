"""Saves and restores a run: the student as a Hugging Face folder, the state of the engine, and the position in the data."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from limbeck.config import DistillConfig
from limbeck.data.templates.named import LONG_COT
from limbeck.data.templates.resolve import resolve_template
from limbeck.errors import LimbeckError
from limbeck.models import has_lora, merged_state_dict
from limbeck.models.dtypes import DTYPES
from limbeck.objectives import TaidSchedule
from limbeck.strategies.base import MODEL, EngineState
from limbeck.strategies.state import gather_tensors
from limbeck.strategies.world import World
from limbeck.teachers.student_weights import AveragedTeacher
from limbeck.train import checkpoint as checkpoints
from limbeck.train.build.student import Student

_AVERAGE = "averaged_teacher|"
"""Prefix of the teacher's averages among the optimizer's tensors."""


class Saver:
    """Writes the checkpoints of a run, and restores the run from a checkpoint.

    Args:
        config: of the run.
        world: the processes of the student.
        student: the student in its engine.
        tokenizer: saved with the student.
        taid: the schedule of the objective TAID, or None.
        average: the teacher that is an average of the student's weights, or None.
    """

    def __init__(
        self,
        config: DistillConfig,
        world: World,
        student: Student,
        tokenizer: Any,
        taid: TaidSchedule | None,
        average: AveragedTeacher | None = None,
    ) -> None:
        self._config, self._world, self._student = config, world, student
        self._tokenizer, self._taid, self._average = tokenizer, taid, average
        self._folder = config.checkpoint_dir

    def save(self, step: int, data_state: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write ``checkpoint-<step>``, update the links, and remove old checkpoints. Collective.

        metrics: measured at this step, of which one selects the best checkpoints.
        """
        settings, engine, is_main = self._config.checkpoint_config, self._student.engine, self._world.is_main
        state = engine.state_dict()
        if self._average is not None:
            averages = gather_tensors(self._average.averages, keep=is_main)
            state.optimizer |= {_AVERAGE + name: tensor for name, tensor in averages.items()}
        weights = {name: tensor.cpu() for name, tensor in engine.iter_weights() if is_main}
        if is_main:
            checkpoint = checkpoints.Checkpoint(
                step,
                {name.removeprefix(MODEL): tensor for name, tensor in state.model.items()},
                state.optimizer,
                {
                    "data": dict(data_state),
                    "scaler": state.scaler,
                    "taid": self._taid.state() if self._taid else None,
                    "config": shareable(self._config),
                },
                metrics.get(settings.best_metric) if settings.best_metric else None,
                settings.best_metric,
            )
            path = checkpoints.save_checkpoint(self._folder, checkpoint, lambda to: self._write_student(to, weights))
            checkpoints.point(self._folder / "student", path)
            best = checkpoints.best_checkpoints(self._folder, settings.best_mode, settings.best_metric)
            if best:
                checkpoints.point(self._folder / "best", best[0])
            checkpoints.prune(self._folder, self._config.max_ckpt_to_keep, best[: settings.keep_best])
        self._world.barrier()

    def restore(self, path: Path) -> tuple[int, Mapping[str, Any]]:
        """Load the state of the engine from the checkpoint ``path``. Collective.

        Returns:
            The step of the checkpoint and the position in the data.

        Raises:
            LimbeckError: if the checkpoint is damaged, or belongs to another student or objective.
        """
        checkpoint, engine = checkpoints.load_checkpoint(path), self._student.engine
        names = {name.removeprefix(MODEL): name for name in engine.trained_names()}
        if names.keys() != checkpoint.masters.keys():
            odd = min(names.keys() ^ checkpoint.masters.keys())
            raise LimbeckError(
                f"{path} is of another student, or has other frozen parameters or other features ({odd} differs); resume with "
                "the configuration of the checkpoint, or set another output_dir."
            )
        model = {names[name]: tensor for name, tensor in checkpoint.masters.items()}
        averages = {name: tensor for name, tensor in checkpoint.optimizer.items() if name.startswith(_AVERAGE)}
        optimizer = {name: tensor for name, tensor in checkpoint.optimizer.items() if name not in averages}
        engine.load_state_dict(EngineState(model, optimizer, checkpoint.state["scaler"]))
        if self._average is not None:
            if not averages:
                raise LimbeckError(
                    f"{path} has no average of the student's weights; set the teacher of the checkpoint, or another output_dir."
                )
            self._average.load((name.removeprefix(_AVERAGE), tensor) for name, tensor in averages.items())
        if self._taid:
            if not checkpoint.state.get("taid"):
                raise LimbeckError(
                    f"{path} has another kd_objective than taid; set the kd_objective of the checkpoint, or another output_dir."
                )
            self._taid.load_state(checkpoint.state["taid"])
        return checkpoint.step, checkpoint.state["data"]

    def _write_student(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        model, plain = self._student.model, weights
        dtype = DTYPES[self._config.student.model_args.dtype]
        if has_lora(model):
            plain = merged_state_dict(model, weights)
            model.save_pretrained(folder / "adapter", state_dict=weights)
            model = model.get_base_model()
        tied = set(model.all_tied_weights_keys)
        model.save_pretrained(
            folder, state_dict={name: tensor.to(dtype) for name, tensor in plain.items() if name not in tied}
        )
        # save_pretrained writes the precision of the model to config.json, not that of the tensors.
        described = json.loads((folder / "config.json").read_text())
        described["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        self._tokenizer_to_save().save_pretrained(folder)

    def _tokenizer_to_save(self) -> Any:
        """The tokenizer with the chat template that the student was trained with."""
        name = self._config.student.data_args.template
        if name in (None, "native", *LONG_COT):  # the tokenizer's own, or with text that the student writes itself
            return self._tokenizer
        tokenizer = copy.deepcopy(self._tokenizer)
        tokenizer.chat_template = resolve_template(name, tokenizer).jinja
        return tokenizer


def find_checkpoint(config: DistillConfig) -> Path | None:
    """The checkpoint from which a run resumes; None for a new run.

    Raises:
        LimbeckError: if the output folder contains checkpoints of another run.
    """
    resume = checkpoints.find_resume(config.resume_from_checkpoint, config.checkpoint_dir)
    checkpoints.refuse_earlier_checkpoints(config.resume_from_checkpoint, config.checkpoint_dir)
    if resume is not None:
        checkpoints.refuse_later_checkpoints(resume, config.checkpoint_dir)
    return resume


def shareable(config: DistillConfig) -> dict[str, Any]:
    """The configuration without the values of environment variables and trackers, which may be secrets."""
    values = config.model_dump(mode="json")
    for section in (values["system_envs"], values["student"]["system_envs"], values["teacher"]["system_envs"]):
        section.update(dict.fromkeys(section, "(not shown)"))
    values["tracker_kwargs"] = dict.fromkeys(values["tracker_kwargs"], "(not shown)")
    return values
