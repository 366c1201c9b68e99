"""Losses on intermediate features: distances between the outputs of student and teacher submodules.

    loss of a pair = Σ_rows w · ℓ(P s, t) / normalizer        ℓ: cosine, mse, l1 or smooth_l1;  P: a projection if widths differ

Value and gradient of ℓ are computed together, tile by tile in float32. The backward pass therefore keeps one tensor of the
student's size and precision.

Shapes: N rows (tokens), Hs and Ht the widths of student and teacher, H their common width after the projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from limbeck.errors import LimbeckError
from limbeck.objectives.first_order import first_order_only
from limbeck.objectives.objective import resolve_normalizer

_TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # 1 MiB of float32 fits a core's cache
_NO_DIRECTION = 1e-8  # a shorter vector counts as zero


class Pointwise(NamedTuple):
    """ℓ of each row, and its gradient for the first argument, ``slope · factor``.

    value: [N]. slope: [N, H], of order 1, so that half precision represents it well. factor: a number or [N, 1].
    """

    value: Tensor
    slope: Tensor
    factor: float | Tensor


def _cosine(x: Tensor, y: Tensor) -> Pointwise:
    """1 − cos(x, y). A zero vector has value 1 and no gradient."""
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
"""The losses by name. All are symmetric, so the gradient of the second argument is that of the swapped call."""


def feature_loss(name: str, student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return Σ over rows of ``weights`` · ℓ(student, teacher), a 0-dim float32 tensor (float64 for float64 inputs).

    name: cosine, mse, l1 or smooth_l1. student, teacher: [N, H]. weights: [N], or None for 1. Gradients reach student and
    teacher where required. Raises LimbeckError for an unknown name, for shapes that do not fit, and in a backward pass with
    ``create_graph=True``.
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
    return _FeatureLoss.apply(student, teacher, weights, LOSSES[name])


class _FeatureLoss(torch.autograd.Function):
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
            for side, (one, other) in enumerate(((s, t), (t, s))):
                slope_out = slopes[side]
                if side == 1 and slope_out is None:
                    continue
                value, slope, factor = pointwise(one, other)
                if side == 0:
                    total += (value if weight is None else value * weight).sum()
                factor_out = factors[side]
                if slope_out is not None and factor_out is not None:
                    slope_out[tile] = slope
                    factor_out[tile] = factor if weight is None else factor * weight.unsqueeze(-1)
        ctx.save_for_backward(*slopes, *factors)
        return total

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors[:2], ctx.saved_tensors[2:], strict=True)
        return (
            *(None if slope is None else slope * (outputs[0] * factor).to(slope.dtype) for slope, factor in pairs),
            None,
            None,
        )


class FeatureLosses(nn.Module):
    """The losses of all pairs, and a trainable projection Linear(Hs → Ht) for pairs of different widths.

    Args:
        losses: the name of each pair's loss.
        widths: (Hs, Ht) of each pair. Equal widths have no projection.
        shared: use one projection for all pairs of different widths, which must have the same two widths.
        seed: of the Xavier-uniform initialization of the weights. Biases start at 0.

    Raises LimbeckError for an unknown name, or for ``shared`` with several pairs of widths.
    """

    def __init__(
        self, losses: Sequence[str], widths: Sequence[tuple[int, int]], *, shared: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.losses = tuple(losses)
        self._widths, self._seed = tuple(widths), seed
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

    @property
    def shares_projection(self) -> bool:
        """Whether several pairs have one projection."""
        used = [number for number in self._projection_of if number is not None]
        return len(set(used)) < len(used)

    def per_pair(self) -> FeatureLosses:
        """The same losses, with new projections that no two pairs share."""
        return FeatureLosses(self.losses, self._widths, seed=self._seed)

    def only(self, indices: Sequence[int]) -> FeatureLosses:
        """The losses of some of the pairs, with their projections under the same names."""
        some = FeatureLosses([self.losses[i] for i in indices], [])
        some._projection_of = tuple(self._projection_of[i] for i in indices)
        some.projections = nn.ModuleList(
            linear if number in some._projection_of else nn.Identity() for number, linear in enumerate(self.projections)
        )
        return some

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        normalizer: float | Tensor,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return [pairs], the loss of each pair divided by ``normalizer``.

        student[i]: [N, Hs]. teacher[i]: [N, Ht]. weights: [N] or None. A normalizer tensor of 0 gives losses of 0. Raises
        LimbeckError for a normalizer that is negative, or the number 0.
        """
        sums = []
        for name, number, s, t in zip(self.losses, self._projection_of, student, teacher, strict=True):
            projected = s if number is None else self.projections[number](s)
            sums.append(feature_loss(name, projected, t, weights))
        losses = torch.stack(sums)
        return losses / resolve_normalizer(normalizer, None, 0, losses.dtype, losses.device)


def modelopt_balance(kd: Tensor, features: Tensor, ce: Tensor | None, scale: float) -> Tensor:
    """Return the total loss of ModelOpt's ``LogitsAndIntermediatesLossBalancer``, without a sync.

    kd: 0-dim, the divergence of the logits. features: [pairs], which may be empty. ce: 0-dim, the cross-entropy, or None to
    leave it out. Ratios are constants for the gradient:

        I = mean features,  KD = kd + I · (kd / I)        total = KD                             without ce
                                                          total = ce + scale · KD · (ce / KD)    with ce

    A ratio whose parts are not both positive is left out: with I = 0, KD is kd.
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
