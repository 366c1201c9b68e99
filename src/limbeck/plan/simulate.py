"""One rank's training step, taken with sizes instead of numbers.

The models are the real ones, spread by the real strategy over a process group that sends nothing; every tensor is PyTorch's
fake tensor, which has a shape, a dtype and no memory. Only the loss is a stand-in: its buffers are made as the real one makes
them, and the arithmetic on them, which holds nothing, is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.distributed.tensor import DTensor

from limbeck.config import DistillConfig
from limbeck.config.schema import ModelArgs
from limbeck.data.batch import Batch
from limbeck.errors import LimbeckError
from limbeck.models import (
    check_length,
    decoder_layers,
    keep_activations,
    load_model,
    output_head,
    recompute_activations,
)
from limbeck.objectives import DistillationLoss, Objective, chunk_shape
from limbeck.pipeline.features import make_features
from limbeck.pipeline.optimizer import make_optimizer
from limbeck.pipeline.parts import (
    DTYPES,
    adapt,
    fsdp2_options,
    make_objective,
    recompute,
    spread_teacher,
)
from limbeck.pipeline.student import StudentWithLoss
from limbeck.plan.tracker import Tracker
from limbeck.strategies.fsdp2 import shard
from limbeck.strategies.world import World
from limbeck.teachers import LocalTeacher, Signal

# A CPU's elementwise pass goes in tiles of so many elements and has some three float32 temporaries of a tile at once.
_TILE_ELEMENTS, _TILE_COPIES = 1 << 19, 3


@dataclass(frozen=True)
class Simulation:
    """What rank 0, whose shards are the largest, holds (bytes), computes (FLOPs) and sends in one step.

    peak: bytes by name at the fullest moment; they add up. persistent: parameters, gradients and optimizer, whole step.
    activations: kept between the student's forward and backward pass of a micro-batch, by whether they are recomputed.
    total_kept, total_recomputed: the peak in either case. flops: of all micro-batches, by name. sent: (collective, ranks of
    its group) to the bytes of the gathered tensor. tokens: of a micro-batch. chunk_rows: of the loss. signal_bytes: a
    micro-batch's signal.
    """

    ranks: int
    recomputed: bool
    student_parameters: int
    teacher_parameters: int
    persistent: dict[str, int]
    peak: dict[str, int]
    activations: dict[bool, int]
    totals: dict[bool, int]
    flops: dict[str, int]
    logits: int
    logit_bytes: int
    sent: dict[tuple[str, tuple[int, ...]], int]
    rows: int
    tokens: int
    micro_batches: int
    chunk_rows: int
    signal_bytes: int
    updated: int

    @property
    def total(self) -> int:
        """The fullest moment."""
        return self.totals[self.recomputed]


@contextmanager
def fake_world(ranks: int) -> Iterator[World]:
    """Rank 0 of ``ranks`` processes that do not exist; whatever is sent arrives at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise LimbeckError("limbeck plan needs a process of its own: this one already belongs to a process group.")
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield World(0, ranks, torch.device("cpu"))
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def simulate(config: DistillConfig, ranks: int, device: str = "cuda") -> Simulation:
    """A step of ``config`` on ``ranks`` processes, each with a ``device`` of its own.

    A micro-batch is as full as it can be: ``per_device_train_batch_size`` rows of ``sequence_length`` tokens, all supervised.
    Raises LimbeckError for a layout that cannot be, and for models that decide by values what they compute.
    """
    if config.needs_worker_groups:
        raise LimbeckError(
            "limbeck plan lays student and teacher over the same devices, and teacher.device_mapping differs from the "
            "student's; plan with 'teacher.device_mapping=null'."
        )
    if config.cross_tokenizer != "off":
        raise LimbeckError(
            "limbeck plan does not know what cross_tokenizer holds in memory; plan with cross_tokenizer=off."
        )
    if DTYPES[config.student.model_args.dtype] is torch.float16 and ranks > 1:
        raise LimbeckError("student.model_args.dtype = fp16 does not train on several ranks here; use bf16.")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_world(ranks) as world:
        try:
            return _Simulated(config, world, mode, torch.device(device)).run()
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
            raise LimbeckError(
                f"this model decides by values what it computes ({error}), so its step cannot be planned without weights."
            ) from error


class _Simulated:
    def __init__(self, config: DistillConfig, world: World, mode: FakeTensorMode, device: torch.device) -> None:
        self.config, self.world, self.mode, self.device = config, world, mode, device
        self.recomputed = recompute(config, replace(world, device=device))
        args = config.student.model_args
        self.dtype = DTYPES[args.dtype]
        self.tracker = Tracker()
        # A process group's mesh has numbers that are read, so spreading goes on outside of the mode.
        self.teacher: LocalTeacher | None = None
        if config.has_teacher:
            dtype = fsdp2_options(config.teacher, DTYPES[config.teacher.model_args.dtype]).param_dtype
            teacher = self._load(config.teacher.model_args, dtype or torch.float32, "teacher")
            self.teacher = spread_teacher(config, teacher, world)
            self.teacher_bytes = [
                *self.teacher.body.parameters(),
                *self.teacher.body.buffers(),
                self.teacher.head.weight,
            ]
        model = self._load(args, self.dtype if args.lora_target else torch.float32, "student")
        self.size = sum(parameter.numel() for parameter in model.parameters())
        with mode:
            self.model = adapt(config, model, recomputed=self.recomputed)
            vocab = output_head(self.model).weight.shape[0]
            if self.teacher is not None:
                vocab = min(vocab, self.teacher.head.weight.shape[0])
            features = make_features(config, self.model, self.teacher)
            objective, _ = make_objective(config, torch.device("cpu"))
            student = _Sized(self.model, objective, vocab, features, config.loss_balance, False)
            student.target, student.tracker = device, self.tracker
        self.options = fsdp2_options(config.student, self.dtype)
        self.student = shard(student.train(), decoder_layers(self.model), world, self.options)

    def _load(self, args: ModelArgs, dtype: torch.dtype, role: str) -> Any:
        # A kernel for GPUs need not be installed where a plan is made; all of them hold what SDPA holds.
        attention = "eager" if args.attn_implementation == "eager" else "sdpa"
        with self.mode:
            model = load_model(
                args.model_name_or_path,
                dtype=dtype,
                attn_implementation=attention,
                from_scratch=True,
                config_kwargs=args.model_config_kwargs,
                revision=args.revision,
                trust_remote_code=args.trust_remote_code,
                role=role,
            )
        check_length(model, str(args.model_name_or_path or f"the {role}"), self.config.sequence_length)
        return model

    def run(self) -> Simulation:
        config, tracker, student = self.config, self.tracker, self.student
        micro_batches = config.student.training_args.gradient_accumulation_steps
        rows = config.student.training_args.per_device_train_batch_size
        if config.max_tokens_per_microbatch:
            rows = max(1, config.max_tokens_per_microbatch // config.sequence_length)
        with self.mode:
            optimizer = self._optimizer()
            batch = _full_batch(rows, config.sequence_length)
            with tracker:
                tracker.add(student.parameters(), "parameters")
                tracker.add(student.buffers(), "parameters")
                tracker.add(_tensors(optimizer.state.values()), "optimizer")
                if self.teacher is not None:
                    tracker.add(self.teacher_bytes, "teacher")
                tracker.reset_peak()
                held, flops = self._micro_batch(batch)
                gradients = [p.grad for p in student.parameters() if p.grad is not None]
                tracker.add(gradients, "gradients")
                if micro_batches > 1:  # now with the gradients of the first
                    self._micro_batch(batch)
                peak = dict(tracker.peak)
                persistent = {
                    "parameters": tracker.live["parameters"],
                    "gradients": tracker.live["gradients"],
                    "optimizer": tracker.live["optimizer"],
                }
                activations = {self.recomputed: held}
                totals = {self.recomputed: sum(peak.values())}
                if self.recomputed:
                    keep_activations(self.model)
                else:
                    recompute_activations(self.model)
                if micro_batches == 1:
                    optimizer.zero_grad(set_to_none=True)
                    del gradients
                tracker.reset_peak()
                tracker.sent.clear()  # a teacher's root is gathered once and stays so
                activations[not self.recomputed], _ = self._micro_batch(batch)
                totals[not self.recomputed] = sum(tracker.peak.values())
        head = student.head_shape
        tokens = rows * config.sequence_length
        products = 2 * tokens * student.vocab_size
        flops["loss"] = products * (head.hidden * (3 if head.trained else 2) + head.teacher_hidden)
        distils = config.distill_loss_weight > 0 and self.teacher is not None
        return Simulation(
            ranks=self.world.size,
            recomputed=self.recomputed,
            student_parameters=self.size,
            teacher_parameters=self.teacher.num_parameters if self.teacher is not None else 0,
            persistent=persistent,
            peak={name: size for name, size in peak.items() if size},
            activations=activations,
            totals=totals,
            flops={name: count * micro_batches for name, count in flops.items()},
            logits=tokens * student.vocab_size * micro_batches,
            # An elementwise pass reads the student's and the teacher's logits and writes the gradient over the student's.
            logit_bytes=2 * head.itemsize + head.teacher_itemsize,
            sent={key: size * micro_batches for key, size in tracker.sent.items()},
            rows=rows,
            tokens=tokens,
            micro_batches=micro_batches,
            chunk_rows=head.chunk,
            signal_bytes=tokens * head.teacher_hidden * head.teacher_itemsize if distils else 0,
            updated=persistent["gradients"] // 4,
        )

    def _optimizer(self) -> torch.optim.Optimizer:
        """With the state that it has after its first step."""
        optimizer = make_optimizer(self.student, self.config.student.training_args)
        for parameter in self.student.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return optimizer

    def _micro_batch(self, batch: Batch) -> tuple[int, dict[str, int]]:
        """Activations that wait for the backward pass, and FLOPs of teacher and student."""
        tracker, signal, flops = self.tracker, None, {}
        start = tracker.flops
        if self.teacher is not None and (self.config.distill_loss_weight > 0 or self.student.features is not None):
            with tracker.tagged("teacher's pass"):
                signal = self.teacher.signals(batch)
        flops["teacher"], start = tracker.flops - start, tracker.flops
        # Several ranks compute in FSDP's param_dtype; one alone in autocast, over the same float32 masters.
        alone = self.world.size == 1 and self.options.param_dtype is not None
        computed = torch.autocast("cpu", self.options.param_dtype) if alone else nullcontext()
        with tracker.tagged("activations"):
            with computed:
                loss = self.student(batch, signal, 1.0, 1.0).loss
            held = tracker.live["activations"]
            loss.backward()
        flops["student"] = tracker.flops - start
        return held, flops


@dataclass(frozen=True)
class _Head:
    hidden: int
    itemsize: int
    trained: bool
    teacher_hidden: int
    teacher_itemsize: int
    chunk: int


class _Sized(StudentWithLoss):
    """The student with a loss that only makes its buffers."""

    target: torch.device
    tracker: Tracker
    head_shape: _Head

    def _of_logits(
        self, objective: Objective, rows: Tensor, batch: Batch, signal: Signal | None, normalizer: float | Tensor
    ) -> DistillationLoss:
        weight = output_head(self.model).weight
        computed = torch.promote_types(rows.dtype, weight.dtype)
        if torch.is_autocast_enabled("cpu"):
            computed = torch.get_autocast_dtype("cpu")
        teacher = None if signal is None else signal.head.weight
        chunk, sums = chunk_shape(
            self.target, len(rows), self.vocab_size, computed, weight.dtype, None if teacher is None else teacher.dtype
        )
        self.head_shape = _Head(
            rows.shape[1],
            computed.itemsize,
            weight.requires_grad,
            0 if teacher is None else teacher.shape[1],
            0 if teacher is None else teacher.dtype.itemsize,
            chunk,
        )
        with self.tracker.tagged("loss"):
            tile = min(_TILE_ELEMENTS, chunk * self.vocab_size) * _TILE_COPIES if self.target.type == "cpu" else 0
            loss = _Buffers.apply(rows, weight, teacher, self.vocab_size, chunk, computed, sums, tile)
        return DistillationLoss(loss, *(loss.detach() for _ in range(7)))


class _Buffers(torch.autograd.Function):
    """What ``objectives.fused`` holds: both logits of a chunk, the gradients of hidden states and head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher: Tensor | None,
        vocab: int,
        chunk: int,
        computed: torch.dtype,
        sums: torch.dtype,
        tile: int,
    ) -> Tensor:
        products = weight[:vocab].to(computed)
        buffers = [hidden.new_empty(chunk, vocab, dtype=computed), hidden.new_empty(tile, dtype=torch.float32)]
        if teacher is not None:
            buffers.append(hidden.new_empty(chunk, vocab, dtype=teacher.dtype))
        needs = ctx.needs_input_grad
        d_hidden = torch.zeros_like(hidden, dtype=sums) if needs[0] else None
        d_weight = torch.zeros_like(weight, dtype=sums) if needs[1] else None
        buffers.append(hidden.new_empty(chunk, hidden.shape[1], dtype=sums))
        ctx.save_for_backward(hidden, weight)
        ctx.grads = d_hidden, d_weight
        del products, buffers
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        cast: list[Tensor | None] = []
        for grad, like in zip(grads, ctx.saved_tensors, strict=True):
            if grad is None or like.dtype.itemsize >= grad.element_size():
                cast.append(None if grad is None else grad.to(like.dtype))
            else:  # written over the sums, which live on
                cast.append(grad.view(-1).view(like.dtype)[: grad.numel()].view(grad.shape))
        return (*cast, None, None, None, None, None, None)


def _full_batch(rows: int, length: int) -> Batch:
    ids = torch.zeros(rows, length, dtype=torch.long)
    return Batch(ids, ids.clone(), None, rows * length, torch.arange(rows * length))


def _tensors(states: Iterable[dict[str, Any]]) -> list[Tensor]:
    found = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return [value.to_local() if isinstance(value, DTensor) else value for value in found]
