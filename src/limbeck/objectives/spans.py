"""What two tokenizers have in common: tokens that are the same, and the spans at whose both ends both have a boundary."""

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
    """Which tokens of two vocabularies are the same.

    student_size V, teacher_size V': columns beyond do not exist. student_common [C] and teacher_common [C]: the ids of tokens
    that both have, pairwise. student_rest, teacher_rest: ids that one side alone has. An id in neither (an unpaired special
    token) is compared with nothing.
    """

    student_size: int
    teacher_size: int
    student_common: Tensor
    teacher_common: Tensor
    student_rest: Tensor
    teacher_rest: Tensor

    def to(self, device: torch.device) -> Vocabularies:
        """The same on ``device``."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})

    @cached_property
    def teacher_of(self) -> Tensor:
        """[V] the teacher's id of each token of the student, −1 where there is none."""
        return self._lookup(self.student_size, self.student_common, self.teacher_common)

    @cached_property
    def student_of(self) -> Tensor:
        """[V'] the other way."""
        return self._lookup(self.teacher_size, self.teacher_common, self.student_common)

    @staticmethod
    def _lookup(size: int, keys: Tensor, values: Tensor) -> Tensor:
        table = torch.full((size,), -1, dtype=torch.int64, device=keys.device)
        table[keys] = values
        return table


_TENSORS = ("student_common", "teacher_common", "student_rest", "teacher_rest")


@dataclass(frozen=True)
class Spans:
    """Which supervised positions make up which span, on both sides.

    student_first [S], teacher_first [S]: the position that predicts a span's first token. student_rest [N − S]: all other
    positions of the student, with the span that each belongs to, or S for none, in student_rest_span. teacher_rest [M − S],
    teacher_rest_span: the same. weight [S] float32: u_g, what multiplies each span's divergence.
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
        """From the span of each position of the student [N] and the teacher [M] (−1: none), numbered from 0 in order."""
        return cls(*_split(student, len(weight)), *_split(teacher, len(weight)), torch.from_numpy(weight))

    def __len__(self) -> int:
        return self.weight.numel()

    def each(self, change: Callable[[Tensor], Tensor]) -> Spans:
        """The same with every tensor changed."""
        return Spans(*(change(getattr(self, f.name)) for f in fields(self)))


def _split(span_of: NDArray[np.int64], count: int) -> tuple[Tensor, Tensor, Tensor]:
    begins = span_of >= 0
    begins[1:] &= span_of[1:] != span_of[:-1]
    rest = np.flatnonzero(~begins)
    owner = np.where(span_of[rest] < 0, count, span_of[rest])
    return torch.from_numpy(np.flatnonzero(begins)), torch.from_numpy(rest), torch.from_numpy(owner)
