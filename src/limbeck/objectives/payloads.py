"""What a teacher can say of a position when it does not send hidden states, and what is assumed of the tokens it left out.

Shapes: N positions, V vocabulary, k tokens kept. Log-probabilities are normalised over the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from limbeck.errors import LimbeckError

TAILS = ("renormalize", "bucket", "drop", "uniform", "zero")
"""What becomes of the tokens outside the teacher's k (P, Q: both models' mass on the k):

renormalize: both distributions are renormalised over the k; the rest is invisible (ROLL, NeMo-RL, ModelOpt on Megatron).
bucket: the rest is one further token with the masses 1 − P and 1 − Q; a lower bound of the forward KL (TRL, verl, and
DistillKit's "symmetric_uniform"). drop: the sum stops after the k; may be negative. uniform: the teacher's 1 − P is spread
evenly over the rest. zero: the teacher is renormalised over the k and has e⁻¹⁰⁰ elsewhere, the student keeps its whole
distribution (NeMo-RL's zero_outside_topk).
"""


@dataclass(frozen=True)
class TopK:
    """log_probs [N, k] of the tokens indices [N, k], at the teacher's ``temperature``; −∞ is a token of probability 0."""

    log_probs: Tensor
    indices: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.log_probs.dim() != 2 or self.log_probs.shape != self.indices.shape or self.indices.is_floating_point():
            raise LimbeckError(
                "TopK takes log_probs [N, k] of the tokens indices [N, k] (whole numbers), got "
                f"{list(self.log_probs.shape)} and {list(self.indices.shape)} {self.indices.dtype}."
            )
        if not self.indices.shape[1]:
            raise LimbeckError("TopK needs at least one token at each position, got k = 0.")
        if not self.temperature > 0:
            raise LimbeckError(f"TopK's temperature must be above 0, got {self.temperature}.")

    def at(self, temperature: float, tail: str) -> Tensor:
        """The log-probabilities [N, k] at another temperature, up to a constant per row.

        Σ over the whole vocabulary is then unknown, so only ``tail="renormalize"`` and ``"zero"`` can follow a change;
        others raise LimbeckError.
        """
        if temperature == self.temperature:
            return self.log_probs
        if tail not in ("renormalize", "zero"):
            raise LimbeckError(
                f"top-k log-probabilities stored at temperature {self.temperature} cannot be brought to {temperature} with "
                f"tail={tail!r}, because the mass outside the k is unknown there; store them at {temperature}, or use "
                'tail="renormalize".'
            )
        return self.log_probs * (self.temperature / temperature)


@dataclass(frozen=True)
class Logits:
    """The teacher's whole logits [N, V]; −∞ is a token of probability 0."""

    logits: Tensor

    def __post_init__(self) -> None:
        _check_dims("Logits", "logits [N, V]", self.logits, 2)


@dataclass(frozen=True)
class Sampled:
    """log_probs [N] of the tokens in the labels, which the student has drawn, at the teacher's ``temperature``; for the
    objectives k1, k2 and k3. One log-probability cannot be brought to another temperature, so the objective's must be the same.
    """

    log_probs: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_dims("Sampled", "log_probs [N]", self.log_probs, 1)


def _check_dims(kind: str, wanted: str, tensor: Tensor, dims: int) -> None:
    if tensor.dim() != dims:
        raise LimbeckError(f"{kind} takes {wanted}, got {list(tensor.shape)}.")


Signal = TopK | Logits | Sampled
