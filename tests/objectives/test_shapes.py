"""Positions that do not belong together are refused before anything is trained on them."""

import pytest
import torch

from limbeck.errors import LimbeckError
from limbeck.objectives import Logits, fused_linear_distillation

H, W, LABELS = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)


@pytest.mark.parametrize(
    ("hidden", "teacher", "labels", "more", "said"),
    [
        (H, torch.randn(9, 4), LABELS, {}, "teacher_hidden has 9 positions and student_hidden 6"),
        (H, torch.randn(5, 4), LABELS, {}, "teacher_hidden has 5 positions"),
        (H, H, LABELS[:4], {}, "labels has 4 positions"),
        (H[None], H, LABELS, {}, r"must be \[N, H\]"),
        (H, H, LABELS, {"weights": torch.ones(5)}, "weights has 5 positions"),
        (H, None, LABELS, {"teacher": Logits(torch.randn(7, 9))}, "signal has 7 positions"),
    ],
)
def test_other_positions_are_refused(hidden, teacher, labels, more, said):
    head = None if teacher is None else W
    with pytest.raises(LimbeckError, match=said):
        fused_linear_distillation(hidden, W, teacher, head, labels, **more)
