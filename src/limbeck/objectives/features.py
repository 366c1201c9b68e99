"""Intermediate features: how far the student's inner states are from the teacher's, pair by pair.

    pair = Σ_rows w · ℓ(P s, t) / normalizer        ℓ: cosine, mse, l1 or smooth_l1;  P: a projection where widths differ

Value and gradient of ℓ are formed together, tile by tile in float32, so what is kept for the backward pass is one tensor of
the student's size and precision. Nothing here knows where the rows come from, which tokens they stand for, or a model.

Shapes: N rows (tokens), Hs and Ht the widths of student and teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from limbeck.errors import LimbeckError

_TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # one megabyte of float32 stays in a core's cache
_NO_DIRECTION = 1e-8  # a vector shorter than this points nowhere


class Pointwise(NamedTuple):
    """ℓ for each row, and ``slope · factor``, its gradient for the first argument.

    value: [N]. slope: [N, H], of the order of 1, so that half precision can hold it. factor: what is left of the gradient, a
    number or [N, 1].
    """

    value: Tensor
    slope: Tensor
    factor: float | Tensor


def _cosine(x: Tensor, y: Tensor) -> Pointwise:
    """1 − cos(x, y); a row without a direction has value 1 and no gradient."""
    length_x = x.square().sum(-1, keepdim=True).sqrt()
    length_y = y.square().sum(-1, keepdim=True).sqrt()
    x, y = x / length_x.clamp_min(_NO_DIRECTION), y / length_y.clamp_min(_NO_DIRECTION)
    cosine = (x * y).sum(-1, keepdim=True)
    inverse = torch.where(length_x > _NO_DIRECTION, 1 / length_x, 0)
    return Pointwise(1 - cosine.squeeze(-1), x * cosine - y, inverse)


def _mse(x: Tensor, y: Tensor) -> Pointwise:
    """mean (x − y)²"""
    difference = x - y
    return Pointwise(difference.square().mean(-1), difference, 2 / x.shape[-1])


def _l1(x: Tensor, y: Tensor) -> Pointwise:
    """mean |x − y|"""
    difference = x - y
    return Pointwise(difference.abs().mean(-1), difference.sign(), 1 / x.shape[-1])


def _smooth_l1(x: Tensor, y: Tensor) -> Pointwise:
    """mean of ½ (x − y)² where |x − y| < 1, else |x − y| − ½"""
    difference = x - y
    slope = difference.clamp(-1, 1)
    return Pointwise((slope * (difference - slope / 2)).mean(-1), slope, 1 / x.shape[-1])


LOSSES: dict[str, Callable[[Tensor, Tensor], Pointwise]] = {
    "cosine": _cosine,
    "mse": _mse,
    "l1": _l1,
    "smooth_l1": _smooth_l1,
}
"""By name. All are symmetric in their arguments, which is what gives the second one its gradient."""


def feature_loss(name: str, student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ over rows of ``weights`` · ℓ(student, teacher), a scalar in float32 (float64 for float64 inputs).

    student, teacher: [N, H]; weights: [N] or None for 1. Gradients reach whichever of student and teacher requires them.
    Raises LimbeckError for an unknown name and for shapes that cannot be compared.
    """
    if name not in LOSSES:
        raise LimbeckError(f"{name!r} is not a feature loss; use one of {', '.join(LOSSES)}.")
    if student.shape != teacher.shape or student.dim() != 2:
        raise LimbeckError(
            f"features of shapes {list(student.shape)} (student) and {list(teacher.shape)} (teacher) cannot be compared; "
            "both must be [tokens, width]."
        )
    if weights is not None and weights.shape != student.shape[:1]:
        raise LimbeckError(f"the weights of {len(student)} tokens must be [{len(student)}], got {list(weights.shape)}.")
    return _SumOfRows.apply(student, teacher, weights, LOSSES[name])


class _SumOfRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor | None, pointwise: Callable[..., Pointwise]
    ) -> Tensor:
        dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
        slopes = [
            torch.empty_like(side) if needed else None
            for side, needed in zip((student, teacher), ctx.needs_input_grad, strict=False)
        ]
        factors = [None if slope is None else slope.new_empty(len(slope), 1, dtype=dtype) for slope in slopes]
        total = torch.zeros((), dtype=dtype, device=student.device)
        step = max(1, _TILE_ELEMENTS.get(student.device.type, 1 << 24) // max(1, student.shape[1]))
        for low in range(0, student.shape[0], step):
            tile = slice(low, low + step)
            s, t = student[tile].to(dtype), teacher[tile].to(dtype)
            weight = None if weights is None else weights[tile].to(dtype)
            for place, (one, other) in enumerate(((s, t), (t, s))):
                into = slopes[place]
                if place == 1 and into is None:
                    continue
                value, slope, factor = pointwise(one, other)
                if place == 0:
                    total += (value if weight is None else value * weight).sum()
                rest = factors[place]
                if into is not None and rest is not None:
                    into[tile] = slope
                    rest[tile] = factor if weight is None else factor * weight.unsqueeze(-1)
        ctx.save_for_backward(*slopes, *factors)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors[:2], ctx.saved_tensors[2:], strict=True)
        return (
            *(None if slope is None else slope * (outputs[0] * factor).to(slope.dtype) for slope, factor in pairs),
            None,
            None,
        )


class FeatureLosses(nn.Module):
    """The losses of all pairs, with the projections that they need: Linear(Hs → Ht), trained with the student.

    losses: a name for each pair. widths: (Hs, Ht) for each pair; equal widths get no projection. shared: one projection for
    all pairs that need one, which must then agree in their widths. Biases start at 0, weights from ``seed``.
    """

    def __init__(
        self, losses: Sequence[str], widths: Sequence[tuple[int, int]], *, shared: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.losses = tuple(losses)
        for name in self.losses:
            if name not in LOSSES:
                raise LimbeckError(f"{name!r} is not a feature loss; use one of {', '.join(LOSSES)}.")
        different = [pair for pair in widths if pair[0] != pair[1]]
        if shared and len(set(different)) > 1:
            kinds = ", ".join(f"{student} → {teacher}" for student, teacher in sorted(set(different)))
            raise LimbeckError(
                f"features.projection = shared needs pairs of the same two widths, but these have {kinds}; use per_pair."
            )
        made = different[:1] if shared else different
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projections = nn.ModuleList(nn.Linear(student, teacher) for student, teacher in made)
            for linear in self.projections:
                assert isinstance(linear, nn.Linear)
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        numbers = iter(range(len(different)))
        self._projection_of = tuple(
            None if student == teacher else 0 if shared else next(numbers) for student, teacher in widths
        )

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        normalizer: float | Tensor,
        weights: Tensor | None = None,
    ) -> Tensor:
        """[pairs]: each pair's loss ÷ normalizer. student[i] is [N, Hs], teacher[i] [N, Ht]; weights [N] or None."""
        sums = []
        for name, place, s, t in zip(self.losses, self._projection_of, student, teacher, strict=True):
            projected = s if place is None else self.projections[place](s)
            sums.append(feature_loss(name, projected, t, weights))
        return torch.stack(sums) / normalizer


def modelopt_balance(kd: Tensor, features: Tensor, ce: Tensor | None, scale: float) -> Tensor:
    """The total of ModelOpt's ``LogitsAndIntermediatesLossBalancer``, made of device tensors only, without a host sync.

    kd: the logits' divergence; features: [pairs], perhaps none; ce: cross-entropy, or None to leave it out. Every ratio is
    taken as a constant:

        I = mean features,  KD = kd + I · (kd / I)        total = KD                             without ce
                                                          total = ce + scale · KD · (ce / KD)    with ce

    A ratio whose parts are not both above 0 is left out: as there, an I of 0 adds nothing and KD stays as it is.
    """
    if features.numel():
        mean = features.mean()
        kd = kd + mean * _ratio(kd, mean, otherwise=0.0)
    if ce is None:
        return kd
    return ce + scale * kd * _ratio(ce, kd, otherwise=1.0)


def _ratio(above: Tensor, below: Tensor, otherwise: float) -> Tensor:
    above, below = above.detach(), below.detach()
    return torch.where((above > 0) & (below > 0), above / below, otherwise)
