"""The data that a student rank and a teacher exchange: requests for micro-batches, and the signals for the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.errors import LimbeckError
from limbeck.objectives import (
    Logits,
    OutputHead,
    Sampled,
    SignalPayload,
    TopK,
    compute_logits,
    compute_sampled,
    compute_topk,
)


@dataclass(frozen=True)
class Signal:
    """The teacher's distribution at the supervised positions of a micro-batch, in their flattened order.

    hidden: last hidden states [supervised, H_teacher]; with ``head``, the same object for every batch, they are the
    whole distribution, exactly. payload: what the teacher sent instead; ``hidden`` and ``head`` are then None.
    features: outputs of captured submodules, [rows, width] each.
    """

    hidden: Tensor | None
    head: OutputHead | None
    features: tuple[Tensor, ...] = ()
    payload: SignalPayload | None = None

    def select(self, indices: Tensor) -> Signal:
        """The distribution at some of the supervised positions only: ``indices`` [n] into them."""
        payload = self.payload
        if payload is not None:
            tensors: dict[str, Any] = {
                name: value[indices] for name, value in vars(payload).items() if isinstance(value, Tensor)
            }
            payload = replace(payload, **tensors)
        return replace(self, hidden=None if self.hidden is None else self.hidden[indices], payload=payload)


@dataclass(frozen=True)
class SignalSpec:
    """Which signal to send. This class encodes it on the teacher's side and decodes it on the student's.

    kind: ``"hidden_states"``, ``"top_k"`` (the ``topk`` most likely tokens with log-probabilities at ``temperature``),
    ``"sampled_token"`` (the log-probability of the label at ``temperature``) or ``"logits"``, over the first ``vocab_size``
    tokens.
    """

    kind: str = "hidden_states"
    topk: int = 0
    vocab_size: int = 0
    temperature: float = 1.0

    @property
    def needs_head(self) -> bool:
        """Whether the student needs the teacher's output head."""
        return self.kind == "hidden_states"

    def encode(
        self, hidden: Tensor, head: OutputHead, chunk: int | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The named tensors to send, [supervised, …] each, from hidden states [supervised, H].

        chunk: positions whose logits are held at once; by default as many as in the loss. labels: [supervised], for
        ``sampled_token``, which raises LimbeckError without them.
        """
        vocab = self.vocab_size
        if self.kind == "top_k":
            top = compute_topk(
                hidden, head, self.topk, vocab_size=vocab, temperature=self.temperature, chunk_size=chunk
            )
            return {"log_probs": top.log_probs, "indices": top.indices.int()}  # no vocabulary needs more than 32 bits
        if self.kind == "sampled_token":
            if labels is None:
                raise LimbeckError("a request for the signal sampled_token has no labels; make it with from_batch.")
            found = compute_sampled(
                hidden, head, labels, vocab_size=vocab, temperature=self.temperature, chunk_size=chunk
            )
            return {"log_probs": found.log_probs}
        if self.kind == "logits":
            return {"logits": compute_logits(hidden, head, vocab_size=vocab, chunk_size=chunk).logits}
        return {"hidden_states": hidden}

    def decode(self, tensors: Mapping[str, Tensor], head: OutputHead | None) -> Signal:
        """The signal from the named tensors that ``encode`` made."""
        if self.kind == "top_k":
            return Signal(None, None, payload=TopK(tensors["log_probs"], tensors["indices"].long(), self.temperature))
        if self.kind == "sampled_token":
            return Signal(None, None, payload=Sampled(tensors["log_probs"], self.temperature))
        if self.kind == "logits":
            return Signal(None, None, payload=Logits(tensors["logits"]))
        return Signal(tensors["hidden_states"], head)


HIDDEN_STATES = SignalSpec()


@dataclass(frozen=True)
class TeacherRequest:
    """The part of a micro-batch that a teacher needs.

    input_ids, position_ids: [batch, time]. documents: lengths of packed documents, or None. supervised: flattened
    positions that need the signal. spec: which signal. cu_seqlens: see ``Batch``; it is not sent to other processes.
    labels: [supervised], for the signal ``sampled_token``, else None.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    documents: tuple[int, ...] | None
    supervised: Tensor
    spec: SignalSpec = HIDDEN_STATES
    cu_seqlens: Tensor | None = None
    labels: Tensor | None = None

    @classmethod
    def from_batch(cls, batch: Batch, spec: SignalSpec = HIDDEN_STATES) -> TeacherRequest:
        """The request for ``batch``, in the teacher's own tokens or after its own prompts where the batch has them."""
        if batch.teacher_batch is not None and batch.teacher_tokens is None:
            return cls.from_batch(batch.teacher_batch, spec)
        if batch.teacher_tokens is not None:
            own = batch.teacher_tokens
            return cls(own.input_ids, own.position_ids, own.documents, own.supervised, spec, own.cu_seqlens)
        labels = batch.labels.flatten()[batch.supervised] if spec.kind == "sampled_token" else None
        return cls(
            batch.input_ids, batch.position_ids, batch.documents, batch.supervised, spec, batch.cu_seqlens, labels
        )

    @classmethod
    def empty(cls) -> TeacherRequest:
        """A request for nothing; it runs a forward pass that other ranks wait for."""
        return cls(torch.zeros(1, 1, dtype=torch.int64), None, None, torch.zeros(0, dtype=torch.int64))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], spec: SignalSpec) -> TeacherRequest:
        """The inverse of ``tensors``."""
        documents = tensors.get("documents")
        lengths = None if documents is None else tuple(documents.tolist())
        return cls(
            tensors["input_ids"],
            tensors.get("position_ids"),
            lengths,
            tensors["supervised"],
            spec,
            labels=tensors.get("labels"),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All but the spec, as named tensors to send."""
        documents = None if self.documents is None else torch.tensor(self.documents, dtype=torch.int64)
        named = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "documents": documents,
            "supervised": self.supervised,
            "labels": self.labels,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device) -> TeacherRequest:
        """The same request on ``device``."""
        positions, labels = (None if x is None else x.to(device) for x in (self.position_ids, self.labels))
        return TeacherRequest(
            self.input_ids.to(device), positions, self.documents, self.supervised.to(device), self.spec, labels=labels
        )


@dataclass(frozen=True)
class TeacherResponse:
    """The named tensors of a signal, [supervised, …] each, and the seconds that the teacher computed."""

    tensors: Mapping[str, Tensor]
    seconds: float
