"""One rank's training step, taken with sizes instead of numbers.

The models are the real ones, spread by the real strategy over a process group that sends nothing, and stepped by the real
engine; every tensor is PyTorch's fake tensor, which has a shape, a dtype and no memory. Only the loss is a stand-in: its
buffers are made as the real one makes them, and the arithmetic on them, which holds nothing, is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode
from transformers import masking_utils

from limbeck.config import DistillConfig
from limbeck.config.schema import ModelArgs
from limbeck.data.batch import Batch
from limbeck.errors import LimbeckError
from limbeck.models import body, check_length, output_head
from limbeck.models.documents import BY_DOCUMENT
from limbeck.objectives import OutputHead
from limbeck.objectives.sizes import FusedSizes
from limbeck.pipeline.memory import outline
from limbeck.pipeline.parts import (
    DTYPES,
    arrange,
    fsdp2_options,
    layout_of,
    make_engine,
    make_objective,
    recompute,
    refuse_layout,
    spread_student,
    spread_teacher,
    wanted_of,
)
from limbeck.plan.tracker import Tracker
from limbeck.strategies.layout import mesh_of
from limbeck.strategies.tensor import check_tensor_parallel
from limbeck.strategies.world import World
from limbeck.teachers import LocalTeacher, Question, RemoteTeacher, Teacher, TogetherTeacher
from limbeck.teachers.remote import Reply, Route


@dataclass(frozen=True)
class Step:
    """What rank 0 of a group of processes, whose shards are the largest, holds (bytes), computes (FLOPs) and sends in a step.

    devices: the GPU of each rank. parameters: of the whole models, by role. peak: bytes by name at the fullest
    moment; they add up. most: the same, each at its own fullest moment. activations: kept between a micro-batch's forward and
    backward pass. flops: of all micro-batches, by name. moved: bytes that the loss reads and writes outside of products.
    sent: (collective, ranks of its group) → bytes of its larger side. tokens: that all ranks together train on.
    micro_tokens: of a micro-batch on this rank. chunk: positions whose logits the loss holds at once. signal: bytes of a
    micro-batch's signal, and whether it comes from elsewhere.
    """

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

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.peak.values())


def simulate(config: DistillConfig, devices: int, device: str = "cuda") -> dict[str, Step]:
    """A step of ``config`` on ``devices`` of the kind ``device``, by group: the student's, and the teacher's if it is apart.

    A micro-batch is as full as it can be: every row has ``sequence_length`` tokens, all supervised. Raises LimbeckError for a
    layout that cannot run, and for what is not known in sizes alone.
    """
    _refuse_the_unknown(config)
    again = recompute(config, World(0, 1, torch.device(device)))
    args = config.student.model_args.model_copy(update={"disable_gradient_checkpointing": not again})
    config = config.model_copy(update={"student": config.student.model_copy(update={"model_args": args})})
    ours = _devices(config.device_mapping, devices, "student")
    refuse_layout(config, len(ours), device)
    kind = torch.device(device)
    try:
        if not config.needs_worker_groups:
            both = "student and teacher" if config.has_teacher else "student"
            return {both: _student_step(config, ours, kind, teacher_here=True)}
        groups = {"student": _student_step(config, ours, kind, teacher_here=False)}
        if config.teacher.service is None:
            theirs = _devices(config.teacher.device_mapping, devices, "teacher")
            groups["teacher"] = _teacher_step(config, theirs, len(ours))
        return groups
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise LimbeckError(
            f"one of the models decides by values what it computes ({error}), so its step cannot be planned without weights."
        ) from error


def _refuse_the_unknown(config: DistillConfig) -> None:
    for role, worker in (("student", config.student), ("teacher", config.teacher)):
        name = worker.strategy_args.strategy_name or ""
        if name.startswith("deepspeed") and (role == "student" or config.has_teacher):
            other = "fsdp2_train" if role == "student" else "fsdp2_infer"
            raise LimbeckError(
                f"{role}.strategy_args.strategy_name = {name}: limbeck plan does not know what DeepSpeed holds; "
                f"plan with {other}."
            )
        stages = layout_of(worker).pipeline
        if stages > 1:
            raise LimbeckError(
                f"{role}.strategy_args.strategy_config.pipeline_model_parallel_size = {stages}: limbeck plan does not know "
                "stages, which hold different parts; plan with 1."
            )
    if config.needs_worker_groups and config.teacher_signal != "hidden_states":
        raise LimbeckError(
            f"limbeck plan knows teachers apart that send hidden states, and this one sends {config.teacher_signal}; plan with "
            "teacher.signal=hidden_states."
        )
    if config.cross_tokenizer != "off":
        raise LimbeckError(
            "limbeck plan does not know what cross_tokenizer holds in memory; plan with cross_tokenizer=off."
        )
    if config.objective_faults:
        raise LimbeckError("limbeck plan does not know what objective_faults hold in memory; plan without them.")


def _devices(mapping: Sequence[int] | None, devices: int, role: str) -> tuple[int, ...]:
    if mapping is None:
        return tuple(range(devices))
    if max(mapping) >= devices:
        raise LimbeckError(
            f"{role}.device_mapping names device {max(mapping)}, but --nodes × --gpus-per-node makes {devices} devices, "
            f"numbered 0 to {devices - 1}; plan with more, or name others."
        )
    return tuple(mapping)


@contextmanager
def _ranks(count: int) -> Iterator[World]:
    """Rank 0 of ``count`` processes that do not exist, with tensors that have no numbers; whatever is sent arrives at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise LimbeckError("limbeck plan needs a process of its own: this one already belongs to a process group.")
    if count > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        with (
            # Whether a row holds several documents is read from its positions; here each holds one.
            patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None),
            # FSDP2 joins meshes and reads the numbers in them.
            patch.object(DeviceMesh, "__init__", unset_fake_temporarily()(DeviceMesh.__init__)),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            yield World(0, count, torch.device("cpu"))
    finally:
        mesh_of.cache_clear()
        if count > 1:
            dist.destroy_process_group()


class _FirstChunks(TorchFunctionMode):
    """``torch.chunk`` gives the first chunk in every place: FSDP2 cuts each parameter for all ranks and looks at rank 0's, and
    a thousand fake tensors for each would take minutes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.chunk:
            return func(*args, **(kwargs or {}))
        tensor, chunks = args
        dim = (kwargs or {}).get("dim", 0)
        width = min(tensor.shape[dim], -(-tensor.shape[dim] // chunks))
        return [tensor.narrow(dim, 0, width)] * chunks


def _student_step(config: DistillConfig, devices: tuple[int, ...], kind: torch.device, *, teacher_here: bool) -> Step:
    batch, micro_batches = _full_batch(config)
    tracker, fused = Tracker(), FusedSizes(kind)
    asked, own = batch.stretch(0, layout_of(config.student).context)
    with _ranks(len(devices)) as world:
        world = arrange(config, world, teacher_here=teacher_here)
        teacher: Teacher | None = None
        head: OutputHead | None = None
        if config.has_teacher:
            teacher, head = _teacher(config, world) if teacher_here else _elsewhere(config)
        args = config.student.model_args
        # Float32 but for a LoRA base, as in ``make_student``.
        model = _load(config, args, DTYPES[args.dtype] if args.lora_target else torch.float32, "student")
        size, vocab = _size(model), output_head(model).weight.shape[0]
        if teacher is not None:
            vocab = min(vocab, teacher.vocab_size)
        check_tensor_parallel(body(model), layout_of(config.student), str(args.model_name_or_path), "student")
        wanted = wanted_of(config, vocab)
        objective, _ = make_objective(config, world.device)
        compiled = config.compile_loss is not False
        with _FirstChunks():
            student = spread_student(config, world, model, objective, vocab, teacher, compiled=compiled, proven=False)
        student.fused = partial(_tagged, tracker, fused)
        engine = make_engine(config, world, student)
        distils = config.distill_loss_weight > 0 or student.features is not None
        flops, held = Counter[str](), 0

        def micro_batch() -> None:
            nonlocal held
            before = tracker.flops
            with tracker.tagged("signal"):
                signal = teacher.ask(asked, wanted)(asked) if teacher is not None and distils else None
            flops["teacher"] = tracker.flops - before
            with tracker.tagged("activations"):
                loss = engine(own, signal, 1.0, 1.0, micro_batches).loss
                held = tracker.live["activations"]
                engine.backward(loss, last=True)
            flops["student"] = tracker.flops - before - flops["teacher"]
            tracker.add(_gradients(student), "gradients")

        def step() -> None:
            student.finish_gradients()
            engine.step()

        with tracker:
            tracker.add([*student.parameters(), *student.buffers()], "parameters")
            if isinstance(teacher, LocalTeacher):
                tracker.add([*teacher.body.parameters(), *teacher.body.buffers()], "teacher")
            if head is not None:
                tracker.add([head.weight], "teacher")
            micro_batch()
            step()  # makes the optimizer's state, which later steps begin with
            tracker.add(_state(engine.optimizer), "optimizer")
            tracker.reset()
            fused.flops = fused.moved = 0
            micro_batch()
            flops["loss"], moved, sent = fused.flops, fused.moved, tracker.sent.copy()
            if micro_batches > 1:  # now with the gradients of the first; further ones add nothing
                micro_batch()
            step()
        signal_bytes = 0
        if head is not None and distils:
            signal_bytes = len(asked.supervised) * head.weight.shape[1] * head.weight.itemsize
        return Step(
            devices=devices,
            parameters={"student": size, **({} if teacher is None else {"teacher": teacher.num_parameters})},
            peak=dict(+tracker.peak),
            most=dict(+tracker.most),
            activations=held,
            recomputed=recompute(config, world),
            flops={name: count * micro_batches for name, count in flops.items()},
            moved=moved * micro_batches,
            sent={key: size * micro_batches for key, size in sent.items()},
            tokens=batch.num_tokens * micro_batches * world.data_size,
            micro_batches=micro_batches,
            micro_tokens=own.input_ids.numel(),
            chunk=fused.chunk,
            signal=signal_bytes,
            signal_travels=not teacher_here and signal_bytes > 0,
        )


def _teacher_step(config: DistillConfig, devices: tuple[int, ...], students: int) -> Step:
    """A step of a teacher's group of its own, which ``students`` ranks ask: of those with the same rows, one."""
    asked, micro_batches = _full_batch(config)
    layout, askers = layout_of(config.teacher), students // layout_of(config.student).together
    tracker, ranks = Tracker(), len(devices)
    with _ranks(ranks) as world:
        layout.check(world, "teacher")
        teacher, _ = _teacher(config, world)
        with tracker, tracker.tagged("signal"):
            tracker.add([*teacher.body.parameters(), *teacher.body.buffers(), teacher.head.weight], "teacher")
            teacher.hidden(Question.of(asked))
            tracker.reset()
            hidden = teacher.hidden(Question.of(asked))
        # Ranks that run each pass together are asked equally often; whole copies are shared out.
        in_step = ranks > 1 and not (config.teacher.strategy_args.strategy_name == "hf_infer" and layout.together == 1)
        rounds = -(-askers // ranks) if in_step or ranks < askers else askers / ranks
        calls = micro_batches * rounds
        return Step(
            devices=devices,
            parameters={"teacher": teacher.num_parameters},
            peak=dict(+tracker.peak),
            most=dict(+tracker.most),
            flops={"teacher": int(tracker.flops * calls)},
            sent={key: int(size * calls) for key, size in tracker.sent.items()},
            tokens=asked.num_tokens * micro_batches * askers,
            micro_batches=micro_batches,
            micro_tokens=asked.input_ids.numel(),
            signal=hidden.numel() * hidden.itemsize,
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
    name = str(config.teacher.model_args.model_name_or_path)
    check_tensor_parallel(body(model), layout_of(config.teacher), name, "teacher")
    with _FirstChunks():
        teacher = spread_teacher(config, world, model, proven=False)
    if isinstance(teacher, TogetherTeacher):
        teacher._tell = lambda owner, own: own  # type: ignore[method-assign]  # all ranks ask about equally much
    return teacher, teacher.head


def _elsewhere(config: DistillConfig) -> tuple[RemoteTeacher, OutputHead]:
    """A teacher in other processes: its head is here, and hidden states come."""
    model = _load_teacher(config)
    head = output_head(model)
    head = replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())

    class Wire:
        def ask(self, question: Question | None) -> Callable[[], Reply]:
            count = 0 if question is None else len(question.supervised)
            return lambda: Reply((head.weight.new_empty(count, head.weight.shape[1]),), 0.0)

    return RemoteTeacher([Wire()], Route((0,)), len(head.weight), _size(model), head), head


def _tagged(tracker: Tracker, fused: FusedSizes, *args: Any, **kwargs: Any) -> Any:
    with tracker.tagged("loss"):
        return fused(*args, **kwargs)


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _gradients(module: torch.nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def _state(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
