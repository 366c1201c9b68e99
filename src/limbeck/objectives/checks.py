"""Checks of a loss's arguments before anything is computed. Values are read on a CPU only: on a GPU that would be a sync.

Shapes: N positions, V vocabulary, H hidden size, k tokens of a top-k signal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.objectives.divergences import EXCLUDED, check_support
from limbeck.objectives.objective import Objective
from limbeck.objectives.output_head import OutputHead
from limbeck.objectives.payloads import Logits, Sampled, SignalPayload, TopK
from limbeck.objectives.policy_gradient import RolloutTokens

IGNORE = -100


def check_rows(
    student: Tensor,
    teacher: Tensor | None,
    signal: SignalPayload | None,
    labels: Tensor,
    weights: Tensor | None,
    rollout: RolloutTokens | None = None,
) -> None:
    """Raise LimbeckError unless all arguments have the same N positions and their documented shapes."""
    if student.dim() != 2 or labels.dim() != 1:
        raise LimbeckError(
            f"student_hidden must be [N, H] and labels [N], got {list(student.shape)} and {list(labels.shape)}; flatten both."
        )
    if labels.dtype is not torch.int64:
        raise LimbeckError(f"labels must be token numbers (torch.int64), got {labels.dtype}; labels.long() makes them.")
    for name, given, dims in (("teacher_hidden", teacher, 2), ("weights", weights, 1)):
        if given is not None and given.dim() != dims:
            raise LimbeckError(f"{name} must be {['[N]', '[N, H]'][dims - 1]}, got {list(given.shape)}; flatten it.")
    payload = signal.logits if isinstance(signal, Logits) else None if signal is None else signal.log_probs
    for name, rows in (
        ("labels", labels),
        ("teacher_hidden", teacher),
        ("the teacher's signal", payload),
        ("weights", weights),
        ("rollout", None if rollout is None else rollout.log_probs),
    ):
        if rows is not None and len(rows) != len(student):
            raise LimbeckError(
                f"{name} has {len(rows)} positions and student_hidden {len(student)}; give the same positions to both."
            )


def teacher_columns(head: OutputHead | None, signal: SignalPayload | None) -> int | None:
    """How many vocabulary columns the teacher gives on this rank. None for a sparse signal, and without a teacher."""
    if head is not None:
        return len(head.weight)
    return signal.logits.shape[-1] if isinstance(signal, Logits) else None


def check_width(role: str, hidden: Tensor, head: OutputHead) -> None:
    """Raise LimbeckError unless hidden [N, H] fits the head [V, H]."""
    if hidden.shape[1] != head.weight.shape[1]:
        raise LimbeckError(
            f"{role}_hidden is {hidden.shape[1]} wide and {role}_head {list(head.weight.shape)}; a head is [V, H] for hidden "
            "states [N, H]."
        )


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise LimbeckError for a chunk without positions."""
    if chunk_size is not None and chunk_size < 1:
        raise LimbeckError(f"chunk_size must be 1 or more positions, got {chunk_size}; leave it out for the default.")


def check_tokens(name: str, tokens: Tensor, vocab: int) -> None:
    """Raise LimbeckError for a token outside 0 to vocab − 1. Reads the tokens."""
    wrong = tokens[(tokens < 0) | (tokens >= vocab)]
    if len(wrong):
        hint = f", or {IGNORE} where nothing is learned" if name == "labels" else ""
        raise LimbeckError(
            f"{name} must be tokens of the shared vocabulary, 0 to {vocab - 1}{hint}; got {int(wrong[0])}."
        )


def check_topk(log_probs: Tensor, indices: Tensor, vocab: int) -> None:
    """Raise LimbeckError unless [N, k] are log-probabilities of different tokens, apart from unused entries. Reads them."""
    check_tokens("the teacher's top-k indices", indices, vocab)
    unused = log_probs <= EXCLUDED
    # An unused entry gets a number of its own, because its index may repeat another one.
    ordered = torch.where(unused, -1 - torch.arange(indices.shape[1]), indices).sort(-1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise LimbeckError("the teacher's top-k names a token twice at one position; give each of the k tokens once.")
    if (log_probs.float().logsumexp(-1) > 0.05).any():  # more than half precision rounds
        raise LimbeckError(
            "the teacher's top-k log_probs sum to a probability above 1; give log_softmax(logits) over the whole vocabulary, "
            "of which the k are a part."
        )


def check_signal(signal: SignalPayload, objective: Objective, teacher_hidden: Tensor | None) -> None:
    """Raise LimbeckError unless the objective can use the signal."""
    if teacher_hidden is not None:
        raise LimbeckError("there are two teachers: give teacher_hidden and teacher_head, or a signal, not both.")
    if isinstance(signal, Sampled) != objective.sampled and not isinstance(signal, Logits):
        needed = "log-probabilities of the labels (Sampled)" if objective.sampled else "a distribution (TopK or Logits)"
        raise LimbeckError(f"this objective needs {needed}, and the teacher sends {type(signal).__name__}.")
    if isinstance(signal, TopK):
        if objective.topk_from == "student":
            raise LimbeckError(
                "the objective compares the student's most likely tokens, and the teacher sends those of its own (TopK); give "
                "its hidden states or Logits."
            )
        if 0 < objective.topk < signal.indices.shape[1]:
            raise LimbeckError(
                f"the objective's topk={objective.topk} contradicts the teacher's {signal.indices.shape[1]} tokens; "
                "leave topk out, or send as many."
            )
        signal.at(objective.teacher_temperature, objective.tail)
    if isinstance(signal, Sampled) and signal.temperature != objective.teacher_temperature:
        raise LimbeckError(
            f"log-probabilities of sampled tokens were taken at temperature {signal.temperature} and cannot be brought to "
            f"{objective.teacher_temperature}; take them there, or set teacher_temperature={signal.temperature}."
        )


def check_values(
    labels: Tensor,
    rows: Tensor,
    student: OutputHead,
    teacher: OutputHead | None,
    signal: SignalPayload | None,
    objective: Objective,
    vocab: int,
    *,
    sharded: bool,
) -> None:
    """Raise LimbeckError for labels or top-k tokens outside the vocabulary, and for an infinite loss.

    rows: the supervised positions of ``labels`` [N]. vocab: the whole vocabulary. A ``sharded`` head is not checked for an
    infinite loss, because its ranks would not all raise. Reads every argument: for a CPU only.
    """
    check_tokens("labels", labels[rows], vocab)
    if isinstance(signal, TopK):
        check_topk(signal.log_probs[rows], signal.indices[rows], vocab)
    if sharded or not rows.numel():
        return
    w, bias = objective.kd_weight, _excluding_bias(student, vocab)
    if w < 1 and bias is not None and bool((bias[labels[rows]] <= EXCLUDED).any()):
        wrong = labels[rows][bias[labels[rows]] <= EXCLUDED][0]
        raise LimbeckError(
            f"the cross-entropy is infinite: label {int(wrong)} has a bias of −∞ in the student's head; remove the −∞, or set "
            f"the label to {IGNORE}."
        )
    if w == 0:
        return
    if isinstance(signal, Sampled):
        if not bool(torch.isfinite(signal.log_probs[rows]).all()):
            raise LimbeckError(
                "the estimate is infinite: the teacher's log-probability of a sampled token is not finite; set that label to "
                f"{IGNORE}."
            )
    elif isinstance(signal, TopK):
        kept = signal.indices[rows][signal.log_probs[rows] > EXCLUDED]
        if bias is not None and len(kept) and bool((bias[kept] <= EXCLUDED).any()):
            check_support(objective.divergence_fn, bias, None)
    elif not objective.sampled and not 0 < objective.topk < vocab:
        if isinstance(signal, Logits):
            check_support(objective.divergence_fn, bias, signal.logits[:, :vocab][rows])
        elif teacher is not None:
            check_support(objective.divergence_fn, bias, _excluding_bias(teacher, vocab))


def _excluding_bias(head: OutputHead, vocab: int) -> Tensor | None:
    """The bias [V] of a head whose −∞ exclude tokens: a soft-cap makes them finite."""
    return None if head.bias is None or head.softcap is not None else head.bias.detach()[:vocab]
