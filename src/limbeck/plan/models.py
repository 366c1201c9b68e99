"""The models of a run on one rank, built by the run's own strategies on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)

from limbeck.config import DistillConfig
from limbeck.config.schema import ModelArgs, WorkerConfig
from limbeck.errors import UnknownMemory
from limbeck.models import ModelSource, compile_layers, decoder_layers, model_outline, output_head
from limbeck.models.dtypes import compute_dtype, student_load_dtype
from limbeck.models.varlen_attention import BY_DOCUMENT
from limbeck.objectives import OutputHead
from limbeck.plan.fake_distributed import FirstChunks, fake_distributed
from limbeck.strategies.base import LibraryFunctions, TeacherSpec, dims_of, strategy_of
from limbeck.strategies.world import World
from limbeck.teachers import LocalTeacher, RemoteTeacher, TeacherRequest, TeacherResponse
from limbeck.teachers.protocol import TeacherContext
from limbeck.teachers.remote import TeacherDescription, connect_channels
from limbeck.train.build.objective import make_objective
from limbeck.train.build.student import Student, distribute_student, resolve_parallelism
from limbeck.train.student import LossSettings

SIGNAL = "signal"
"""The tag of a teacher's signals and of what its forward pass allocates."""


@dataclass(frozen=True)
class SimulatedStudent:
    """A student in its engine, and its teacher as the student's process sees it.

    num_parameters: of the whole student, without adapters. vocab_size: tokens that both models have.
    """

    student: Student
    teacher: LocalTeacher | RemoteTeacher | None
    world: World
    num_parameters: int
    vocab_size: int

    @property
    def teacher_tensors(self) -> list[Tensor]:
        """What this rank holds of the teacher: its part of a model, or the head that a remote teacher sends once."""
        if isinstance(self.teacher, LocalTeacher):
            return self.teacher.model.held_tensors()
        head = None if self.teacher is None else self.teacher.info.head
        return [] if head is None else [head.weight]


@contextmanager
def simulated_student(
    config: DistillConfig, ranks: int, rank: int, *, with_teacher: bool = True, compiled: bool = False
) -> Iterator[SimulatedStudent]:
    """The student of ``config`` on rank ``rank`` of ``ranks``, built inside of ``fake_distributed``.

    with_teacher: False builds no teacher; its features are then not compared. compiled: whether the layers are.
    """
    args, colocated = config.student.model_args, not config.needs_worker_groups
    strategy = strategy_of(config.student, "student")
    libraries = [_library(config.student, "student")]
    if config.has_teacher and colocated:
        libraries.append(_library(config.teacher, "teacher"))
    with _values_are_unknown(), fake_distributed(ranks, rank, libraries) as world:
        world = resolve_parallelism(config, world, teacher_here=colocated, device_type="cuda")
        teacher: LocalTeacher | RemoteTeacher | None = None
        if config.has_teacher and with_teacher:
            teacher = build_teacher(config, world, compiled) if colocated else _remote_teacher(config, world)
        model = outline(config, args, student_load_dtype(args), "student")
        size, vocab = count_parameters(model), output_head(model).weight.shape[0]
        if teacher is not None:
            vocab = min(vocab, teacher.info.vocab_size)
        strategy.check_model(model, world.dims, ModelSource.from_args(args, "student").name, "student")
        objective, _ = make_objective(config, world.device)
        settings = LossSettings(objective, vocab, compiled=config.compile_loss is not False)
        with FirstChunks():
            student = distribute_student(config, world, model, teacher, settings, verify=False, compiled=compiled)
        yield SimulatedStudent(student, teacher, world, size, vocab)


@contextmanager
def simulated_teacher(
    config: DistillConfig, ranks: int, rank: int, *, compiled: bool = False
) -> Iterator[LocalTeacher]:
    """The teacher of ``config`` on rank ``rank`` of ``ranks``, built inside of ``fake_distributed``."""
    with _values_are_unknown(), fake_distributed(ranks, rank, [_library(config.teacher, "teacher")]) as world:
        yield build_teacher(config, world, compiled)


def _library(worker: WorkerConfig, role: str) -> AbstractContextManager[LibraryFunctions]:
    """The context of a role's strategy. Raises UnknownMemory for a strategy without one."""
    strategy = strategy_of(worker, role)
    if not hasattr(strategy, "simulate"):
        raise UnknownMemory(
            f"{role}.strategy_args.strategy_name = {worker.strategy_args.strategy_name} has no method simulate, without "
            "which its memory cannot be planned; plan with another strategy."
        )
    return strategy.simulate(worker, role)


def build_teacher(config: DistillConfig, world: World, compiled: bool) -> LocalTeacher:
    """The teacher on a rank of the fake ``world``."""
    worker = config.teacher
    model = outline(config, worker.model_args, compute_dtype(worker), "teacher")
    name = ModelSource.from_args(worker.model_args, "teacher").name
    strategy = strategy_of(worker, "teacher")
    strategy.check_model(model, dims_of(worker, world.size, "teacher"), name, "teacher")
    with FirstChunks():
        frozen = strategy.build_teacher(TeacherSpec(model, name, worker, verify=False), world)
        if compiled and frozen.can_compile:
            compile_layers(decoder_layers(frozen.body))
        return LocalTeacher(frozen)


def count_parameters(model: Any) -> int:
    """The number of parameters of a whole model."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _values_are_unknown() -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise UnknownMemory(
            f"one of the models decides by values what it computes ({error}), so its step cannot be planned without "
            "weights."
        ) from error


def outline(config: DistillConfig, args: ModelArgs, dtype: torch.dtype, role: str) -> Any:
    """A whole model on fake tensors."""
    with unset_fake_temporarily():
        model = model_outline(ModelSource.from_args(args, role), dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    # A kernel for GPUs need not be installed where a plan is made; all of them hold what SDPA holds.
    attention = "eager" if args.attn_implementation == "eager" else "sdpa"
    model.set_attn_implementation(BY_DOCUMENT[attention] if config.student.use_sequence_packing else attention)
    return model


def _remote_teacher(config: DistillConfig, world: World) -> RemoteTeacher:
    """A teacher in other processes."""
    model = outline(config, config.teacher.model_args, compute_dtype(config.teacher), "teacher")
    channel = _SizedChannel(output_head(model), count_parameters(model))
    return connect_channels(TeacherContext(config, world, longest_row=0, largest_token=0), [channel])


class _SizedChannel:
    """A channel whose responses arrive at once and have the sizes of a teacher's."""

    def __init__(self, head: OutputHead, num_parameters: int) -> None:
        bias = None if head.bias is None else head.bias.detach()
        self._head = OutputHead(head.weight.detach(), bias, head.softcap, head.scale)
        self._num_parameters = num_parameters

    def describe(self) -> TeacherDescription:
        return TeacherDescription(len(self._head.weight), self._num_parameters)

    def head(self) -> OutputHead:
        return self._head

    def check(self, longest_row: int, largest_token: int) -> None:
        """There is no data."""

    def send(self, request: TeacherRequest | None) -> Callable[[], TeacherResponse]:
        assert request is not None
        count, spec, weight = len(request.supervised), request.spec, self._head.weight
        k = min(spec.topk, spec.vocab_size)
        kinds: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {
            "top_k": {"log_probs": ((count, k), torch.float32), "indices": ((count, k), torch.int32)},
            "sampled_token": {"log_probs": ((count,), torch.float32)},
            "logits": {"logits": ((count, spec.vocab_size), weight.dtype)},
            "hidden_states": {"hidden_states": ((count, weight.shape[1]), weight.dtype)},
        }
        shapes = kinds[spec.kind]
        return lambda: TeacherResponse(
            {name: weight.new_empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}, 0.0
        )

    def offload(self) -> None:
        """Nothing is on a device."""
