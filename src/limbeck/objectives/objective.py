"""What a distillation loss minimizes (``Objective``) and what it returns (``DistillationLoss``).

    loss = [ (1 − w) Σ u CE  +  w Σ u D(p, q)  +  Σ u PG ] / normalizer    p = softmax(z_t / τ_t),  q = softmax(z_s / τ_s)

u is the weight of a position, 1 by default. CE is the cross-entropy of the student without temperature. PG is the policy
gradient of tokens that the student has sampled (``limbeck.objectives.policy_gradient``), with the advantages given for them.
With the objective ``policy_gradient`` there is no D; its advantage w (log p(y) − log q_w(y)) is added to those given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.objectives.divergences import DivergenceFn, make_divergence
from limbeck.objectives.payloads import TAILS
from limbeck.objectives.sampled import ESTIMATORS


@dataclass(frozen=True)
class Objective:
    """The numbers in the formula of this module. ``Objective.of`` builds one from the name of a divergence.

    Args:
        divergence_fn: value and gradient weight of the divergence, or an estimator if ``sampled``.
        kd_weight: w, in [0, 1].
        temperature: τ_s, divides the student's logits in D.
        teacher_temperature: τ_t, divides the teacher's logits.
        squared: multiply the divergence by τ_s².
        topk: 0 for the whole vocabulary. Otherwise D compares the k most likely tokens of ``topk_from``.
        tail: how the tokens outside the k are treated, one of ``TAILS``.
        sampled: ``divergence_fn`` is an estimator of ``limbeck.objectives.sampled``.
        policy_gradient: the estimator is measured only; its negative is an advantage.
        topk_from: ``teacher`` or ``student``, whose most likely tokens are compared. For the gradient the choice is constant.
    """

    divergence_fn: DivergenceFn
    kd_weight: float = 0.5
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    squared: bool = False
    topk: int = 0
    tail: str = "renormalize"
    sampled: bool = False
    policy_gradient: bool = False
    topk_from: str = "teacher"

    @classmethod
    def of(
        cls,
        name: str = "forward_kl",
        *,
        kd_weight: float = 0.5,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        squared: bool = False,
        topk: int = 0,
        tail: str = "renormalize",
        topk_from: str = "teacher",
        parameters: Mapping[str, Any] | None = None,
    ) -> Objective:
        """Build the objective of the divergence ``name`` with its ``parameters``.

        ``teacher_temperature`` defaults to ``temperature``. The names k1, k2 and k3 select the estimators of the reverse KL on
        tokens that the student has sampled, and policy_gradient selects the objective of that module. Raises LimbeckError for
        an unknown name and for values outside their range.
        """
        tau_t = temperature if teacher_temperature is None else teacher_temperature
        for key, number in {"kd_weight": kd_weight, "temperature": temperature, "teacher_temperature": tau_t}.items():
            if not isinstance(number, int | float):
                raise LimbeckError(f"{key} must be a number, got {number!r}.")
        if not 0 <= kd_weight <= 1:
            raise LimbeckError(f"kd_weight must be in [0, 1], got {kd_weight}.")
        if not (temperature > 0 and tau_t > 0):
            raise LimbeckError(f"temperatures must be above 0, got {temperature} (student) and {tau_t} (teacher).")
        if not isinstance(topk, int) or topk < 0:
            raise LimbeckError(f"logits_topk must be 0 (the whole vocabulary) or more, got {topk}.")
        if tail not in TAILS:
            raise LimbeckError(f"there is no tail called {tail!r}; use one of {', '.join(TAILS)}.")
        if topk_from not in ("teacher", "student"):
            raise LimbeckError(f"topk_from must be teacher or student, got {topk_from!r}.")
        sampled = name in ESTIMATORS
        if sampled and topk:
            raise LimbeckError(
                f"{name} uses the sampled token only, so logits_topk = {topk} has no effect; set it to 0."
            )
        divergence_fn = ESTIMATORS[name] if sampled else make_divergence(name, **(parameters or {}))
        policy_gradient = name == "policy_gradient"
        return cls(
            divergence_fn, kd_weight, temperature, tau_t, squared, topk, tail, sampled, policy_gradient, topk_from
        )


class DistillationLoss(NamedTuple):
    """``loss`` backpropagates. All other fields are detached. Each is a 0-dim tensor on the device of the inputs.

    Every field is a sum over supervised positions, times their weights, divided by the normalizer:

    - kd: the divergence. ce: the cross-entropy.
    - student_entropy, teacher_entropy: in nats, of q and p as the divergence uses them.
    - top1_agreement: 1 where a token is the most likely one of both models. Of tokens that tie, one shared one is enough, but
      only the first of a ``TopK`` signal counts.
    - topk_mass: the teacher's probability of the k tokens. topk_overlap: the share of these k among the other model's own k.
    - policy: the policy gradient's part of the loss.

    Fields that need a teacher, top-k, or tokens that the student has sampled, are 0 without them. The teacher's entropy and
    the agreement are NaN if the teacher's signal is ``Sampled``, which does not contain them.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor
    topk_mass: Tensor
    topk_overlap: Tensor
    policy: Tensor


def resolve_normalizer(
    normalizer: float | Tensor | None, weights: Tensor | None, count: int, dtype: torch.dtype, device: torch.device
) -> float | Tensor:
    """Return the number by which the sums over positions are divided, at least as precise as ``dtype``.

    normalizer: the caller's, or None for the summed ``weights`` [N] of the ``count`` supervised positions (the count if
    ``weights`` is None). A tensor of 0 becomes ∞, so that a global batch without supervised tokens has loss 0 and zero
    gradients. Raises LimbeckError for a number that is not positive and, on a CPU, for a negative tensor and for weights that
    sum to 0 or less without being 0. On a GPU that check would be a sync; the loss is then 0.
    """
    given = normalizer is not None
    if normalizer is None:
        if weights is None:
            return max(count, 1)
        normalizer = weights.sum(dtype=torch.promote_types(weights.dtype, torch.float32))
    elif not isinstance(normalizer, Tensor):
        if not normalizer > 0:
            raise LimbeckError(f"normalizer must be above 0, got {normalizer}; or leave it out.")
        return normalizer
    if normalizer.numel() != 1:
        raise LimbeckError(f"normalizer must be one number, got a tensor of shape {list(normalizer.shape)}.")
    normalizer = normalizer.detach().reshape(())
    if normalizer.device.type == "cpu":
        value = normalizer.item()
        if given and not value >= 0:
            raise LimbeckError(f"normalizer must not be negative, got {value}.")
        if not given and weights is not None and not value > 0 and bool((weights != 0).any()):
            raise LimbeckError(f"weights must sum to more than 0, got {value}; or give a normalizer.")
    normalizer = normalizer.to(device=device, dtype=torch.promote_types(normalizer.dtype, dtype))
    return torch.where(normalizer > 0, normalizer, torch.inf)
