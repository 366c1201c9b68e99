"""Saves and restores a run: the student as a Hugging Face folder, the state of the engine, and the position in the data.

A save copies what this rank writes to host memory, which the training loop waits for. A thread writes it: every rank its
files, and the main process, when all are done, the manifest and the name of the folder.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from limbeck.config import DistillConfig
from limbeck.data.templates.named import LONG_COT
from limbeck.data.templates.resolve import resolve_template
from limbeck.errors import LimbeckError
from limbeck.models import has_lora, iter_merged
from limbeck.models.dtypes import DTYPES
from limbeck.objectives import TaidSchedule
from limbeck.strategies.base import MODEL, EngineState
from limbeck.strategies.shards import Shard, shard_of, whole_box
from limbeck.strategies.world import World
from limbeck.teachers.student_weights import AveragedTeacher
from limbeck.train import checkpoint as checkpoints
from limbeck.train.background import BackgroundWork
from limbeck.train.build.student import Student
from limbeck.train.resume import refuse_model, refuse_other_adapters, refuse_other_model
from limbeck.train.shard_owners import Owned, assign_shards, owned_shards
from limbeck.train.student_export import ExportShare, StudentExport
from limbeck.train.tensor_files import write_shards


@dataclass(frozen=True)
class _Save:
    """One save: what this rank writes, in host memory.

    adapter: with LoRA, the trained parameters that peft writes, on the main process.
    """

    step: int
    masters: dict[str, list[Shard]]
    optimizer: dict[str, list[Shard]]
    export: ExportShare
    adapter: dict[str, Tensor]
    state: dict[str, Any]
    metric: float | None


_AVERAGE = "averaged_teacher/"
"""Prefix of the teacher's averages among the tensors of the state."""


class Saver:
    """Writes the checkpoints of a run, and restores the run from a checkpoint.

    Args:
        config: of the run.
        world: the processes of the student.
        student: the student in its engine.
        tokenizer: saved with the student.
        taid: the schedule of the objective TAID, or None.
        average: the teacher that is an average of the student's weights, or None.

    Attributes:
        longest: seconds of the longest save so far, with the writing.
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
        self._folder, self._settings = config.checkpoint_dir, config.checkpoint_config
        model = student.model.get_base_model() if has_lora(student.model) else student.model
        self._export = StudentExport(model, DTYPES[config.student.model_args.dtype], student.num_parameters)
        self._background = BackgroundWork(world)
        self._owned: Owned | None = None
        self.longest = 0.0

    def save(self, step: int, data_state: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write ``checkpoint-<step>``, update the links, and remove old checkpoints. Collective.

        Returns when the state is copied, or with ``async_save: false`` when the checkpoint is complete.

        Args:
            step: number of optimizer steps taken.
            data_state: position in the data.
            metrics: measured at this step, of which one selects the best checkpoints.

        Raises:
            LimbeckError: if this checkpoint, or the previous one behind the loop, could not be written.
        """
        self.wait()
        started, settings = time.monotonic(), self._settings
        state = self._student.engine.state_dict()
        if self._average is not None:
            averages = {_AVERAGE + name: [shard_of(tensor)] for name, tensor in self._average.averages.items()}
            state = replace(state, model={**state.model, **averages})
        if self._owned is None:
            self._owned = assign_shards(state, self._world)
        masters, optimizer = (_on_host(shards) for shards in owned_shards(state, self._owned))
        optimizer |= {name: masters.pop(name) for name in list(masters) if name.startswith(_AVERAGE)}
        adapter: dict[str, Tensor] = {}
        save = _Save(
            step,
            {name.removeprefix(MODEL): parts for name, parts in masters.items()},
            optimizer,
            self._export.collect(self._weights(adapter), self._world, _whole(masters)),
            adapter,
            {
                "data": dict(data_state),
                "scaler": dict(state.scaler),
                "taid": self._taid.state() if self._taid else None,
                "config": shareable(self._config),
            },
            metrics.get(settings.best_metric) if settings.best_metric else None,
        )
        self._background.start(lambda: self._write(save, started))
        if not settings.async_save:
            self.wait()

    def wait(self) -> None:
        """Return when the last checkpoint is complete. Collective.

        Raises:
            LimbeckError: if it could not be written.
        """
        self._background.wait()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for the last checkpoint, also when the run fails; then the run's error is the one that is raised."""
        try:
            self.wait()
        except LimbeckError as of_save:
            if error is None:
                raise
            if self._world.is_main:
                print(f"limbeck: {of_save}", file=sys.stderr)

    def restore(self, path: Path) -> tuple[int, Mapping[str, Any]]:
        """Load the state of the engine from the checkpoint ``path``. Collective.

        Returns:
            The step of the checkpoint and the position in the data.

        Raises:
            LimbeckError: if the checkpoint is damaged, or belongs to another student or objective.
        """
        checkpoint, engine = checkpoints.load_checkpoint(path, self._world), self._student.engine
        refuse_other_model(path, self._student.model.config)
        refuse_other_adapters(path, self._config.student.model_args, warns=self._world.is_main)
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
            self._average.load(
                (name.removeprefix(_AVERAGE), tensor[whole_box(tensor.shape)]) for name, tensor in averages.items()
            )
        if self._taid:
            if not checkpoint.state.get("taid"):
                raise LimbeckError(
                    f"{path} has another kd_objective than taid; set the kd_objective of the checkpoint, or another output_dir."
                )
            self._taid.load_state(checkpoint.state["taid"])
        return checkpoint.step, checkpoint.state["data"]

    def _weights(self, adapter: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The weights of the plain model. On the way, those that peft writes are copied to ``adapter``. Collective."""
        engine, model = self._student.engine, self._student.model
        if not has_lora(model):
            return engine.iter_weights()
        trained = engine.trained_names() if self._world.is_main else set()

        def copied() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in engine.iter_weights():
                if MODEL + name in trained:
                    adapter[name] = tensor.detach().to("cpu", copy=True)
                yield name, tensor

        return iter_merged(model, copied())

    def _write(self, save: _Save, started: float) -> None:
        """The job behind the loop, on every rank."""
        together = self._background.together
        temporary = checkpoints.temporary_folder(self._folder, save.step)
        try:
            together(lambda: self._start(save))
            files = together(lambda: self._write_files(temporary, save))
            together(lambda: self._finish(temporary, save, files))
        except LimbeckError as error:
            if self._world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            complete = checkpoints.list_checkpoints(self._folder)
            after = (
                f"{complete[-1]} is complete, and the run can resume from it" if complete else "there is none before it"
            )
            raise LimbeckError(
                f"checkpoint-{save.step} could not be written to {self._folder} ({str(error).rstrip('.')}); {after}."
            ) from error
        self.longest = max(self.longest, time.monotonic() - started)

    def _start(self, save: _Save) -> None:
        """What the main process does before any rank writes."""
        if not self._world.is_main:
            return
        temporary = checkpoints.start_checkpoint(self._folder, save.step)
        self._export.write_configuration(temporary)
        if has_lora(self._student.model):
            self._student.model.save_pretrained(temporary / "adapter", state_dict=save.adapter)
        self._tokenizer_to_save().save_pretrained(temporary)
        (temporary / checkpoints.TRAINING / "state.json").write_text(json.dumps(save.state, indent=1))

    def _write_files(self, temporary: Path, save: _Save) -> dict[str, Any]:
        """This rank's files."""
        rank, size = self._world.rank, self._world.size
        if not temporary.is_dir():
            raise LimbeckError(f"{temporary} does not exist here; set output_dir to a folder that all machines share")
        suffix = f"-{rank + 1:05d}-of-{size:05d}" if size > 1 else ""
        training = {}
        for kind, shards in (("masters", save.masters), ("optimizer", save.optimizer)):
            if shards or rank == 0:
                name = f"{checkpoints.TRAINING}/{kind}{suffix}.safetensors"
                training[name] = write_shards(temporary / name, shards)
        return {"training": training, "student": self._export.write_weights(temporary, save.export)}

    def _finish(self, temporary: Path, save: _Save, of_ranks: Sequence[Mapping[str, Any]]) -> None:
        """What the main process does when the files of all ranks are on the disk."""
        if not self._world.is_main:
            return
        settings = self._settings
        student = dict(sorted(item for files in of_ranks for item in files["student"].items()))
        self._export.write_index(temporary, student)
        written = {name: file for files in of_ranks for name, file in files["training"].items()}
        written |= {name: file["fingerprint"] for name, file in student.items()}
        path = checkpoints.finish_checkpoint(temporary, save.step, written, save.metric, settings.best_metric)
        checkpoints.point(self._folder / "student", path)
        best = checkpoints.best_checkpoints(self._folder, settings.best_mode, settings.best_metric)
        if best:
            checkpoints.point(self._folder / "best", best[0])
        checkpoints.prune(self._folder, self._config.max_ckpt_to_keep, best[: settings.keep_best])

    def _tokenizer_to_save(self) -> Any:
        """The tokenizer with the chat template that the student was trained with."""
        name = self._config.student.data_args.template
        if name in (None, "native", *LONG_COT):  # the tokenizer's own, or with text that the student writes itself
            return self._tokenizer
        tokenizer = copy.deepcopy(self._tokenizer)
        tokenizer.chat_template = resolve_template(name, tokenizer).jinja
        return tokenizer


def _on_host(shards: Mapping[str, Iterable[Shard]]) -> dict[str, list[Shard]]:
    """Copies of the parts in host memory, made one at a time."""

    def copied(part: Shard) -> Shard:
        values = part.read().to("cpu", copy=True)
        return Shard(part.shape, part.box, lambda: values)

    return {name: [copied(part) for part in parts] for name, parts in shards.items()}


def _whole(masters: Mapping[str, Sequence[Shard]]) -> dict[str, Tensor]:
    """Those of the student's own parameters that are whole on this rank."""
    return {
        name.removeprefix(MODEL): parts[0].read()
        for name, parts in masters.items()
        if name.startswith(MODEL) and parts[0].box == whole_box(parts[0].shape)
    }


def find_checkpoint(config: DistillConfig) -> Path | None:
    """The checkpoint from which a run resumes; None for a new run.

    Raises:
        LimbeckError: if the output folder contains checkpoints of another run.
    """
    resume = checkpoints.find_resume(config.resume_from_checkpoint, config.checkpoint_dir)
    checkpoints.refuse_earlier_checkpoints(config.resume_from_checkpoint, config.checkpoint_dir)
    if resume is not None:
        refuse_model(resume)
        checkpoints.refuse_later_checkpoints(resume, config.checkpoint_dir)
    return resume


def shareable(config: DistillConfig) -> dict[str, Any]:
    """The configuration without the values of environment variables and trackers, which may be secrets."""
    values = config.model_dump(mode="json")
    for section in (values["system_envs"], values["student"]["system_envs"], values["teacher"]["system_envs"]):
        section.update(dict.fromkeys(section, "(not shown)"))
    values["tracker_kwargs"] = dict.fromkeys(values["tracker_kwargs"], "(not shown)")
    return values
