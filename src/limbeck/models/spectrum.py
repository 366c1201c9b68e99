"""Ranks the weight matrices of a model by their signal-to-noise ratio (Spectrum, arXiv:2406.06623).

The singular values s of a matrix [m, n] that random noise of standard deviation σ alone would have lie below the
Marchenko-Pastur edge σ (1 + √β), β = min(m, n) / max(m, n). Larger ones are signal:

    SNR = Σ_{s > edge} s / (Σ_{s ≤ edge} s · max s)        σ = interquartile range of s / 1.349

The division by the largest singular value is the paper's normalisation. Matrices of one kind, such as all ``mlp.down_proj``,
are ranked among themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.errors import LimbeckError

_IQR_OF_NORMAL = 1.349  # interquartile range of a normal distribution with standard deviation 1
_LAYER = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class RankedMatrix:
    """A parameter, its kind (the name with ``*`` for the numbers in it), its ratio, and whether it is selected."""

    name: str
    kind: str
    snr: float
    selected: bool


def rank_matrices(
    model: nn.Module, top_percent: float, device: torch.device, progress: Callable[[str], None] = lambda name: None
) -> list[RankedMatrix]:
    """The weight matrices of the layers of ``model``, by kind and falling ratio. Embeddings and output head are no layers.

    Stacked matrices [experts, m, n] are one entry with their mean ratio. One matrix at a time is copied to ``device``.

    Args:
        top_percent: the share of each kind that is selected, above 0 and at most 100; at least one matrix is.
        progress: called with the name of each matrix before it is computed.

    Raises:
        LimbeckError: if ``top_percent`` is out of range, if the model has no such matrices, or if one is not finite.
    """
    if not 0 < top_percent <= 100:
        raise LimbeckError(f"--top-percent {top_percent:g} must be above 0 and at most 100.")
    by_kind: dict[str, list[tuple[float, str]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim in (2, 3) and _LAYER.search(name):
            progress(name)
            stack = parameter.detach().reshape(-1, *parameter.shape[-2:])
            ratios = [signal_to_noise(matrix.to(device)) for matrix in stack]
            if not all(map(torch.isfinite, ratios)):
                raise LimbeckError(
                    f"{name} has infinite or undefined values, so it cannot be ranked; repair the checkpoint."
                )
            mean = torch.stack(ratios).mean().item()
            by_kind.setdefault(_LAYER.sub(".*", name), []).append((mean, name))
    if not by_kind:
        raise LimbeckError("the model has no weight matrices in numbered layers; name its parameters by hand.")
    ranked = []
    for kind, matrices in by_kind.items():
        count = max(1, int(len(matrices) * top_percent / 100))
        falling = sorted(matrices, key=lambda one: -one[0])  # stable: of equal ratios, the earlier layer
        ranked += [RankedMatrix(name, kind, snr, place < count) for place, (snr, name) in enumerate(falling)]
    return ranked


def signal_to_noise(matrix: Tensor) -> Tensor:
    """The ratio of a matrix [m, n], a 0-dim float64 tensor; 0 for a matrix of zeros."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    # The square roots of the eigenvalues of W Wᵀ; in float64 they are exact to 1e-8 of the largest, in a fraction of the
    # time of a singular value decomposition.
    gram = wide @ wide.T
    if not gram.isfinite().all():
        return gram.new_tensor(torch.nan)
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    if values[-1] == 0:
        return values[-1]
    quartiles = torch.quantile(values, values.new_tensor([0.25, 0.75]))
    sigma = (quartiles[1] - quartiles[0]) / _IQR_OF_NORMAL
    edge = sigma * (1 + (wide.shape[0] / wide.shape[1]) ** 0.5)
    is_signal = values > edge
    noise = values[~is_signal].sum().clamp_min(torch.finfo(torch.float64).tiny ** 0.5)
    return values[is_signal].sum() / (noise * values[-1])


def render_yaml(ranked: Sequence[RankedMatrix], title: str) -> str:
    """The selected parameters in Spectrum's format, with the ratios of all as comments."""
    lines = [f"# {title}", "# The number after each name is its signal-to-noise ratio.", "unfrozen_parameters:"]
    kind = None
    for one in ranked:
        if one.kind != kind:
            kind = one.kind
            lines.append(f"# {kind}")
        lines.append(f"{'-' if one.selected else '# not trained:'} {one.name}  # {one.snr:.4g}")
    return "\n".join(lines) + "\n"
