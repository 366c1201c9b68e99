"""One rank's training step, taken with sizes instead of numbers.

The models are the real ones, spread by the real strategy over a process group that sends nothing, and stepped by the
real engine; every tensor is PyTorch's fake tensor, which has a shape, a dtype and no memory. Only the loss is a
stand-in: its buffers are made as the real one makes them, and the arithmetic on them, which holds nothing, is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from limbeck.data.batch import Batch
from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, check_length, model_outline, output_head
from limbeck.models.dtypes import compute_dtype, student_load_dtype
from limbeck.models.varlen_attention import BY_DOCUMENT
from limbeck.objectives import DistillationLoss, OutputHead, TopK
from limbeck.objectives.chunks import default_chunk
from limbeck.objectives.sizes import FusedSizes
from limbeck.plan.fake_distributed import FirstChunks, fake_distributed
from limbeck.plan.tracker import Tracker, local
from limbeck.strategies.base import MicroBatches, TeacherSpec, dims_of, strategy_of
from limbeck.strategies.deepspeed import offload_device
from limbeck.strategies.parallel_dims import ParallelDims
from limbeck.strategies.world import World
from limbeck.teachers import LocalTeacher, RemoteTeacher, Signal, TeacherInfo, TeacherRequest, TeacherResponse
from limbeck.teachers.remote import Route
from limbeck.train.build.objective import make_objective, signal_spec
from limbeck.train.build.student import Student, distribute_student, recomputes_activations, resolve_parallelism
from limbeck.train.student import LossSettings, TrainInput


@dataclass(frozen=True)
class Step:
    """What one rank of a group of processes holds (bytes), computes (FLOPs) and sends in a step.

    role: whose group it is. rank: which of its ranks; of those with the same layers the first, whose shards are the
    largest. devices: the GPU of each rank. parameters: of the whole models, by role. peak: bytes by name at the fullest
    moment; they add up. most: the same, each at its own fullest moment. activations: kept between a micro-batch's
    forward and backward pass; in a pipeline, of all micro-batches that are under way. flops: of all micro-batches, by
    name. moved: bytes that the loss reads and writes outside of products. sent: (collective, ranks of its group) →
    bytes of its larger side. tokens: that all ranks together train on. micro_tokens: of a micro-batch on this rank.
    chunk: positions whose logits the loss holds at once. signal: bytes of a micro-batch's signal, and whether it comes
    from elsewhere. stepped: numbers that this rank's optimizer steps. waits: by name, how often the time that its FLOPs
    take is also waited for other stages.
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


def simulate(config: DistillConfig, devices: int, device: str = "cuda") -> list[Step]:
    """A step of ``config`` on ``devices`` of the kind ``device``: the student's, and the teacher's if it is apart; in a
    pipeline those of the first stage and of the last.

    A micro-batch is as full as it can be: every row has ``sequence_length`` tokens, all supervised. Raises LimbeckError
    for a layout that cannot run, and for what is not known in sizes alone.
    """
    _refuse_the_unknown(config)
    again = recomputes_activations(config, device)
    args = config.student.model_args.model_copy(update={"disable_gradient_checkpointing": not again})
    config = config.model_copy(update={"student": config.student.model_copy(update={"model_args": args})})
    ours = _devices(config.device_mapping, devices, "student")
    kind, together = torch.device(device), not config.needs_worker_groups
    world = World(0, len(ours), torch.device("cpu"))
    student = resolve_parallelism(config, world, teacher_here=together, device_type=device).dims
    try:
        own = [student]
        if together and config.has_teacher:
            own.append(dims_of(config.teacher, len(ours), "teacher"))
        steps = [_student_step(config, ours, kind, rank, teacher_here=together) for rank in _simulated_ranks(own)]
        if config.needs_worker_groups and config.teacher.service is None:
            theirs = _devices(config.teacher.device_mapping, devices, "teacher")
            teacher = dims_of(config.teacher, len(theirs), "teacher")
            steps += [_teacher_step(config, theirs, student, kind, rank) for rank in _simulated_ranks([teacher])]
        return steps
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise LimbeckError(
            f"one of the models decides by values what it computes ({error}), so its step cannot be planned without weights."
        ) from error


def _simulated_ranks(dims: Iterable[ParallelDims]) -> list[int]:
    """Rank 0 and, with pipelines, the first rank of the last stage; stages between hold less than the first."""
    return sorted({0, *(each.rank_at(pp=each.pp - 1) for each in dims)})


def _refuse_the_unknown(config: DistillConfig) -> None:
    for role, worker in (("student", config.student), ("teacher", config.teacher)):
        block = worker.strategy_args.strategy_config.deepspeed
        if (role == "student" or config.has_teacher) and _is_zero(worker):
            for what in ("optimizer", "param"):
                if offload_device(block, what) is not None:
                    raise LimbeckError(
                        f"{role}.strategy_args.strategy_config.zero_optimization.offload_{what}: limbeck plan does not know "
                        "what DeepSpeed then leaves on a GPU; plan without."
                    )
    if config.cross_tokenizer != "off":
        raise LimbeckError(
            "limbeck plan does not know what cross_tokenizer holds in memory; plan with cross_tokenizer=off."
        )
    if config.objective_faults:
        raise LimbeckError("limbeck plan does not know what objective_faults hold in memory; plan without them.")


def _is_zero(worker: WorkerConfig) -> bool:
    return (worker.strategy_args.strategy_name or "").startswith("deepspeed")


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
    config: DistillConfig, devices: tuple[int, ...], kind: torch.device, rank: int, *, teacher_here: bool
) -> Step:
    batch, micro_batches = _full_batch(config)
    args = config.student.model_args
    dims = dims_of(config.student, len(devices), "student")
    whole, own = batch.shard_for_context_parallel(dims.coordinates(rank).cp, dims.cp)
    zero = _is_zero(config.student) or (config.has_teacher and teacher_here and _is_zero(config.teacher))
    with fake_distributed(len(devices), rank, zero=zero) as world:
        world = resolve_parallelism(config, world, teacher_here=teacher_here, device_type="cuda")
        teacher: LocalTeacher | RemoteTeacher | None = None
        head: OutputHead | None = None
        frozen: list[Tensor] = []
        if config.has_teacher and teacher_here:
            teacher, head = _teacher(config, world)
            frozen = held(teacher.model.body)
        elif config.has_teacher:
            teacher, head = _remote_teacher(config, world)
        model = _load(config, args, student_load_dtype(args), "student")
        size, vocab = _size(model), output_head(model).weight.shape[0]
        if teacher is not None:
            vocab = min(vocab, teacher.info.vocab_size)
        name = str(args.model_name_or_path or "the student")
        strategy_of(config.student, "student").check_model(model, world.dims, name, "student")
        objective, _ = make_objective(config, world.device)
        settings = LossSettings(objective, vocab, compiled=config.compile_loss is not False)
        with FirstChunks():
            student = distribute_student(config, world, model, teacher, settings, verify=False)
        engine = student.engine
        distils = config.distill_loss_weight > 0 or student.settings.features is not None
        request = None
        if teacher is not None and distils:
            request = partial(teacher.request, whole, signal_spec(config, vocab))
        simulated = _Steps(
            student, FusedSizes(kind), lambda: None if request is None else request()(whole), own, micro_batches
        )
        done = simulated.measure([*frozen, *([] if head is None else [head.weight])], dims.pp)
        waits = dict.fromkeys(("student", "loss"), (dims.pp - 1) / micro_batches)
        if teacher_here and config.has_teacher:
            waits["teacher"] = dims_of(config.teacher, len(devices), "teacher").pp - 1
        tracker = simulated.tracker
        return Step(
            role="student and teacher" if teacher_here and config.has_teacher else "student",
            rank=rank,
            devices=devices,
            parameters={"student": size, **({} if teacher is None else {"teacher": teacher.info.num_parameters})},
            peak=dict(+tracker.peak),
            most=dict(+tracker.most),
            activations=simulated.between,
            recomputed=recomputes_activations(config, kind.type),
            flops={name: done["flops", name] for name in ("teacher", "student", "loss")},
            moved=done["moved"],
            sent={key[1:]: size for key, size in done.items() if key[0] == "sent"},
            stepped=sum(local(each).numel() for group in engine.optimizer.param_groups for each in group["params"]),
            waits=waits,
            tokens=batch.num_tokens * micro_batches * world.dims.data_size,
            micro_batches=micro_batches,
            micro_tokens=own.input_ids.numel(),
            chunk=simulated.fused.chunk,
            signal=simulated.signal,
            signal_travels=not teacher_here and simulated.signal > 0,
        )


class _Steps:
    """Steps of a student, as the loop of a run takes them.

    between: bytes of activations after a forward pass, at their most. signal: bytes of a micro-batch's signal.
    """

    def __init__(
        self,
        student: Student,
        fused: FusedSizes,
        compute_signal: Callable[[], Signal | None],
        batch: Batch,
        micro_batches: int,
    ) -> None:
        self.engine, self.fused, self.batch, self.micro_batches = student.engine, fused, batch, micro_batches
        self.tracker, self.between, self.signal = Tracker(), 0, 0
        self._compute_signal, self._signal_flops = compute_signal, 0
        root: Any = self.engine.root  # type: ignore[attr-defined]
        root.fused = self._loss
        root.register_forward_hook(self._note_activations)

    def measure(self, of_teacher: Iterable[Tensor], stages: int) -> Counter[Any]:
        """What a whole step computes and sends; the tracker is left with what is held at its fullest."""
        # Further micro-batches add nothing to what is held: the second finds gradients that exist, and in a pipeline as
        # many are in flight as there are stages.
        count = min(self.micro_batches, stages + 1)
        with self.tracker:
            self.tracker.add(self.engine.held_tensors()["parameters"], "parameters")
            self.tracker.add(of_teacher, "teacher")
            self.take(min(count, stages))  # creates the optimizer's state, with which later steps begin
            self.tracker.add(self.engine.held_tensors()["optimizer"], "optimizer")
            fewer = self.take(count - 1) if self.micro_batches > count else Counter[Any]()
            done = self.take(count)
        more = self.micro_batches - count
        return done + Counter({key: size * more for key, size in (done - fewer).items()})

    def take(self, count: int) -> Counter[Any]:
        """One step over ``count`` micro-batches: what it computes and sends."""
        self.tracker.reset()
        self.fused.flops = self.fused.moved = self._signal_flops = 0
        with self.tracker.tagged("activations"):
            for _ in self.engine.forward_backward(MicroBatches(count, partial(self._inputs, count))):
                self.tracker.add(self.engine.held_tensors()["gradients"], "gradients")
        self.tracker.add(self.engine.held_tensors()["gradients"], "gradients")
        self.engine.step()
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
        with self.tracker.tagged("signal"):
            signal = self._compute_signal()
        self._signal_flops += self.tracker.flops - before
        self.signal = 0 if signal is None else _signal_bytes(signal)
        return TrainInput(self.batch, signal, 1.0, 1.0, self.micro_batches)

    def _loss(self, *args: Any, **kwargs: Any) -> DistillationLoss:
        with self.tracker.tagged("loss"):
            return self.fused(*args, **kwargs)

    def _note_activations(self, *_: Any) -> None:
        self.between = max(self.between, self.tracker.live["activations"])


def _teacher_step(
    config: DistillConfig, devices: tuple[int, ...], student: ParallelDims, kind: torch.device, rank: int
) -> Step:
    """A step of a teacher with its own devices, to which one rank of each of the student's model-parallel groups
    sends.
    """
    batch, micro_batches = _full_batch(config)
    senders = student.data_size
    tracker, ranks, args = Tracker(), len(devices), config.student.model_args
    dims = dims_of(config.teacher, ranks, "teacher")
    with fake_distributed(ranks, rank, zero=_is_zero(config.teacher)) as world:
        teacher, head = _teacher(config, world)
        source = ModelSource.from_args(args, "student")
        with unset_fake_temporarily():
            student_rows = output_head(model_outline(source, torch.float32)).weight.shape[0]
        vocab = min(student_rows, teacher.info.vocab_size)
        spec = signal_spec(config, vocab)
        request = TeacherRequest.from_batch(batch, spec)
        chunk = default_chunk(kind, vocab, len(batch.supervised), head.weight, None)
        with tracker, tracker.tagged("signal"):
            tracker.add([*held(teacher.model.body), head.weight], "teacher")
            for _ in range(2):  # the first call creates what later ones find
                tracker.reset()
                hidden = teacher.compute_hidden(request)
                sent = spec.encode(hidden, head, chunk)
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


def _full_batch(config: DistillConfig) -> tuple[Batch, int]:
    """A micro-batch, whose rows with packing lie end to end in one, and how many of them a rank has in a step."""
    training, time = config.student.training_args, config.sequence_length
    rows, count = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if config.max_tokens_per_microbatch:
        fitting = max(1, config.max_tokens_per_microbatch // time)
        rows, count = min(fitting, rows * count), -(-rows * count // fitting)
    ids, everywhere = torch.zeros(rows, time, dtype=torch.long), torch.arange(rows * time)
    if not config.student.use_sequence_packing:
        return Batch(ids, ids, None, rows * time, everywhere), count
    ids, places = ids.view(1, -1), everywhere.view(1, -1) % time
    return Batch(ids, ids, places, rows * time, everywhere, documents=(time,) * rows), count


def _load(config: DistillConfig, args: ModelArgs, dtype: torch.dtype, role: str) -> Any:
    with unset_fake_temporarily():
        model = model_outline(ModelSource.from_args(args, role), dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    check_length(model, str(args.model_name_or_path or f"the {role}"), config.sequence_length)
    # A kernel for GPUs need not be installed where a plan is made; all of them hold what SDPA holds.
    attention = "eager" if args.attn_implementation == "eager" else "sdpa"
    model.set_attn_implementation(BY_DOCUMENT[attention] if config.student.use_sequence_packing else attention)
    return model


def _teacher(config: DistillConfig, world: World) -> tuple[LocalTeacher, OutputHead]:
    worker = config.teacher
    model = _load(config, worker.model_args, compute_dtype(worker), "teacher")
    name = str(worker.model_args.model_name_or_path or "the teacher")
    strategy = strategy_of(worker, "teacher")
    strategy.check_model(model, strategy.dims(worker, world.size, "teacher"), name, "teacher")
    with FirstChunks():
        frozen = strategy.build_teacher(TeacherSpec(model, name, worker, verify=False), world)
    return LocalTeacher(frozen), frozen.head


def _remote_teacher(config: DistillConfig, world: World) -> tuple[RemoteTeacher, OutputHead | None]:
    """A teacher in other processes, and its head if the student needs it."""
    model = _load(config, config.teacher.model_args, compute_dtype(config.teacher), "teacher")
    head = output_head(model)
    head = replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
    needed = head if config.teacher_signal == "hidden_states" else None
    info = TeacherInfo(len(head.weight), _size(model), needed)
    return RemoteTeacher(
        [_SizedChannel(head.weight)],  # type: ignore[list-item]
        Route((0,)),
        info,
        world,
    ), needed


class _SizedChannel:
    """Responds at once with signals of the right sizes."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def send(self, request: TeacherRequest | None) -> Callable[[], TeacherResponse]:
        assert request is not None
        count, spec, weight = len(request.supervised), request.spec, self._weight
        k = min(spec.topk, spec.vocab_size)
        sizes = {
            "top_k": {"log_probs": (k, torch.float32), "indices": (k, torch.int32)},
            "logits": {"logits": (spec.vocab_size, weight.dtype)},
            "hidden_states": {"hidden_states": (weight.shape[1], weight.dtype)},
        }[spec.kind]
        return lambda: TeacherResponse(
            {name: weight.new_empty(count, width, dtype=dtype) for name, (width, dtype) in sizes.items()}, 0.0
        )


def _signal_bytes(signal: Signal) -> int:
    payload = signal.payload
    if isinstance(payload, TopK):  # its tokens travel in 32 bits
        return payload.log_probs.nbytes + 4 * payload.indices.numel()
    return sum(each.nbytes for each in (signal.hidden, None if payload is None else payload.logits) if each is not None)


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def held(module: torch.nn.Module) -> list[Tensor]:
    """Parameters and buffers: of parameters that ZeRO-3 shards, this rank's part."""
    return [getattr(parameter, "ds_tensor", parameter) for parameter in module.parameters()] + list(module.buffers())
