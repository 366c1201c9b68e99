"""Takes a rank's training step on fake tensors, and counts what it holds, computes and sends.

The models are built by the real strategies over a process group that transfers nothing, and stepped by the real engines.
Only the loss is replaced: its stand-in allocates the buffers of the real one and leaves out the arithmetic on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from limbeck.config import DistillConfig
from limbeck.data.batch import Batch
from limbeck.errors import LimbeckError, UnknownMemory
from limbeck.models import ModelSource, model_outline, output_head, recomputes_activations
from limbeck.objectives import DistillationLoss, Sampled, TopK
from limbeck.objectives.chunks import default_chunk
from limbeck.objectives.sizes import FusedSizes
from limbeck.plan.copied_weights import add_writing
from limbeck.plan.micro_batch import full_micro_batch, longest_row
from limbeck.plan.models import SIGNAL, SimulatedStudent, simulated_student, simulated_teacher
from limbeck.plan.tracker import ACTIVATIONS, Tracker, local, tagged, with_tag
from limbeck.strategies.base import MicroBatches, dims_of
from limbeck.strategies.parallel_dims import ParallelDims
from limbeck.strategies.world import World
from limbeck.teachers import Signal, TeacherRequest
from limbeck.train.build.objective import signal_spec
from limbeck.train.build.student import resolve_parallelism, with_recomputation
from limbeck.train.student import TrainInput


@dataclass(frozen=True)
class Step:
    """What one rank of a group of processes holds (bytes), computes (FLOPs) and sends in a step.

    Args:
        role: of the group: ``"student"``, ``"teacher"`` or ``"student and teacher"``.
        rank: the simulated rank: the first of those with the same layers, whose shards are the largest.
        devices: the GPU of each rank.
        parameters: number of parameters of the whole models, by role.
        peak: bytes by tag when their sum is largest.
        most: bytes by tag, each at its own maximum.
        flops: of all micro-batches, by what they are for.
        sent: (collective, ranks of its group) to the bytes of its larger side.
        tokens: trained on by all ranks together.
        micro_batches: number on a rank.
        micro_tokens: tokens of a micro-batch on a rank.
        signal: bytes of a micro-batch's signal.
        signal_travels: whether the signal comes from another group of processes.
        activations: bytes kept between a micro-batch's forward and backward pass; in a pipeline, of all micro-batches
            in flight.
        recomputed: whether activations are recomputed in the backward pass.
        moved: bytes that the loss reads and writes outside of matrix products.
        chunk: positions whose logits the loss holds at once.
        stepped: parameters that this rank's optimizer steps.
        waits: by name in ``flops``, how many times the duration of these FLOPs the rank also waits for other pipeline
            stages.
    """

    role: str
    rank: int
    devices: tuple[int, ...]
    parameters: dict[str, int]
    peak: dict[str, int]
    most: dict[str, int]
    flops: dict[str, int]
    sent: dict[tuple[str, tuple[int, ...]], int]
    tokens: int
    micro_batches: int
    micro_tokens: int
    signal: int
    signal_travels: bool
    activations: int = 0
    recomputed: bool = False
    moved: int = 0
    chunk: int = 0
    stepped: int = 0
    waits: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.peak.values())


def simulate(config: DistillConfig, devices: int, device: str = "cuda", *, compiled: bool = False) -> list[Step]:
    """A step of ``config`` on ``devices`` devices of the kind ``device``.

    Every row has ``sequence_length`` tokens, all supervised. compiled: whether the layers of the models are.

    Returns:
        The student's step, and the teacher's if it has other devices. With a pipeline, those of the first and the last
        stage; the stages between them hold less than the first.

    Raises:
        UnknownMemory: if sizes do not determine what the step holds.
        LimbeckError: for a layout that cannot run.
    """
    _refuse_unknown(config)
    config = with_recomputation(config, recompute=recomputes_activations(config, device))
    students = _devices(config.device_mapping, devices, "student")
    kind, colocated = torch.device(device), not config.needs_worker_groups
    world = World(0, len(students), torch.device("cpu"))
    student = resolve_parallelism(config, world, teacher_here=colocated, device_type=device).dims
    dims = [student]
    if colocated and config.has_teacher:
        dims.append(dims_of(config.teacher, len(students), "teacher"))
    steps = [_student_step(config, students, rank, kind, compiled) for rank in _simulated_ranks(dims)]
    if config.needs_worker_groups and config.teacher.service is None:
        teachers = _devices(config.teacher.device_mapping, devices, "teacher")
        teacher = dims_of(config.teacher, len(teachers), "teacher")
        senders = student.data_size
        for rank in _simulated_ranks([teacher]):
            steps.append(_teacher_step(config, teachers, rank, senders, kind, compiled))
    return steps


def _simulated_ranks(dims: Sequence[ParallelDims]) -> list[int]:
    return sorted({0, *(each.rank_at(pp=each.pp - 1) for each in dims)})


def _refuse_unknown(config: DistillConfig) -> None:
    if config.cross_tokenizer != "off":
        raise UnknownMemory(
            "limbeck plan does not know what cross_tokenizer holds in memory; plan with cross_tokenizer=off."
        )
    if config.has_teacher and not config.teacher.model_args.names_a_model:
        raise UnknownMemory(
            f"limbeck plan does not know what teacher.source = {config.teacher.source} holds in memory; plan with "
            "teacher.source=auto and a teacher_pretrain."
        )
    if config.objective_faults:
        raise UnknownMemory("limbeck plan does not know what objective_faults hold in memory; plan without them.")


def _devices(mapping: Sequence[int] | None, devices: int, role: str) -> tuple[int, ...]:
    if mapping is None:
        return tuple(range(devices))
    if max(mapping) >= devices:
        raise LimbeckError(
            f"{role}.device_mapping names device {max(mapping)}, but --nodes × --gpus-per-node makes {devices} devices, "
            f"numbered 0 to {devices - 1}; plan with more, or name others."
        )
    return tuple(mapping)


def _student_step(
    config: DistillConfig, devices: tuple[int, ...], rank: int, kind: torch.device, compiled: bool
) -> Step:
    batch, micro_batches = full_micro_batch(config, longest_row(config)[0])
    colocated = config.has_teacher and not config.needs_worker_groups
    dims = dims_of(config.student, len(devices), "student")
    whole, own = batch.shard_for_context_parallel(dims.coordinates(rank).cp, dims.cp)
    with simulated_student(config, len(devices), rank, compiled=compiled) as simulated:
        teacher, request = simulated.teacher, None
        distils = config.distils or simulated.student.settings.features is not None
        if teacher is not None and distils:
            request = partial(teacher.request, whole, signal_spec(config, simulated.vocab_size))
        steps = _Steps(
            simulated, FusedSizes(kind), own, lambda: None if request is None else request()(whole), micro_batches
        )
        totals = steps.measure()
        waits = dict.fromkeys(("student", "loss"), (dims.pp - 1) / micro_batches)
        if colocated:
            waits["teacher"] = dims_of(config.teacher, len(devices), "teacher").pp - 1
        optimizer = simulated.student.engine.optimizer
        peak, most = dict(+steps.tracker.peak), dict(+steps.tracker.most)
        add_writing(config, peak, most, len(devices), kind.type)
        return Step(
            role="student and teacher" if colocated else "student",
            rank=rank,
            devices=devices,
            parameters={"student": simulated.num_parameters}
            | ({} if teacher is None else {"teacher": teacher.info.num_parameters}),
            peak=peak,
            most=most,
            activations=steps.activations,
            recomputed=recomputes_activations(config, kind.type),
            flops={name: totals["flops", name] for name in ("teacher", "student", "loss")},
            moved=totals["moved"],
            sent={key[1:]: size for key, size in totals.items() if key[0] == "sent"},
            stepped=sum(local(each).numel() for group in optimizer.param_groups for each in group["params"]),
            waits=waits,
            tokens=batch.num_tokens * micro_batches * dims.data_size,
            micro_batches=micro_batches,
            micro_tokens=own.input_ids.numel(),
            chunk=steps.fused.chunk,
            signal=steps.signal,
            signal_travels=not colocated and steps.signal > 0,
        )


class _Steps:
    """Steps of a simulated student, taken as the training loop takes them.

    activations: bytes of activations after a forward pass, at most. signal: bytes of a micro-batch's signal.
    """

    def __init__(
        self,
        simulated: SimulatedStudent,
        fused: FusedSizes,
        batch: Batch,
        compute_signal: Callable[[], Signal | None],
        micro_batches: int,
    ) -> None:
        self.tracker, self.fused, self.activations, self.signal = Tracker(), fused, 0, 0
        self._engine, self._stages = simulated.student.engine, simulated.world.dims.pp
        self._teacher_tensors = simulated.teacher_tensors
        self._batch, self._micro_batches = batch, micro_batches
        self._compute_signal, self._signal_flops = compute_signal, 0
        root: Any = self._engine.root
        root.fused = self._loss
        root.forward = with_tag(ACTIVATIONS, root.forward)
        root.register_forward_hook(self._note_activations)

    def measure(self) -> Counter[Any]:
        """What a whole step computes and sends; the tracker then has what is held in it."""
        # Further micro-batches add nothing to what is held: the second finds gradients that exist, and in a pipeline as
        # many are in flight as there are stages.
        count = min(self._micro_batches, self._stages + 1)
        with self.tracker:
            self.tracker.add(self._engine.held_tensors()["parameters"], "parameters")
            self.tracker.add(self._teacher_tensors, "teacher")
            self._take(min(count, self._stages))  # creates the optimizer's state, with which later steps begin
            self.tracker.add(self._engine.held_tensors()["optimizer"], "optimizer")
            fewer = self._take(count - 1) if self._micro_batches > count else Counter[Any]()
            totals = self._take(count)
        more = self._micro_batches - count
        return totals + Counter({key: size * more for key, size in (totals - fewer).items()})

    def _take(self, count: int) -> Counter[Any]:
        """One step over ``count`` micro-batches: what it computes and sends."""
        self.tracker.reset()
        self.fused.flops = self.fused.moved = self._signal_flops = 0
        with tagged(ACTIVATIONS):
            for _ in self._engine.forward_backward(MicroBatches(count, partial(self._inputs, count))):
                self.tracker.add(self._engine.held_tensors()["gradients"], "gradients")
        self.tracker.add(self._engine.held_tensors()["gradients"], "gradients")
        self._engine.step()
        flops = {
            "teacher": self._signal_flops,
            "student": self.tracker.flops - self._signal_flops,
            "loss": self.fused.flops,
        }
        totals: Counter[Any] = Counter({("flops", name): number for name, number in flops.items()})
        totals.update({("sent", *key): size for key, size in self.tracker.sent.items()})
        totals["moved"] = self.fused.moved
        return totals

    def _inputs(self, count: int) -> Iterator[TrainInput]:
        for _ in range(count):
            yield self._input()

    def _input(self) -> TrainInput:
        before = self.tracker.flops
        with tagged(SIGNAL):
            signal = self._compute_signal()
        self._signal_flops += self.tracker.flops - before
        self.signal = 0 if signal is None else _signal_bytes(signal)
        return TrainInput(self._batch, signal, 1.0, 1.0, self._micro_batches)

    def _loss(self, *args: Any, **kwargs: Any) -> DistillationLoss:
        with tagged("loss"):
            return self.fused(*args, **kwargs)

    def _note_activations(self, *_: Any) -> None:
        self.activations = max(self.activations, self.tracker.live[ACTIVATIONS])


def _teacher_step(
    config: DistillConfig, devices: tuple[int, ...], rank: int, senders: int, kind: torch.device, compiled: bool
) -> Step:
    """A step of a teacher that has its own devices and gets requests from ``senders`` student ranks."""
    batch, micro_batches = full_micro_batch(config, longest_row(config)[0])
    tracker, ranks = Tracker(), len(devices)
    dims = dims_of(config.teacher, ranks, "teacher")
    with simulated_teacher(config, ranks, rank, compiled=compiled) as teacher:
        with unset_fake_temporarily():
            source = ModelSource.from_args(config.student.model_args, "student")
            student_rows = output_head(model_outline(source, torch.float32)).weight.shape[0]
        head = teacher.model.head
        spec = signal_spec(config, min(student_rows, teacher.info.vocab_size))
        request = TeacherRequest.from_batch(batch, spec)
        chunk = default_chunk(kind, spec.vocab_size, len(batch.supervised), head.weight, None)
        with tracker, tagged(SIGNAL):
            tracker.add(teacher.model.held_tensors(), "teacher")
            for _ in range(2):  # the first call creates what later ones find
                tracker.reset()
                hidden = teacher.compute_hidden(request)
                sent = spec.encode(hidden, head, chunk, request.labels)
                del hidden
    # Ranks that run each pass together receive equally many requests; whole copies divide them.
    in_step = dims.replica_size > 1
    rounds = -(-senders // ranks) if in_step or ranks < senders else senders / ranks
    calls = micro_batches * rounds
    return Step(
        role="teacher",
        rank=rank,
        devices=devices,
        parameters={"teacher": teacher.info.num_parameters},
        peak=dict(+tracker.peak),
        most=dict(+tracker.most),
        flops={"teacher": int(tracker.flops * calls)},
        sent={key: int(size * calls) for key, size in tracker.sent.items()},
        waits={"teacher": dims.pp - 1},
        tokens=batch.num_tokens * micro_batches * senders,
        micro_batches=micro_batches,
        micro_tokens=batch.input_ids.numel(),
        signal=sum(tensor.nbytes for tensor in sent.values()),
        signal_travels=True,
    )


def _signal_bytes(signal: Signal) -> int:
    payload = signal.payload
    if isinstance(payload, TopK):  # its tokens travel in 32 bits
        return payload.log_probs.nbytes + 4 * payload.indices.numel()
    if isinstance(payload, Sampled):
        return payload.log_probs.nbytes
    return sum(each.nbytes for each in (signal.hidden, None if payload is None else payload.logits) if each is not None)
