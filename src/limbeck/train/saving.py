"""Saves and resumes a run: the engine's state, the position in the data, and the student as a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from limbeck.config import DistillConfig
from limbeck.errors import LimbeckError
from limbeck.models import has_lora, merged_state_dict
from limbeck.models.dtypes import DTYPES
from limbeck.objectives import TaidSchedule
from limbeck.strategies.base import MODEL, EngineState
from limbeck.strategies.world import World
from limbeck.train import checkpoint as checkpoints
from limbeck.train.build.student import Student


class Saver:
    """Writes checkpoints of one run and restores the run from one.

    Args:
        tokenizer: saved beside the student.
        taid: the schedule of the objective, if it has one.
    """

    def __init__(
        self, config: DistillConfig, world: World, student: Student, tokenizer: Any, taid: TaidSchedule | None
    ) -> None:
        self._config, self._world, self._student = config, world, student
        self._tokenizer, self._taid = tokenizer, taid
        self._folder = config.checkpoint_dir

    def save(self, step: int, data_state: Mapping[str, Any], val_metrics: Mapping[str, float]) -> None:
        """Write ``checkpoint-<step>``, point the links at it, and remove old ones. Collective."""
        settings, engine, is_main = self._config.checkpoint_config, self._student.engine, self._world.is_main
        state = engine.state_dict()
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
                val_metrics.get(settings.best_metric) if settings.best_metric else None,
            )
            path = checkpoints.save_checkpoint(self._folder, checkpoint, lambda to: self._write_student(to, weights))
            checkpoints.point(self._folder / "student", path)
            checkpoints.prune(self._folder, self._config.max_ckpt_to_keep, settings.best_mode)
            best = checkpoints.best_checkpoint(self._folder, settings.best_mode)
            if best is not None:
                checkpoints.point(self._folder / "best", best)
        self._world.barrier()

    def restore(self, path: Path) -> tuple[int, Mapping[str, Any]]:
        """Load the engine's state from the checkpoint ``path``; returns its step and the state of the data.

        Raises LimbeckError if it belongs to another student or objective.
        """
        checkpoint, engine = checkpoints.load_checkpoint(path), self._student.engine
        names = {name.removeprefix(MODEL): name for name in engine.trained_names()}
        if names.keys() != checkpoint.masters.keys():
            odd = min(names.keys() ^ checkpoint.masters.keys())
            raise LimbeckError(
                f"{path} was made with another student, other frozen parts or other features ({odd} differs)."
            )
        model = {names[name]: tensor for name, tensor in checkpoint.masters.items()}
        engine.load_state_dict(EngineState(model, dict(checkpoint.optimizer), checkpoint.state["scaler"]))
        if self._taid:
            if not checkpoint.state.get("taid"):
                raise LimbeckError(f"{path} was made with another objective than taid; set that one again.")
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
        # save_pretrained writes the model's own precision into the configuration, whatever the tensors have.
        described = json.loads((folder / "config.json").read_text())
        described["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        self._tokenizer.save_pretrained(folder)


def find_checkpoint(config: DistillConfig) -> Path | None:
    """The checkpoint from which a run resumes; None for a new run.

    Raises LimbeckError if the run would mix its checkpoints with those of another.
    """
    resume = checkpoints.find_resume(config.resume_from_checkpoint, config.checkpoint_dir)
    checkpoints.refuse_earlier_checkpoints(config.resume_from_checkpoint, config.checkpoint_dir)
    if resume is not None:
        checkpoints.refuse_later_checkpoints(resume, config.checkpoint_dir)
    return resume


def shareable(config: DistillConfig) -> dict[str, Any]:
    """The configuration as it may be shown and uploaded: values of environment variables and trackers can be secrets."""
    values = config.model_dump(mode="json")
    for section in (values["system_envs"], values["student"]["system_envs"], values["teacher"]["system_envs"]):
        section.update(dict.fromkeys(section, "(not shown)"))
    values["tracker_kwargs"] = dict.fromkeys(values["tracker_kwargs"], "(not shown)")
    return values
