"""Positions that do not belong together are refused before anything is trained on them."""

import pytest
import torch

from limbeck.errors import LimbeckError
from limbeck.objectives import Logits, Sampled, divergence, fused_linear_distillation

H, W, LABELS = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)


@pytest.mark.parametrize(
    ("hidden", "teacher", "labels", "more", "message"),
    [
        (H, torch.randn(9, 4), LABELS, {}, "teacher_hidden has 9 positions and student_hidden 6"),
        (H, torch.randn(5, 4), LABELS, {}, "teacher_hidden has 5 positions"),
        (H, H, LABELS[:4], {}, "labels has 4 positions"),
        (H[None], H, LABELS, {}, r"must be \[N, H\]"),
        (H, H, LABELS, {"weights": torch.ones(5)}, "weights has 5 positions"),
        (H, None, LABELS, {"teacher": Logits(torch.randn(7, 9))}, "signal has 7 positions"),
        (H, torch.randn(6, 5), LABELS, {}, r"teacher_hidden is 5 wide and teacher_head \[9, 4\]"),
        (H[:, :3], H, LABELS, {}, "student_hidden is 3 wide"),
        (H, H, LABELS + 4, {}, "0 to 8, or -100 where nothing is learned; got 9"),
        (H, H, LABELS - 1, {}, "got -1"),
        (H, H, LABELS, {"vocab_size": 5}, "0 to 4, or -100 where nothing is learned; got 5"),
        (H, H, LABELS, {"vocab_size": 10}, "between 1 and the 9 rows"),
        (H, H, LABELS, {"chunk_size": 0}, "chunk_size must be 1 or more"),
        (
            H,
            None,
            LABELS,
            {"teacher": Sampled(torch.zeros(6)), "objective": "k2", "temperature": 2.0},
            "taken at temperature 1.0 and cannot be brought to 2.0",
        ),
    ],
)
def test_other_positions_are_refused(hidden, teacher, labels, more, message):
    head = None if teacher is None else W
    with pytest.raises(LimbeckError, match=message):
        fused_linear_distillation(hidden, W, teacher, head, labels, **more)


@pytest.mark.parametrize("temperatures", [(0.0,), (1.0, -1.0)])
def test_a_temperature_of_nothing_is_refused(temperatures):
    with pytest.raises(LimbeckError, match="temperatures must be above 0"):
        divergence("forward_kl")(W, W, *temperatures)
    with pytest.raises(LimbeckError, match="temperatures must be above 0"):
        fused_linear_distillation(
            H, W, H, W, LABELS, temperature=temperatures[0], teacher_temperature=temperatures[-1]
        )  # fmt: skip
