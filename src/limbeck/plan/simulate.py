"""One rank's training step, taken with sizes instead of numbers.

The models are the real ones, spread by the real strategy over a process group that sends nothing, and stepped by the real
engine; every tensor is PyTorch's fake tensor, which has a shape, a dtype and no memory. Only the loss is a stand-in: its
buffers are made as the real one makes them, and the arithmetic on them, which holds nothing, is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
from limbeck.models import body, check_length, output_head
from limbeck.models.varlen_attention import BY_DOCUMENT
from limbeck.objectives import DistillationLoss, OutputHead, TopK
from limbeck.objectives.chunks import default_chunk
from limbeck.objectives.sizes import FusedSizes
from limbeck.plan.fake_distributed import FirstChunks, fake_distributed
from limbeck.plan.memory import outline
from limbeck.plan.tracker import Tracker, local
from limbeck.strategies.deepspeed import ZeroEngine, offload_device
from limbeck.strategies.parallel_dims import Layout
from limbeck.strategies.pipeline_engine import PipelineEngine
from limbeck.strategies.pipeline_parallel import check_stages
from limbeck.strategies.tensor_parallel import check_tensor_parallel
from limbeck.strategies.torch_engine import Engine
from limbeck.strategies.world import World
from limbeck.teachers import LocalTeacher, ModelParallelTeacher, RemoteTeacher, Signal, Teacher, TeacherRequest
from limbeck.teachers.remote import Route, TeacherResponse
from limbeck.train.build.models import (
    DTYPES,
    fsdp2_options,
    layout_of,
    make_engine,
    make_objective,
    parallelize_student,
    parallelize_teacher,
    recompute,
    refuse_layout,
    resolve_parallelism,
    signal_spec,
)
from limbeck.train.student import StudentWithLoss


@dataclass(frozen=True)
class Step:
    """What one rank of a group of processes holds (bytes), computes (FLOPs) and sends in a step.

    role: whose group it is. rank: which of its ranks; of those with the same layers the first, whose shards are the largest.
    devices: the GPU of each rank. parameters: of the whole models, by role. peak: bytes by name at the fullest moment; they add
    up. most: the same, each at its own fullest moment. activations: kept between a micro-batch's forward and backward pass; in
    a pipeline, of all micro-batches that are under way. flops: of all micro-batches, by name. moved: bytes that the loss reads
    and writes outside of products. sent: (collective, ranks of its group) → bytes of its larger side. tokens: that all ranks
    together train on. micro_tokens: of a micro-batch on this rank. chunk: positions whose logits the loss holds at once.
    signal: bytes of a micro-batch's signal, and whether it comes from elsewhere. stepped: numbers that this rank's optimizer
    steps. waits: by name, how often the time that its FLOPs take is also waited for other stages.
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

    A micro-batch is as full as it can be: every row has ``sequence_length`` tokens, all supervised. Raises LimbeckError for a
    layout that cannot run, and for what is not known in sizes alone.
    """
    _refuse_the_unknown(config)
    again = recompute(config, World(0, 1, torch.device(device)))
    args = config.student.model_args.model_copy(update={"disable_gradient_checkpointing": not again})
    config = config.model_copy(update={"student": config.student.model_copy(update={"model_args": args})})
    ours = _devices(config.device_mapping, devices, "student")
    refuse_layout(config, len(ours), device)
    kind, together = torch.device(device), not config.needs_worker_groups
    try:
        student, teacher = layout_of(config.student), layout_of(config.teacher)
        own = [student, teacher] if together and config.has_teacher else [student]
        steps = [_student_step(config, ours, kind, rank, teacher_here=together) for rank in _looked_at(own)]
        if config.needs_worker_groups and config.teacher.service is None:
            theirs = _devices(config.teacher.device_mapping, devices, "teacher")
            steps += [_teacher_step(config, theirs, len(ours), kind, rank) for rank in _looked_at([teacher])]
        return steps
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise LimbeckError(
            f"one of the models decides by values what it computes ({error}), so its step cannot be planned without weights."
        ) from error


def _looked_at(layouts: Iterable[Layout]) -> list[int]:
    """Rank 0 and, where layers are divided, the first rank that has the last ones: those between hold less than the first."""
    return sorted({0, *((layout.pipeline - 1) * layout.tensor * layout.context for layout in layouts)})


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
    layout, args = layout_of(config.student), config.student.model_args
    asked, own = batch.shard_for_context_parallel(rank // layout.tensor % layout.context, layout.context)
    zero = _is_zero(config.student) or (config.has_teacher and teacher_here and _is_zero(config.teacher))
    with fake_distributed(len(devices), rank, zero=zero) as world:
        world = resolve_parallelism(config, world, teacher_here=teacher_here)
        teacher: Teacher | None = None
        head: OutputHead | None = None
        if config.has_teacher:
            teacher, head = _teacher(config, world) if teacher_here else _elsewhere(config)
        # Float32 but for a LoRA base, as in ``make_student``.
        model = _load(config, args, DTYPES[args.dtype] if args.lora_target else torch.float32, "student")
        size, vocab, name = (
            _size(model),
            output_head(model).weight.shape[0],
            str(args.model_name_or_path or "the student"),
        )
        if teacher is not None:
            vocab = min(vocab, teacher.vocab_size)
        check_tensor_parallel(body(model), layout, name, "student")
        check_stages(body(model), layout.pipeline, name, "student")
        objective, _ = make_objective(config, world.device)
        compiled = config.compile_loss is not False
        with FirstChunks():
            student = parallelize_student(
                config, world, model, objective, vocab, teacher, compiled=compiled, proven=False
            )
        engine = make_engine(config, world, student)
        asks = teacher is not None and (config.distill_loss_weight > 0 or student.features is not None)
        ask = partial(teacher.ask, asked, signal_spec(config, vocab)) if teacher is not None and asks else None
        taken = _Steps(
            student, engine, FusedSizes(kind), lambda: None if ask is None else ask()(asked), own, micro_batches
        )
        frozen = held(teacher.body) if isinstance(teacher, LocalTeacher) else []
        done = taken.measure([*frozen, *([] if head is None else [head.weight])], layout.pipeline)
        waits = dict.fromkeys(("student", "loss"), (layout.pipeline - 1) / micro_batches)
        if teacher_here:
            waits["teacher"] = layout_of(config.teacher).pipeline - 1
        tracker = taken.tracker
        return Step(
            role="student and teacher" if teacher_here and config.has_teacher else "student",
            rank=rank,
            devices=devices,
            parameters={"student": size, **({} if teacher is None else {"teacher": teacher.num_parameters})},
            peak=dict(+tracker.peak),
            most=dict(+tracker.most),
            activations=taken.between,
            recomputed=recompute(config, world),
            flops={name: done["flops", name] for name in ("teacher", "student", "loss")},
            moved=done["moved"],
            sent={key[1:]: size for key, size in done.items() if key[0] == "sent"},
            stepped=sum(local(each).numel() for group in engine.optimizer.param_groups for each in group["params"]),
            waits=waits,
            tokens=batch.num_tokens * micro_batches * world.data_size,
            micro_batches=micro_batches,
            micro_tokens=own.input_ids.numel(),
            chunk=taken.fused.chunk,
            signal=taken.signal,
            signal_travels=not teacher_here and taken.signal > 0,
        )


class _Steps:
    """Steps of a student, as the loop of a run takes them. between: bytes of activations after a forward pass, at their most.
    signal: bytes of a micro-batch's."""

    def __init__(
        self,
        student: StudentWithLoss,
        engine: Engine,
        fused: FusedSizes,
        ask: Callable[[], Signal | None],
        batch: Batch,
        micro_batches: int,
    ) -> None:
        self.student, self.engine, self.fused, self.batch, self.micro_batches = (
            student,
            engine,
            fused,
            batch,
            micro_batches,
        )
        self.tracker, self.between, self.signal = Tracker(), 0, 0
        self._ask, self._asking = ask, 0
        student.fused = self._loss
        student.register_forward_hook(self._look)

    def measure(self, of_teacher: Iterable[Tensor], stages: int) -> Counter[Any]:
        """What a whole step computes and sends; the tracker is left with what is held at its fullest."""
        # Of the micro-batches that follow each other, further ones add nothing to what is held: one finds gradients that are
        # there, and in a pipeline as many are under way as there are stages.
        count = min(self.micro_batches, stages + 1)
        with self.tracker:
            self.tracker.add(held(self.student), "parameters")
            self.tracker.add(of_teacher, "teacher")
            self.take(min(count, stages))  # makes the optimizer's state, which later steps begin with
            self.tracker.add(optimizer_state(self.engine), "optimizer")
            fewer = self.take(count - 1) if self.micro_batches > count else Counter[Any]()
            done = self.take(count)
        more = self.micro_batches - count
        return done + Counter({key: size * more for key, size in (done - fewer).items()})

    def take(self, count: int) -> Counter[Any]:
        """One step in which ``count`` micro-batches are trained on: what it computes and sends."""
        self.tracker.reset()
        self.fused.flops = self.fused.moved = self._asking = 0
        if isinstance(
            self.engine, PipelineEngine
        ):  # the answers to all of a step's questions come before its first pass
            work = [self._inputs() for _ in range(self.micro_batches)]
            with self.tracker.tagged("activations"):
                self.engine.run(work[:count])
            del work
        else:
            for number in range(count):
                inputs = self._inputs()
                with self.tracker.tagged("activations"):
                    self.engine.backward(self.engine(*inputs).loss, last=number == count - 1)
                del inputs
                self.tracker.add(gradients(self.student, self.engine), "gradients")
        self.tracker.add(gradients(self.student, self.engine), "gradients")
        self.student.finish_gradients()
        self.engine.step()
        flops = {"teacher": self._asking, "student": self.tracker.flops - self._asking, "loss": self.fused.flops}
        told: Counter[Any] = Counter({("flops", name): number for name, number in flops.items()})
        told.update({("sent", *key): size for key, size in self.tracker.sent.items()})
        told["moved"] = self.fused.moved
        return told

    def _inputs(self) -> tuple[Any, ...]:
        before = self.tracker.flops
        with self.tracker.tagged("signal"):
            signal = self._ask()
        self._asking += self.tracker.flops - before
        self.signal = 0 if signal is None else _signal_bytes(signal)
        return self.batch, signal, 1.0, 1.0, self.micro_batches

    def _loss(self, *args: Any, **kwargs: Any) -> DistillationLoss:
        with self.tracker.tagged("loss"):
            return self.fused(*args, **kwargs)

    def _look(self, *_: Any) -> None:
        self.between = max(self.between, self.tracker.live["activations"])


def _teacher_step(
    config: DistillConfig, devices: tuple[int, ...], students: int, kind: torch.device, rank: int
) -> Step:
    """A step of a teacher's group of its own, which ``students`` ranks ask: of those with the same rows, one."""
    asked, micro_batches = _full_batch(config)
    layout, askers = layout_of(config.teacher), students // layout_of(config.student).together
    tracker, ranks, args = Tracker(), len(devices), config.student.model_args
    with fake_distributed(ranks, rank, zero=_is_zero(config.teacher)) as world:
        layout.check(world, "teacher")
        teacher, head = _teacher(config, world)
        with unset_fake_temporarily():
            vocab = min(output_head(outline(args, torch.float32, "student")).weight.shape[0], teacher.vocab_size)
        wanted = signal_spec(config, vocab)
        question = TeacherRequest.of(asked, wanted)
        chunk = default_chunk(kind, vocab, len(asked.supervised), head.weight, None)
        with tracker, tracker.tagged("signal"):
            tracker.add([*held(teacher.body), head.weight], "teacher")
            for _ in range(2):  # the first call makes what later ones find
                tracker.reset()
                hidden = teacher.hidden(question)
                said = wanted.say(hidden, head, chunk)
                del hidden
        # Ranks that run each pass together are asked equally often; whole copies are shared out.
        in_step = ranks > 1 and not (config.teacher.strategy_args.strategy_name == "hf_infer" and layout.together == 1)
        rounds = -(-askers // ranks) if in_step or ranks < askers else askers / ranks
        calls = micro_batches * rounds
        return Step(
            role="teacher",
            rank=rank,
            devices=devices,
            parameters={"teacher": teacher.num_parameters},
            peak=dict(+tracker.peak),
            most=dict(+tracker.most),
            flops={"teacher": int(tracker.flops * calls)},
            sent={key: int(size * calls) for key, size in tracker.sent.items()},
            waits={"teacher": layout.pipeline - 1},
            tokens=asked.num_tokens * micro_batches * askers,
            micro_batches=micro_batches,
            micro_tokens=asked.input_ids.numel(),
            signal=sum(tensor.nbytes for tensor in said),
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
        model = outline(args, dtype, role)
    model.to_empty(device="cpu")
    model.tie_weights()
    check_length(model, str(args.model_name_or_path or f"the {role}"), config.sequence_length)
    # A kernel for GPUs need not be installed where a plan is made; all of them hold what SDPA holds.
    attention = "eager" if args.attn_implementation == "eager" else "sdpa"
    model.set_attn_implementation(BY_DOCUMENT[attention] if config.student.use_sequence_packing else attention)
    return model


def _load_teacher(config: DistillConfig) -> Any:
    args = config.teacher.model_args
    dtype = fsdp2_options(config.teacher, DTYPES[args.dtype]).param_dtype or torch.float32
    return _load(config, args, dtype, "teacher")


def _teacher(config: DistillConfig, world: World) -> tuple[LocalTeacher, OutputHead]:
    model = _load_teacher(config)
    name = str(config.teacher.model_args.model_name_or_path or "the teacher")
    layout = layout_of(config.teacher)
    check_tensor_parallel(body(model), layout, name, "teacher")
    check_stages(body(model), layout.pipeline, name, "teacher")
    with FirstChunks():
        teacher = parallelize_teacher(config, world, model, proven=False)
    if isinstance(teacher, ModelParallelTeacher):
        teacher._tell = lambda owner, own: own  # type: ignore[method-assign]  # all ranks ask about equally much
    return teacher, teacher.head


def _elsewhere(config: DistillConfig) -> tuple[RemoteTeacher, OutputHead | None]:
    """A teacher in other processes, and its head if that is needed here."""
    model = _load_teacher(config)
    head = output_head(model)
    head = replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
    weight, kinds = head.weight, {"top_k": (torch.float32, torch.int32)}

    class Wire:
        def ask(self, question: TeacherRequest | None) -> Callable[[], TeacherResponse]:
            assert question is not None
            count, wanted = len(question.supervised), question.wanted
            widths = {"top_k": min(wanted.topk, wanted.vocab_size), "logits": wanted.vocab_size}
            width, dtypes = widths.get(wanted.kind, weight.shape[1]), kinds.get(wanted.kind, (weight.dtype,))
            return lambda: TeacherResponse(tuple(weight.new_empty(count, width, dtype=dtype) for dtype in dtypes), 0.0)

    needed = head if config.teacher_signal == "hidden_states" else None
    return RemoteTeacher([Wire()], Route((0,)), len(weight), _size(model), needed), needed


def _signal_bytes(signal: Signal) -> int:
    said = signal.said
    if isinstance(said, TopK):  # its tokens travel in 32 bits
        return said.log_probs.nbytes + 4 * said.indices.numel()
    return sum(each.nbytes for each in (signal.hidden, None if said is None else said.logits) if each is not None)


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def held(module: torch.nn.Module) -> list[Tensor]:
    """Parameters and buffers: of parameters that ZeRO-3 shards, this rank's part."""
    return [getattr(parameter, "ds_tensor", parameter) for parameter in module.parameters()] + list(module.buffers())


def gradients(student: torch.nn.Module, engine: Engine) -> list[Tensor]:
    own = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    return own + (engine.gradients() if isinstance(engine, ZeroEngine) else [])


def optimizer_state(engine: Engine) -> list[Tensor]:
    found = [value for state in engine.optimizer.state.values() for value in state.values()]
    masters = engine.masters() if isinstance(engine, ZeroEngine) else []
    return [value for value in (*found, *masters) if isinstance(value, Tensor)]
