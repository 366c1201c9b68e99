"""What a teacher says about a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.objectives import OutputHead


@dataclass(frozen=True)
class Signal:
    """The teacher's last hidden states at the supervised positions, with its head: the whole distribution, exactly.

    hidden: [supervised, H_teacher], in the order of the batch's flattened supervised positions (of its translation's, if it
    has one). head: the same object for every batch. features: the outputs of the submodules that are tapped, each [rows, its
    width], if any are.
    """

    hidden: Tensor
    head: OutputHead
    features: tuple[Tensor, ...] = ()


Answer = Callable[[Batch], Signal]
"""What becomes of a question: called with the same micro-batch on the student's device, it gives the signal."""


class Teacher(Protocol):
    """Whoever can be asked about a batch. A question may be put long before its answer is wanted."""

    @property
    def head(self) -> OutputHead: ...

    @property
    def num_parameters(self) -> int: ...

    def ask(self, batch: Batch) -> Answer:
        """Put a micro-batch (on the host) to the teacher and return at once; answers may be taken in any order."""


@dataclass(frozen=True)
class Question:
    """All that a teacher needs of a micro-batch: [batch, time] ids, how rows are kept apart, and which positions count."""

    input_ids: Tensor
    position_ids: Tensor | None
    documents: tuple[int, ...] | None
    supervised: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Question:
        """The question that ``batch`` is, in the teacher's own tokens where the batch has them."""
        if batch.translation is not None:
            return cls(batch.translation.input_ids, None, None, batch.translation.supervised)
        return cls(batch.input_ids, batch.position_ids, batch.documents, batch.supervised)

    def to(self, device: torch.device) -> Question:
        """The same question on ``device``."""
        positions = None if self.position_ids is None else self.position_ids.to(device)
        return Question(self.input_ids.to(device), positions, self.documents, self.supervised.to(device))
