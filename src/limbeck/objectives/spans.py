"""What two tokenizers have in common: tokens of the same text, and spans of text at whose both ends both have a boundary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Vocabularies:
    """Which tokens two vocabularies have in common. All tensors are int64 token ids.

    Args:
        student_size: V. Columns of the student's head from V on are ignored.
        teacher_size: V', the same for the teacher.
        student_common, teacher_common: [C], the common tokens, pairwise.
        student_rest, teacher_rest: the tokens of one vocabulary only. A token in neither list (a special token without a
            counterpart) is not compared.
    """

    student_size: int
    teacher_size: int
    student_common: Tensor
    teacher_common: Tensor
    student_rest: Tensor
    teacher_rest: Tensor

    def to(self, device: torch.device) -> Vocabularies:
        """Return a copy on ``device``."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})

    @cached_property
    def teacher_of(self) -> Tensor:
        """[V], the teacher's id of each token of the student, or −1."""
        return self._lookup(self.student_size, self.student_common, self.teacher_common)

    @cached_property
    def student_of(self) -> Tensor:
        """[V'], the student's id of each token of the teacher, or −1."""
        return self._lookup(self.teacher_size, self.teacher_common, self.student_common)

    @staticmethod
    def _lookup(size: int, keys: Tensor, values: Tensor) -> Tensor:
        table = torch.full((size,), -1, dtype=torch.int64, device=keys.device)
        table[keys] = values
        return table


_TENSORS = ("student_common", "teacher_common", "student_rest", "teacher_rest")


@dataclass(frozen=True)
class Spans:
    """Which supervised positions form which span, for S spans, N positions of the student and M of the teacher.

    Args:
        student_first, teacher_first: [S], the position that predicts the first token of each span.
        student_rest, teacher_rest: [N − S] and [M − S], all other positions.
        student_rest_span, teacher_rest_span: the span of each of these, or S for none.
        weight: [S] float32, u_g, multiplies the divergence of each span.
    """

    student_first: Tensor
    student_rest: Tensor
    student_rest_span: Tensor
    teacher_first: Tensor
    teacher_rest: Tensor
    teacher_rest_span: Tensor
    weight: Tensor

    @classmethod
    def of(cls, student: NDArray[np.int64], teacher: NDArray[np.int64], weight: NDArray[np.float32]) -> Spans:
        """Build from the span of each position, student [N] and teacher [M], numbered from 0 in order; −1 for no span."""
        return cls(*_split(student, len(weight)), *_split(teacher, len(weight)), torch.from_numpy(weight))

    def __len__(self) -> int:
        return self.weight.numel()

    def each(self, change: Callable[[Tensor], Tensor]) -> Spans:
        """Return a copy with ``change`` applied to every tensor."""
        return Spans(*(change(getattr(self, f.name)) for f in fields(self)))


def _split(span_of: NDArray[np.int64], count: int) -> tuple[Tensor, Tensor, Tensor]:
    begins = span_of >= 0
    begins[1:] &= span_of[1:] != span_of[:-1]
    rest = np.flatnonzero(~begins)
    owner = np.where(span_of[rest] < 0, count, span_of[rest])
    return torch.from_numpy(np.flatnonzero(begins)), torch.from_numpy(rest), torch.from_numpy(owner)
