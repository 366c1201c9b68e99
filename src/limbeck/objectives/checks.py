"""What a loss refuses before it computes anything: rows, tokens and signals that do not belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.objectives.payloads import Logits, Sampled, Signal, TopK

if TYPE_CHECKING:
    from limbeck.objectives.fused import Objective, OutputHead

IGNORE = -100


def check_rows(
    student: Tensor, teacher: Tensor | None, signal: Signal | None, labels: Tensor, weights: Tensor | None
) -> None:
    """A teacher that speaks of other positions would train the student wrongly without a word."""
    if student.dim() != 2 or labels.dim() != 1:
        raise LimbeckError(
            f"student_hidden must be [N, H] and labels [N], got {list(student.shape)} and {list(labels.shape)}; flatten both."
        )
    if labels.dtype is not torch.int64:
        raise LimbeckError(f"labels must be token numbers (torch.int64), got {labels.dtype}; labels.long() makes them.")
    for name, given, dims in (("teacher_hidden", teacher, 2), ("weights", weights, 1)):
        if given is not None and given.dim() != dims:
            raise LimbeckError(f"{name} must be {['[N]', '[N, H]'][dims - 1]}, got {list(given.shape)}; flatten it.")
    sent = signal.logits if isinstance(signal, Logits) else None if signal is None else signal.log_probs
    for name, rows in (
        ("labels", labels),
        ("teacher_hidden", teacher),
        ("the teacher's signal", sent),
        ("weights", weights),
    ):
        if rows is not None and len(rows) != len(student):
            raise LimbeckError(
                f"{name} has {len(rows)} positions and student_hidden {len(student)}; give the same positions to both."
            )


def columns_given(head: OutputHead | None, signal: Signal | None) -> int | None:
    """How many columns of the vocabulary a teacher gives here; None if it names columns of the whole one, or is not there."""
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


def check_tokens(name: str, tokens: Tensor, vocab: int) -> None:
    """Raise LimbeckError for a number outside 0 to vocab − 1; reads the tokens, so not for a GPU's."""
    wrong = tokens[(tokens < 0) | (tokens >= vocab)]
    if len(wrong):
        hint = f", or {IGNORE} where nothing is learned" if name == "labels" else ""
        raise LimbeckError(
            f"{name} must be tokens of the shared vocabulary, 0 to {vocab - 1}{hint}; got {int(wrong[0])}."
        )


def check_topk(log_probs: Tensor, indices: Tensor, vocab: int) -> None:
    """Raise LimbeckError unless [N, k] are log-probabilities of k different tokens; reads them, as ``check_tokens`` does."""
    check_tokens("the teacher's top-k indices", indices, vocab)
    ordered = indices.sort(-1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise LimbeckError("the teacher's top-k names a token twice at one position; give each of the k tokens once.")
    if (log_probs.float().logsumexp(-1) > 0.05).any():  # above what half precision rounds
        raise LimbeckError(
            "the teacher's top-k log_probs sum to a probability above 1; give log_softmax(logits) over the whole vocabulary, "
            "of which the k are a part."
        )


def check_signal(signal: Signal, objective: Objective, teacher_hidden: Tensor | None) -> None:
    """Raise LimbeckError unless the objective can use the signal."""
    if teacher_hidden is not None:
        raise LimbeckError("there are two teachers: give teacher_hidden and teacher_head, or a signal, not both.")
    if isinstance(signal, Sampled) != objective.sampled and not isinstance(signal, Logits):
        wanted = "log-probabilities of the labels (Sampled)" if objective.sampled else "a distribution (TopK or Logits)"
        raise LimbeckError(f"this objective needs {wanted}, and the teacher sends {type(signal).__name__}.")
    if isinstance(signal, TopK):
        if 0 < objective.topk < signal.indices.shape[1]:
            raise LimbeckError(
                f"the objective's topk={objective.topk} contradicts the teacher's {signal.indices.shape[1]} tokens; "
                "leave topk out, or send as many."
            )
        signal.at(objective.teacher_temperature, objective.tail)
    if isinstance(signal, Sampled) and signal.temperature != objective.teacher_temperature:
        raise LimbeckError(
            f"log-probabilities of drawn tokens were taken at temperature {signal.temperature} and cannot be brought to "
            f"{objective.teacher_temperature}; take them there, or set teacher_temperature={signal.temperature}."
        )
