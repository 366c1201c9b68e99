"""What a teacher is asked about a batch, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.objectives import Logits, OutputHead, TopK, compute_logits, compute_topk


@dataclass(frozen=True)
class Signal:
    """What the loss compares the student with, in the order of the batch's flattened supervised positions (of its
    translation's, if it has one).

    hidden: the teacher's last hidden states [supervised, H_teacher], which with its ``head``, the same object for every batch,
    are the whole distribution, exactly. said: what the teacher sent instead; then the other two are None. features: the
    outputs of the submodules that are tapped, each [rows, its width], if any are.
    """

    hidden: Tensor | None
    head: OutputHead | None
    features: tuple[Tensor, ...] = ()
    said: TopK | Logits | None = None


@dataclass(frozen=True)
class SignalSpec:
    """What an answer is made of when it travels: the one place that knows the kinds of answers, at both ends of the way.

    kind: hidden_states, top_k (the ``topk`` most likely tokens with log-probabilities at ``temperature``) or logits, of the
    first ``vocab_size`` tokens.
    """

    kind: str = "hidden_states"
    topk: int = 0
    vocab_size: int = 0
    temperature: float = 1.0

    @property
    def needs_head(self) -> bool:
        """Whether the asker must have the teacher's output head."""
        return self.kind == "hidden_states"

    def say(self, hidden: Tensor, head: OutputHead, chunk: int | None = None) -> tuple[Tensor, ...]:
        """What travels, [supervised, …] each, in place of the hidden states [supervised, H]; ``chunk``: positions whose logits
        are held at once, by default as many as in the loss."""
        vocab = self.vocab_size
        if self.kind == "top_k":
            at = self.temperature
            top = compute_topk(hidden, head, self.topk, vocab_size=vocab, temperature=at, chunk_size=chunk)
            return top.log_probs, top.indices.int()  # no vocabulary needs more than 32 bits
        if self.kind == "logits":
            return (compute_logits(hidden, head, vocab_size=vocab, chunk_size=chunk).logits,)
        return (hidden,)

    def signal(self, came: tuple[Tensor, ...], head: OutputHead | None) -> Signal:
        """The signal that came so."""
        if self.kind == "top_k":
            log_probs, indices = came
            return Signal(None, None, said=TopK(log_probs, indices.long(), self.temperature))
        if self.kind == "logits":
            return Signal(None, None, said=Logits(came[0]))
        return Signal(came[0], head)


HIDDEN_STATES = SignalSpec()

SignalFuture = Callable[[Batch], Signal]
"""What becomes of a question: called with the same micro-batch on the student's device, or with the part of its supervised
positions that this rank is about, it gives the signal."""


class Teacher(Protocol):
    """Whoever can be asked about a batch. A question may be put long before its answer is wanted."""

    @property
    def vocab_size(self) -> int:
        """Rows of the output head, some of which may be padding."""

    @property
    def num_parameters(self) -> int: ...

    def ask(self, batch: Batch, wanted: SignalSpec) -> SignalFuture:
        """Put a micro-batch (on the host) to the teacher and return at once; answers may be taken in any order."""


@dataclass(frozen=True)
class TeacherRequest:
    """All that a teacher needs of a micro-batch: [batch, time] ids, how rows are kept apart, which positions count, and what is
    wanted of them."""

    input_ids: Tensor
    position_ids: Tensor | None
    documents: tuple[int, ...] | None
    supervised: Tensor
    wanted: SignalSpec = HIDDEN_STATES

    @classmethod
    def of(cls, batch: Batch, wanted: SignalSpec = HIDDEN_STATES) -> TeacherRequest:
        """The question that ``batch`` is, in the teacher's own tokens where the batch has them."""
        if batch.teacher_tokens is not None:
            return cls(batch.teacher_tokens.input_ids, None, None, batch.teacher_tokens.supervised, wanted)
        return cls(batch.input_ids, batch.position_ids, batch.documents, batch.supervised, wanted)

    def to(self, device: torch.device) -> TeacherRequest:
        """The same question on ``device``."""
        positions = None if self.position_ids is None else self.position_ids.to(device)
        there = self.input_ids.to(device), positions, self.documents, self.supervised.to(device)
        return TeacherRequest(*there, self.wanted)
