"""The fused output head and distillation loss: hidden states of both models in, loss and gradients out.

Logits are never stored whole. ``fused_linear_distillation`` checks its arguments and chooses defaults; ``fused_autograd``
computes. The formula of the loss is in ``objective``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.objectives.checks import (
    IGNORE,
    check_chunk_size,
    check_rows,
    check_signal,
    check_values,
    check_width,
    teacher_columns,
)
from limbeck.objectives.chunks import compute_dtype
from limbeck.objectives.compilation import should_compile
from limbeck.objectives.fused_autograd import FusedHeadLoss, FusedOptions, fp16_grad_scale
from limbeck.objectives.objective import DistillationLoss, Objective, resolve_normalizer
from limbeck.objectives.output_head import OutputHead, as_output_head
from limbeck.objectives.payloads import Logits, SignalPayload
from limbeck.objectives.policy_gradient import RolloutTokens
from limbeck.objectives.vocab_parallel import NO_SHARDING, VocabParallel, VocabReducer


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
    teacher: SignalPayload | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
    all_supervised: bool = False,
    reducer: VocabReducer | None = None,
    compiled: bool | None = None,
    rollout: RolloutTokens | None = None,
) -> DistillationLoss:
    """Compute cross-entropy and distillation loss from the last hidden states, without storing [N, V] logits.

    Args:
        student_hidden: [N, Hs].
        student_head: [V, Hs], or an ``OutputHead`` with bias, soft-cap or scale.
        teacher_hidden: [N, Ht], or None if ``teacher`` is given or kd_weight is 0.
        teacher_head: [V', Ht] or an ``OutputHead``, with ``teacher_hidden``.
        labels: [N] int64, the token that each position must predict (shift before the call). −100 is not supervised.
        objective: the name of a divergence, or an ``Objective``, which then replaces the next three arguments.
        kd_weight: w in the loss, in [0, 1].
        temperature: τ_s.
        teacher_temperature: τ_t, default τ_s.
        vocab_size: the shared vocabulary, default the rows of the smaller head. Rows beyond it are not part of the loss.
        teacher: a ``TopK``, ``Logits`` or ``Sampled`` signal of N positions in place of the teacher's hidden states.
        weights: [N], multiplies the loss of each position, default 1.
        normalizer: divides the sums, default the summed weights of the supervised positions. A tensor of 0 gives loss 0 and
            zero gradients.
        chunk_size: positions per chunk. The default fits in 124 MiB of logits on a CPU (1024 positions if these fit in
            256 MiB), and in 1 GiB on a GPU.
        all_supervised: no label is −100. Saves a sync on a GPU.
        reducer: a ``VocabParallel`` if each rank of a group gives its own rows of both heads. Hidden states and labels are the
            same on all ranks, and so is the result.
        compiled: compile the elementwise pass; on a GPU, use a Triton kernel if there is one. By default if there is a compiler
            and enough work. Results differ by rounding only.
        rollout: of labels that the student has sampled: for a policy gradient, and to read the student's log-probabilities of
            the labels. Without it the policy gradient is left out.

    Returns:
        A ``DistillationLoss``. Gradients reach student_hidden and the weight and bias of the student's head, where required.

    Raises:
        LimbeckError: before anything is computed, for shapes that do not fit, or for a signal that the objective cannot use. On
            a CPU also for labels outside the vocabulary, weights that sum to 0 or less, and an infinite loss. In the backward
            pass for ``create_graph=True``.

    Half-precision inputs are multiplied in half precision. Everything else is computed in float32, or in float64 for float64
    inputs. On a GPU, up to eight chunks of a bfloat16 head sum their gradients in bfloat16.
    """
    if not isinstance(objective, Objective):
        objective = Objective.of(
            objective, kd_weight=kd_weight, temperature=temperature, teacher_temperature=teacher_temperature
        )
    student = as_output_head("student", student_head)
    head_t = None if teacher_head is None else as_output_head("teacher", teacher_head)
    check_rows(student_hidden, teacher_hidden, teacher, labels, weights, rollout)
    check_chunk_size(chunk_size)
    check_width("student", student_hidden, student)
    if teacher is not None:
        check_signal(teacher, objective, teacher_hidden)
        head_t = None
    elif head_t is not None and teacher_hidden is not None:
        check_width("teacher", teacher_hidden, head_t)
    elif objective.kd_weight > 0:
        raise LimbeckError(
            "kd_weight is above 0 but there is no teacher; give teacher_hidden and teacher_head, or kd_weight=0."
        )
    else:
        head_t = None
    vocab = _shared_vocab(vocab_size, student, head_t, teacher, reducer)

    dtype = compute_dtype(student_hidden, student.weight)
    rows = torch.arange(labels.numel(), device=labels.device)
    if not all_supervised:
        rows = rows[labels != IGNORE]
    if labels.device.type == "cpu":
        sharded = isinstance(reducer, VocabParallel)
        whole = reducer.vocab_size if isinstance(reducer, VocabParallel) else vocab
        check_values(labels, rows, student, head_t, teacher, objective, whole, sharded=sharded)
    row_weights = None if weights is None else weights[rows]
    options = FusedOptions(
        objective,
        vocab,
        dtype,
        student.transform,
        head_t,
        teacher,
        weights,
        resolve_normalizer(
            normalizer,
            row_weights,
            rows.numel(),
            torch.float64 if dtype is torch.float64 else torch.float32,
            student_hidden.device,
        ),
        chunk_size,
        torch.is_grad_enabled(),
        reducer or NO_SHARDING,
        (reducer is None and should_compile(rows.numel() * vocab)) if compiled is None else compiled,
        fp16_grad_scale(objective, student.scale, row_weights) if dtype is torch.float16 else 1.0,
        rollout,
    )
    loss, stats = FusedHeadLoss.apply(
        student_hidden, student.weight, student.bias, teacher_hidden, labels, rows, options
    )
    return DistillationLoss(loss, *stats.unbind())


def _shared_vocab(
    vocab_size: int | None,
    student: OutputHead,
    teacher: OutputHead | None,
    signal: SignalPayload | None,
    reducer: VocabReducer | None,
) -> int:
    """The columns of this rank that both models have. Raises LimbeckError if ``vocab_size`` does not fit the heads."""
    widest = student.weight.shape[0]
    if teacher is not None:
        widest = min(widest, teacher.weight.shape[0])
    elif isinstance(signal, Logits):
        widest = min(widest, signal.logits.shape[-1])
    if isinstance(reducer, VocabParallel):
        reducer.check(vocab_size, student=student.weight.shape[0], teacher=teacher_columns(teacher, signal))
        vocab_size = reducer.size
    vocab = widest if vocab_size is None else vocab_size
    if isinstance(signal, Logits) and signal.logits.shape[-1] < vocab:
        columns = signal.logits.shape[-1]
        raise LimbeckError(
            f"the teacher's Logits have only {columns} columns, and the shared vocabulary has {vocab} tokens; give one "
            f"column for each, or set vocab_size to {columns} (in a plug-in: the vocab_size of TeacherInfo)."
        )
    if not 0 < vocab <= widest:
        raise LimbeckError(
            f"vocab_size={vocab_size} is not between 1 and the {widest} rows of the smaller output head."
        )
    return vocab
