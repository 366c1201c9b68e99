"""Teacher signals other than hidden states: top-k log-probabilities, whole logits, log-probabilities of sampled tokens.

Shapes: N positions, V vocabulary, k tokens kept. Log-probabilities are normalized over the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from limbeck.errors import LimbeckError

TAILS = ("renormalize", "bucket", "drop", "uniform", "zero")
"""How the tokens outside the teacher's k are treated. P and Q are the probabilities of the k under teacher and student.

- renormalize: both distributions are renormalized over the k. The rest is ignored (ROLL, NeMo-RL, ModelOpt on Megatron).
- bucket: the rest is one further token with the probabilities 1 − P and 1 − Q. A lower bound of the forward KL (TRL, verl,
  and DistillKit's "symmetric_uniform").
- drop: the sum stops after the k. It may be negative.
- uniform: the teacher's 1 − P is spread evenly over the rest.
- zero: the teacher is renormalized over the k and has e⁻¹⁰⁰ elsewhere. The student keeps its whole distribution (NeMo-RL's
  zero_outside_topk).
"""


@dataclass(frozen=True)
class TopK:
    """Log-probabilities of the teacher's k most likely tokens at each position.

    Args:
        log_probs: [N, k], at ``temperature``. −∞ marks an unused entry of a position with fewer than k tokens. The loss treats
            its token like the tokens outside the k.
        indices: [N, k], the tokens, as integers. The index of an unused entry must be in the vocabulary and has no effect.
        temperature: by which the teacher's logits were divided.

    Raises LimbeckError for shapes, dtypes or a temperature that do not fit.
    """

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
        """Return the log-probabilities [N, k] at another temperature, up to a constant per row.

        The sum over the whole vocabulary is unknown there. Raises LimbeckError if the temperature changes and ``tail`` needs
        that sum, which is the case for all but ``renormalize`` and ``zero``.
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
    """The teacher's logits [N, V]. −∞ excludes a token: its probability is 0. Raises LimbeckError for another shape."""

    logits: Tensor

    def __post_init__(self) -> None:
        _check_dims("Logits", "logits [N, V]", self.logits, 2)


@dataclass(frozen=True)
class Sampled:
    """The teacher's log-probabilities of the tokens in ``labels``, which the student has sampled; for k1, k2 and k3.

    Args:
        log_probs: [N], at ``temperature``.
        temperature: must equal the objective's, because a single log-probability cannot be brought to another one.

    Raises LimbeckError for another shape.
    """

    log_probs: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_dims("Sampled", "log_probs [N]", self.log_probs, 1)


def _check_dims(kind: str, expected: str, tensor: Tensor, dims: int) -> None:
    if tensor.dim() != dims:
        raise LimbeckError(f"{kind} takes {expected}, got {list(tensor.shape)}.")


SignalPayload = TopK | Logits | Sampled
