"""The clipped policy gradient of tokens that the student has sampled (PPO, Schulman et al., 2017).

    loss of a token y = −min(r A, clip(r, 1 − low, 1 + high) A)    r = q(y) / q_w(y)

q is the student now, and q_w the distribution that y was sampled from. The advantage A is a constant for the gradient. Where r
is 1, the gradient is −A ∇ log q(y).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.errors import LimbeckError


@dataclass(frozen=True)
class RolloutTokens:
    """What is known of labels that the student has sampled itself.

    Args:
        log_probs: [N], log q_w of each label; NaN where it was not sampled, which has no policy gradient.
        advantages: [N], added to the advantage; None if there are none.
        temperature: by which the student's logits are divided in q, as they were in q_w.
        clip: (low, high); None does not clip.
        student_log_probs: [N], overwritten with log q of each label (not with that of a position of weight 0, which may be
            NaN); None if it is not needed.

    Raises LimbeckError for shapes or numbers that do not fit.
    """

    log_probs: Tensor
    advantages: Tensor | None = None
    temperature: float = 1.0
    clip: tuple[float, float] | None = None
    student_log_probs: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("log_probs", "advantages", "student_log_probs"):
            given = getattr(self, name)
            if given is not None and (given.dim() != 1 or len(given) != len(self.log_probs)):
                raise LimbeckError(
                    f"RolloutTokens takes {name} [N] for the N of log_probs, got {list(given.shape)} and "
                    f"{list(self.log_probs.shape)}."
                )
        if not self.temperature > 0:
            raise LimbeckError(f"RolloutTokens needs a temperature above 0, got {self.temperature}.")
        if self.clip is not None and not (0 <= self.clip[0] <= 1 and self.clip[1] >= 0):
            raise LimbeckError(f"clip must be (low, high) with low in [0, 1] and high of 0 or more, got {self.clip}.")


def policy_gradient(
    log_q: Tensor, written: Tensor, advantages: Tensor, clip: tuple[float, float] | None
) -> tuple[Tensor, Tensor]:
    """Loss and its derivative for log q, both [n, 1], from log q, log q_w (NaN where nothing was sampled) and A, [n, 1]."""
    sampled = ~written.isnan()
    advantages = torch.where(sampled, advantages, 0.0)
    ratio = torch.where(sampled, log_q - written, 0.0).exp()
    value = ratio * advantages
    if clip is None:
        return -value, -value
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages
    return -torch.minimum(value, clipped), torch.where(value <= clipped, -value, 0.0)
