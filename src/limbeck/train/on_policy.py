"""What the loss reads of tokens that the student has written: policy gradient, and the check of the writer's probabilities."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.config import DistillConfig
from limbeck.data.batch import Batch
from limbeck.objectives import RolloutTokens
from limbeck.strategies.world import World

GAP_METRICS = ("rollout/log_prob_gap_mean", "rollout/log_prob_gap_max", "rollout/log_prob_gap_share")


class LogProbGap:
    """Compares the log-probabilities of written tokens: the generator's with the student's in training.

    Of tokens that the current weights have written they are those of one distribution, so a large difference is a mistake in
    the setup. Of others they also differ by what the student has learned since. Sums stay on the device until a log line is
    written.

    Args:
        device: of the student.
        limit: difference of a token, in nats, from which it counts for the share. A mean above it is warned about once, over
            tokens that the current weights have written.
    """

    def __init__(self, device: torch.device, limit: float) -> None:
        self._limit, self._warned = limit, False
        # Of the differences; tokens off by more; tokens. Of what the current weights have written, and of the rest.
        self._sums = torch.zeros(2, 3, dtype=torch.float64, device=device)
        self._largest = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, written: Tensor, computed: Tensor, is_stale: bool = False) -> None:
        """Add the tokens of a micro-batch, [n] each. NaN in either is not compared. is_stale: older weights wrote them."""
        gap = (written.double() - computed.double()).abs()
        known = ~gap.isnan()
        gap = torch.where(known, gap, 0.0)
        self._sums[int(is_stale)] += torch.stack([gap.sum(), (gap > self._limit).sum().double(), known.sum().double()])
        self._largest = torch.maximum(self._largest, torch.cat([gap, gap.new_zeros(1)]).amax())

    def read(self, world: World) -> dict[str, float]:
        """Return the metrics since the previous call, empty if no token was compared, and reset them. Collective."""
        sums = world.sum(self._sums)
        (total, over, tokens), (of_current, _, current) = sums.sum(0).tolist(), sums[0].tolist()
        largest = world.max(self._largest.item())
        self._sums.zero_()
        self._largest.zero_()
        if not tokens:
            return {}
        mean = of_current / max(current, 1)
        if mean > self._limit and not self._warned and world.is_main:
            self._warned = True
            warnings.warn(
                f"The generator's log-probabilities of what it has written differ from the student's in training by {mean:.3f} "
                f"on average, which is more than rollout.log_prob_gap_limit = {self._limit}. Usual causes: the generator "
                "computes in another dtype, has not received the weights of the last step or the tied output head, samples at "
                "another temperature, or reads the prompt with another chat template.",
                stacklevel=2,
            )
        return dict(zip(GAP_METRICS, (total / tokens, largest, over / tokens), strict=True))


@dataclass(frozen=True)
class OnPolicyLoss:
    """How the loss reads written tokens.

    temperature: by which the logits were divided when they were written. clip: of the policy gradient, or None. gap: compares
    the log-probabilities.
    """

    temperature: float
    clip: tuple[float, float] | None
    gap: LogProbGap

    @classmethod
    def from_config(cls, config: DistillConfig, device: torch.device) -> OnPolicyLoss | None:
        """None if nothing is written, or if top_p or top_k change the distribution that it is sampled from."""
        rollout = config.rollout
        if rollout is None or rollout.truncates:
            return None
        # Of what is written greedily, the generator reports the probability at temperature 1.
        gap = LogProbGap(device, rollout.log_prob_gap_limit)
        clip = None if rollout.policy_clip is None else (rollout.policy_clip[0], rollout.policy_clip[1])
        return cls(rollout.temperature or 1.0, clip, gap)

    def tokens(self, batch: Batch) -> RolloutTokens | None:
        """The written tokens of ``batch``, with room for the student's log-probabilities; None if there are none."""
        log_probs = batch.sampled_log_probs
        if log_probs is None:
            return None
        computed = torch.full_like(log_probs, torch.nan)
        return RolloutTokens(log_probs, batch.advantages, self.temperature, self.clip, computed)

    def compare(self, tokens: RolloutTokens, batch: Batch) -> None:
        """Compare the log-probabilities of the tokens of ``batch``, whose loss has been computed."""
        assert tokens.student_log_probs is not None
        self.gap.add(tokens.log_probs, tokens.student_log_probs, batch.is_stale)
