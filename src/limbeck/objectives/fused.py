"""The output head and the loss in one pass: hidden states of both models in, loss and gradients out, logits never stored whole.

The supervised positions are walked in chunks. A chunk's logits are one matrix product into a buffer that is made once; the
gradient is written over them (``rows``); two more matrix products leave it behind for the hidden states and the head. Peak
memory is one chunk, whatever the number of tokens. Inside a chunk the elementwise work goes in tiles that stay in the
processor's cache.

    loss = [ (1 − w) Σ u CE  +  w Σ u D(p, q) ] / normalizer    p = softmax(z_t / τ_t),  q = softmax(z_s / τ_s)

u is a position's weight, 1 unless given. Cross-entropy is that of the untempered student. Nothing here knows a model, a batch
or a teacher's whereabouts.

Shapes: N positions, V vocabulary, H hidden size (student's and teacher's may differ), C rows of a chunk.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.errors import LimbeckError
from limbeck.objectives.checks import (
    IGNORE,
    check_rows,
    check_signal,
    check_tokens,
    check_topk,
    check_width,
    columns_given,
)
from limbeck.objectives.chunks import (
    add_product,
    compute_dtype,
    default_chunk,
    head_product,
    keep_freed_tiles,
    make_buffer,
    narrowed,
    rescale,
    shared_bias,
    tile_rows,
)
from limbeck.objectives.divergences import LOWEST, DivergenceFn, formulas
from limbeck.objectives.elementwise import STATS, Rows, Spec, elementwise_pass
from limbeck.objectives.kernels import kernel_pass
from limbeck.objectives.payloads import TAILS, Logits, Sampled, Signal, TopK
from limbeck.objectives.sampled import ESTIMATORS
from limbeck.objectives.vocab_parallel import NO_SHARDING, VocabParallel, VocabReducer

_NARROW_CHUNKS = {"cuda": 8}  # up to so many bfloat16 chunks are summed in bfloat16; see _sums_dtype
_WORTH_COMPILING = 1 << 24  # logits in a call; below, a compilation of seconds is not repaid soon


@dataclass(frozen=True)
class OutputHead:
    """What turns a hidden state into logits: ``softcap · tanh(scale · (h Wᵀ + b) / softcap)``.

    weight: [V, H]; rows beyond the shared vocabulary (padding) may be there and are never computed.
    bias: [V] or None. softcap: Gemma's final soft-cap or None. scale: Cohere's and Granite's logit scale.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise LimbeckError(f"softcap must be above 0, or None where there is none; got {self.softcap}.")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise LimbeckError(
                f"an output head's bias is [V], one number for each row of its weight [V, H]; got {list(self.bias.shape)} "
                f"beside {list(self.weight.shape)}."
            )


@dataclass(frozen=True)
class Objective:
    """What is minimised, in numbers: see the module's formula.

    kd_weight w in [0, 1]; terms: the divergence's two formulas (or an estimator's, ``sampled``); temperature τ_s;
    teacher_temperature τ_t; squared: multiply the divergence by τ_s²; topk: 0 for the whole vocabulary, else the divergence
    sees the teacher's k most likely tokens and what ``tail`` (one of ``TAILS``) makes of the rest.
    """

    terms: DivergenceFn
    kd_weight: float = 0.5
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    squared: bool = False
    topk: int = 0
    tail: str = "renormalize"
    sampled: bool = False

    @classmethod
    def of(
        cls,
        name: str = "forward_kl",
        *,
        kd_weight: float = 0.5,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        squared: bool = False,
        topk: int = 0,
        tail: str = "renormalize",
        parameters: Mapping[str, Any] | None = None,
    ) -> Objective:
        """The objective with the divergence called ``name``, given its ``parameters``; unset, τ_t = τ_s.

        k1, k2 and k3 name the estimators of the reverse KL on tokens that the student has drawn. Raises LimbeckError for
        impossible numbers.
        """
        tau_t = temperature if teacher_temperature is None else teacher_temperature
        for key, number in {"kd_weight": kd_weight, "temperature": temperature, "teacher_temperature": tau_t}.items():
            if not isinstance(number, int | float):
                raise LimbeckError(f"{key} must be a number, got {number!r}.")
        if not 0 <= kd_weight <= 1:
            raise LimbeckError(f"kd_weight must be in [0, 1], got {kd_weight}.")
        if not (temperature > 0 and tau_t > 0):
            raise LimbeckError(f"temperatures must be above 0, got {temperature} (student) and {tau_t} (teacher).")
        if not isinstance(topk, int) or topk < 0:
            raise LimbeckError(f"logits_topk must be 0 (the whole vocabulary) or more, got {topk}.")
        if tail not in TAILS:
            raise LimbeckError(f"there is no tail called {tail!r}; use one of {', '.join(TAILS)}.")
        sampled = name in ESTIMATORS
        if sampled and topk:
            raise LimbeckError(
                f"{name} looks at the drawn token alone, so logits_topk = {topk} has no meaning; set it to 0."
            )
        terms = ESTIMATORS[name] if sampled else formulas(name, **(parameters or {}))
        return cls(terms, kd_weight, temperature, tau_t, squared, topk, tail, sampled)


class DistillationLoss(NamedTuple):
    """``loss`` backpropagates; the rest are detached scalars on the device, each a weighted sum over supervised tokens ÷
    normalizer.

    kd: the divergence; ce: cross-entropy; entropies in nats of q and p as the divergence sees them; top1_agreement: share of
    positions where both models' most likely token is the same; topk_mass: the teacher's probability of its k tokens;
    topk_overlap: the share of these among the student's own k. Without a teacher, or without top-k, the respective are 0.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor
    topk_mass: Tensor
    topk_overlap: Tensor


@torch.compiler.disable
def fused_linear_distillation(
    student_hidden: Tensor,
    student_head: Tensor | OutputHead,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | OutputHead | None,
    labels: Tensor,
    *,
    objective: str | Objective = "forward_kl",
    kd_weight: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    teacher: Signal | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
    all_supervised: bool = False,
    across: VocabReducer | None = None,
    compiled: bool | None = None,
) -> DistillationLoss:
    """Cross-entropy and distillation from the last hidden states, without ever holding [N, V] logits.

    student_hidden [N, Hs], student_head [V, Hs], teacher_hidden [N, Ht], teacher_head [V', Ht], labels [N] with −100 where
    nothing is learned. labels[i] is the token that position i must predict: shift before calling. Heads are weight matrices
    or ``OutputHead`` when there is a bias, soft-cap or scale. Both teacher arguments may be None when kd_weight is 0, or
    when ``teacher`` is a ``TopK``, ``Logits`` or ``Sampled`` signal, each with N rows.

    objective: a divergence's name, or an ``Objective`` (then kd_weight and the temperatures are taken from it).
    vocab_size: the shared vocabulary; default the smaller head. Rows beyond it do not exist for the loss.
    weights: [N], what multiplies each position's loss; default 1.
    normalizer: what the sums are divided by; default the summed weight of the supervised positions.
    all_supervised: the caller's word that no label is −100, which saves a GPU from counting them.
    chunk_size: positions per chunk; default as many as fit in 124 MiB of logits on a CPU (1024 if these
    fit in 256 MiB), 1 GiB on a GPU.
    across: ``VocabParallel`` when each rank of a group gives its own rows of both heads; hidden states and labels are then
    the same on all ranks, and so is the result.
    compiled: whether the elementwise work is compiled (on a GPU: a Triton kernel where there is one, see ``kernels``);
    default, when there is a compiler and enough to do. Results differ by rounding only.

    Raises LimbeckError, before anything is computed, for shapes that do not belong together, a signal that the objective cannot
    use, and (on a CPU) labels outside the vocabulary.

    Half-precision inputs are multiplied in half precision and everything else is float32; float64 stays float64. On a GPU
    the few chunks of a bfloat16 head leave their gradient in bfloat16, rounded once a chunk. Gradients
    reach student_hidden and the student's head (weight and bias) when they require them; none is formed otherwise.
    """
    if not isinstance(objective, Objective):
        objective = Objective.of(
            objective, kd_weight=kd_weight, temperature=temperature, teacher_temperature=teacher_temperature
        )
    for role, head in (("student", student_head), ("teacher", teacher_head)):
        if not isinstance(head, Tensor | OutputHead | None):
            raise LimbeckError(
                f"{role}_head must be a weight matrix [V, H] or an OutputHead, got {type(head).__name__}; of a layer give "
                "OutputHead(layer.weight, layer.bias)."
            )
    check_rows(student_hidden, teacher_hidden, teacher, labels, weights)
    if chunk_size is not None and chunk_size < 1:
        raise LimbeckError(f"chunk_size must be 1 or more positions, got {chunk_size}; leave it out to have it chosen.")
    student = student_head if isinstance(student_head, OutputHead) else OutputHead(student_head)
    asked = None
    if teacher is not None:
        check_signal(teacher, objective, teacher_hidden)
    elif teacher_head is not None and teacher_hidden is not None:
        asked = teacher_head if isinstance(teacher_head, OutputHead) else OutputHead(teacher_head)
    elif objective.kd_weight > 0:
        raise LimbeckError(
            "kd_weight is above 0 but there is no teacher; give teacher_hidden and teacher_head, or kd_weight=0."
        )
    check_width("student", student_hidden, student)
    if asked is not None and teacher_hidden is not None:
        check_width("teacher", teacher_hidden, asked)
    widest = student.weight.shape[0]
    if asked is not None:
        widest = min(widest, asked.weight.shape[0])
    elif isinstance(teacher, Logits):
        widest = min(widest, teacher.logits.shape[-1])
    if isinstance(across, VocabParallel):
        across.check(vocab_size, student=student.weight.shape[0], teacher=columns_given(asked, teacher))
        vocab_size = across.size
    vocab = widest if vocab_size is None else vocab_size
    if not 0 < vocab <= widest:
        raise LimbeckError(
            f"vocab_size={vocab_size} is not between 1 and the {widest} rows of the smaller output head."
        )

    dtype = compute_dtype(student_hidden, student.weight)
    everything = torch.arange(labels.numel(), device=labels.device)
    rows = everything if all_supervised else everything[labels != IGNORE]
    if labels.device.type == "cpu":  # on a GPU it would be a sync
        whole = across.vocab_size if isinstance(across, VocabParallel) else vocab
        check_tokens("labels", labels[rows], whole)
        if isinstance(teacher, TopK):
            check_topk(teacher.log_probs[rows], teacher.indices[rows], whole)
    if normalizer is not None and not isinstance(normalizer, Tensor) and not normalizer > 0:
        raise LimbeckError(f"normalizer must be above 0, got {normalizer}; or leave it out.")
    if normalizer is None:
        normalizer = (
            max(rows.numel(), 1)
            if weights is None
            else weights[rows].sum(dtype=torch.promote_types(weights.dtype, torch.float32)).clamp_min(1e-30)
        )
    job = _Job(
        objective,
        vocab,
        dtype,
        chunk_size,
        normalizer,
        torch.is_grad_enabled(),
        student.scale,
        student.softcap,
        asked,
        teacher,
        weights,
        across or NO_SHARDING,
        (across is None and _should_compile(rows.numel() * vocab)) if compiled is None else compiled,
        _lift(objective, student.scale, None if weights is None else weights[rows]) if dtype is torch.float16 else 1.0,
    )
    loss, stats = _HeadAndLoss.apply(student_hidden, student.weight, student.bias, teacher_hidden, labels, rows, job)
    return DistillationLoss(loss, *stats.unbind())


def _lift(objective: Objective, scale: float, weights: Tensor | None) -> float | Tensor:
    """A power of two that brings the largest coefficient of a row's gradient to about 1, which suits float16."""
    w, tau = objective.kd_weight, objective.temperature
    coefficient = abs(scale) * ((1 - w) + w * (tau if objective.squared else 1 / tau))
    if weights is None or weights.numel() == 0:
        return 2.0 ** max(0, math.floor(-math.log2(coefficient)))
    largest = (weights.float().abs().amax() * coefficient).clamp_min(1e-30)
    return torch.exp2((-largest.log2()).floor().clamp_min(0))


def _should_compile(logits: int) -> bool:
    return logits >= _WORTH_COMPILING and compiler_found()


@cache
def compiler_found() -> bool:
    """Whether the elementwise work can be compiled on this machine: LIMBECK_COMPILE=0 says no."""
    if os.environ.get("LIMBECK_COMPILE", "1") == "0":
        return False
    return torch.cuda.is_available() or any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))


@dataclass(frozen=True)
class _Job:
    objective: Objective
    vocab: int
    dtype: torch.dtype
    chunk_size: int | None
    normalizer: float | Tensor
    wants_grad: bool
    scale: float
    softcap: float | None
    teacher: OutputHead | None
    signal: Signal | None
    weights: Tensor | None
    across: VocabReducer
    compiled: bool
    lift: float | Tensor = 1.0

    @property
    def whole_vocab(self) -> int:
        """Columns of all ranks together."""
        return self.across.vocab_size if isinstance(self.across, VocabParallel) else self.vocab

    @property
    def inside(self) -> float | Tensor:
        """The part of 1/normalizer that goes into the logits' gradient: none in float16 but ``lift``, as it would underflow."""
        return self.lift if self.dtype is torch.float16 else 1.0 / self.normalizer

    @property
    def rest(self) -> float | Tensor:
        """The part of 1/normalizer that is left for the summed gradients."""
        return 1.0 / (self.normalizer * self.lift) if self.dtype is torch.float16 else 1.0

    @property
    def accumulate(self) -> torch.dtype:
        """The precision of everything but the products."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    def spec(self, wants_grad: bool) -> Spec:
        objective, teacher = self.objective, self.teacher
        return Spec(
            terms=objective.terms,
            sampled=objective.sampled,
            kd_weight=objective.kd_weight,
            temperature=objective.temperature,
            teacher_temperature=objective.teacher_temperature,
            squared=objective.squared,
            topk=objective.topk if objective.topk < self.whole_vocab else 0,
            tail=objective.tail,
            scale=self.scale,
            softcap=self.softcap,
            teacher_scale=1.0 if teacher is None else teacher.scale,
            teacher_softcap=None if teacher is None else teacher.softcap,
            wants_grad=wants_grad,
            dtype=self.accumulate,
            retempered=objective.teacher_temperature / self.signal.temperature
            if isinstance(self.signal, TopK)
            else 1.0,
        )


class _HeadAndLoss(torch.autograd.Function):
    """Gradients are formed in the forward pass, where the logits are, and handed over by the first backward.

    A further backward (``retain_graph=True``) forms them again rather than keep a second copy of the head's size alive.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor | None,
        labels: Tensor,
        rows: Tensor,
        job: _Job,
    ) -> tuple[Tensor, Tensor]:
        needs = tuple(job.wants_grad and need for need in ctx.needs_input_grad[:3])
        loss, stats, grads = _walk(hidden, weight, bias, teacher_hidden, labels, rows, job, needs)
        ctx.save_for_backward(hidden, weight, bias, teacher_hidden, labels, rows)
        ctx.job, ctx.needs, ctx.grads = job, needs, grads
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = outputs[0] * ctx.job.rest
        grads, ctx.grads = ctx.grads, None
        hidden, weight, bias, teacher_hidden, labels, rows = ctx.saved_tensors
        if grads is None:
            grads = _walk(hidden, weight, bias, teacher_hidden, labels, rows, ctx.job, ctx.needs)[2]
        # On a CPU reading the scale costs nothing and saves a pass over the head's gradient; on a GPU it would be a sync.
        if scale.device.type != "cpu" or scale.item() != 1.0:
            for grad in grads:
                if grad is not None:
                    rescale(grad, scale)
        cast = [
            None if g is None else narrowed(g, like.dtype)
            for g, like in zip(grads, (hidden, weight, bias), strict=True)
        ]
        return (*cast, None, None, None, None)


def _walk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    job: _Job,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Loss, diagnostics, and the gradients (``job.inside`` of them) for hidden, weight and bias where ``needs`` says so."""
    device, vocab, count, accumulate = hidden.device, job.vocab, rows.numel(), job.accumulate
    w_s = weight[:vocab].to(job.dtype)
    b_s = shared_bias(bias, vocab, accumulate)
    # A teacher far larger than the student keeps the precision that it was loaded in.
    w_t = None if job.teacher is None else job.teacher.weight[:vocab]
    b_t = None if job.teacher is None else shared_bias(job.teacher.bias, vocab, accumulate)

    if device.type == "cpu":
        keep_freed_tiles()
    chunk = job.chunk_size or default_chunk(device, vocab, count, w_s, w_t)
    chunk = max(1, min(chunk, count))
    z_s = make_buffer(chunk, vocab, job.dtype, device)
    z_t = None if w_t is None else make_buffer(chunk, vocab, w_t.dtype, device)
    tile = tile_rows(job.compiled, z_s, z_t, device)
    spec = job.spec(any(needs))
    run, fast = elementwise_pass(spec, job.across), None
    if job.compiled:
        kernel = None if isinstance(job.signal, TopK | Sampled) else kernel_pass(spec, job.across, device)
        fast = kernel or _Compiled(spec, job.across)
        tile = tile if kernel is None else chunk

    sums = _sums_dtype(job, weight, -(-count // chunk), device)
    d_hidden = torch.zeros(hidden.shape, dtype=sums, device=device) if needs[0] else None
    d_weight = torch.zeros(weight.shape, dtype=sums, device=device) if needs[1] else None
    d_bias = torch.zeros(weight.shape[0], dtype=accumulate, device=device) if needs[2] else None
    stats = torch.zeros(len(STATS), dtype=accumulate, device=device)
    factor = torch.as_tensor(job.inside, dtype=accumulate, device=device)

    for start in range(0, count, chunk):
        index = rows[start : start + chunk]
        n, target = index.numel(), labels[index]
        h_s = hidden[index].to(job.dtype)
        zs = head_product(h_s, w_s, z_s[:n])
        zt = None
        if w_t is not None and z_t is not None and teacher_hidden is not None:
            zt = head_product(teacher_hidden[index].to(w_t.dtype), w_t, z_t[:n])
        log_probs, columns, zt = _said(job, index, zt)
        weigh = torch.ones(n, 1, dtype=accumulate, device=device)
        if job.weights is not None:
            weigh = job.weights[index].to(accumulate).unsqueeze(-1)
        for low in range(0, n, tile):
            part = slice(low, low + tile)
            lp, ix, t = (None if x is None else x[part] for x in (log_probs, columns, zt))
            tensors = Rows(zs[part], b_s, t, b_t, lp, ix, target[part], weigh[part], factor)
            some, more = run(*tensors) if fast is None else fast(run, tensors)
            stats += some
            if d_bias is not None and more is not None:
                d_bias[:vocab] += more
        if d_hidden is not None:
            d_hidden[index] = torch.mm(zs, w_s).to(sums)
        if d_weight is not None:
            add_product(d_weight[:vocab], zs, h_s)

    if d_hidden is not None:
        d_hidden = job.across.sum(d_hidden)  # each slice of the vocabulary pulls on the same hidden states
    stats /= job.normalizer
    w = job.objective.kd_weight
    squared = job.objective.temperature**2 if job.objective.squared else 1.0
    loss = stats[1] if w == 0 else (1 - w) * stats[1] + w * squared * stats[0]
    return loss, stats, (d_hidden, d_weight, d_bias)


def _said(job: _Job, index: Tensor, zt: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A signal's log-probabilities, columns and logits at the positions ``index``."""
    if isinstance(job.signal, TopK):
        said = job.signal.at(job.objective.teacher_temperature, job.objective.tail)
        return said[index].to(job.accumulate).clamp_min(LOWEST), job.signal.indices[index], None
    if isinstance(job.signal, Sampled):
        return job.signal.log_probs[index].to(job.accumulate).unsqueeze(-1), None, None
    if isinstance(job.signal, Logits):
        return None, None, job.signal.logits[index][:, : job.vocab].to(job.accumulate).clamp_min(LOWEST)
    return None, None, zt


class _Compiled:
    """The compiled pass, and the plain one where compiling fails or is not worth it."""

    failed = False

    def __init__(self, spec: Spec, across: VocabReducer) -> None:
        self._pass = elementwise_pass(spec, across, True)

    def __call__(self, plain: Any, tensors: Rows) -> tuple[Tensor, Tensor | None]:
        if _Compiled.failed or tensors.target.numel() == 1:  # one row would be compiled as a case of its own
            return plain(*tensors)
        for tensor in (tensors.z, tensors.teacher, tensors.log_probs, tensors.indices, tensors.target, tensors.weight):
            if tensor is not None:
                torch._dynamo.mark_dynamic(tensor, 0)
        try:
            return self._pass(*tensors)
        except torch._dynamo.exc.TorchDynamoException as error:
            _Compiled.failed = True
            warnings.warn(
                f"The elementwise part of the loss could not be compiled ({type(error).__name__}); it runs uncompiled, "
                "which is slower and gives the same results.",
                stacklevel=2,
            )
            return plain(*tensors)


def _sums_dtype(job: _Job, weight: Tensor, chunks: int, device: torch.device) -> torch.dtype:
    """The precision in which the chunks' gradients meet.

    A product sums in float32 and is rounded once. With bfloat16 throughout, a few chunks added to the gradient itself lose
    little more than its last rounding does, and no float32 copy of twice its size is made.
    """
    bfloat16 = job.dtype is weight.dtype is torch.bfloat16 and job.across is NO_SHARDING
    narrow = bfloat16 and chunks <= _NARROW_CHUNKS.get(device.type, 0)
    return torch.bfloat16 if narrow else job.accumulate
