"""TAID's schedule for t, which moves the target from the student to the teacher (arXiv 2501.16937, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import LimbeckError


class TaidSchedule:
    """The parameter t of the divergence ``taid``: a tensor on ``device`` that ``update`` changes in place, without a sync.

    After a step with divergence J_n, at the fraction ``progress`` of the run:

        δ = (J_{n−1} − J_n) / J_{n−1}
        m ← β m + (1 − β) δ
        t ← min(t_end, max(t_start + (t_end − t_start) · progress, t + α σ(m) (1 − t)))

    with α = ``rate`` and β = ``momentum``. Raises LimbeckError for parameters outside their range.
    """

    def __init__(
        self,
        t_start: float = 0.4,
        t_end: float = 1.0,
        rate: float = 5e-4,
        momentum: float = 0.99,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 <= t_start <= t_end <= 1:
            raise LimbeckError(f"taid needs 0 <= t_start <= t_end <= 1, got {t_start} and {t_end}.")
        if not (rate >= 0 and 0 <= momentum < 1):
            raise LimbeckError(f"taid needs rate >= 0 and momentum in [0, 1), got {rate} and {momentum}.")
        self._start, self._end, self._rate, self._momentum = t_start, t_end, rate, momentum
        self.t, self._mean, self._previous = (
            torch.tensor(x, dtype=torch.float32, device=device) for x in (t_start, 0.0, float("inf"))
        )

    def update(self, divergence: Tensor, progress: float) -> None:
        """Update t after an optimizer step. divergence: 0-dim, the mean over the global batch. progress: in [0, 1]."""
        now = divergence.detach().to(self.t.dtype)
        now = torch.where(torch.isfinite(now), now, self._previous)  # a step with an overflow is skipped
        change = torch.where(self._previous > 0, (self._previous - now) / self._previous, 0)
        first = torch.isinf(self._previous)
        mean = self._momentum * self._mean + (1 - self._momentum) * change
        self._mean.copy_(torch.where(first, self._mean, mean))
        step = torch.where(first, 0.0, self._rate * torch.sigmoid(self._mean) * (1 - self.t))
        least = self._start + (self._end - self._start) * progress
        self.t.copy_((self.t + step).clamp(min=least, max=self._end))
        self._previous.copy_(now)

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint: three numbers."""
        return {"t": self.t.item(), "mean": self._mean.item(), "previous": self._previous.item()}

    def load_state(self, state: dict[str, float]) -> None:
        """Restore what ``state`` returned."""
        for name, tensor in (("t", self.t), ("mean", self._mean), ("previous", self._previous)):
            tensor.fill_(state[name])
