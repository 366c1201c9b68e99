"""Mixing sources: which rows an epoch consists of, as a function of (seed, epoch).

Rows are tokenised once, whatever the mixture. ``stream`` decides their order within the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from limbeck.data.examples import DataReport, Examples
from limbeck.errors import LimbeckError

Ints = NDArray[np.int64]

_CAP, _PASS = 1, 2  # keep the two kinds of random choice apart


@dataclass(frozen=True)
class MixtureSettings:
    """How sources are mixed. At most one of weights, temperature and domain_probs is set.

    weights:      share of each source in the rows of an epoch.
    temperature:  the share of each domain is proportional to rows^(1 / temperature).
    domain_probs: share of each domain; they add up to 1.
    max_samples:  maximum number of rows of each source, sampled once with the seed; None for all.
    num_samples:  rows in an epoch; None for as many as there are.
    """

    weights: tuple[float | None, ...] = ()
    temperature: float | None = None
    domain_probs: Mapping[str, float] | None = None
    max_samples: tuple[int | None, ...] = ()
    num_samples: int | None = None


@dataclass(frozen=True, eq=False)
class Mixture:
    """Bins of rows, and how many rows of each bin an epoch takes.

    A bin is iterated in one shuffled order after another, and an epoch continues where the last one stopped. Over any number
    of epochs, the counts of two rows of a bin differ by at most one.
    """

    names: tuple[str, ...]
    bins: tuple[Ints, ...]
    counts: tuple[int, ...]
    seed: int

    def rows_of_epoch(self, epoch: int) -> Ints:
        """Returns the row numbers of an epoch, which may repeat, in increasing order."""
        parts = []
        for number, (rows, count) in enumerate(zip(self.bins, self.counts, strict=True)):
            start = epoch * count
            for turn in range(start // len(rows), -(-(start + count) // len(rows))) if count else ():
                shuffled = np.random.default_rng((self.seed, _PASS, number, turn)).permutation(rows)
                parts.append(shuffled[max(start - turn * len(rows), 0) : start + count - turn * len(rows)])
        return np.sort(np.concatenate(parts))

    def __str__(self) -> str:
        shares = "; ".join(
            f"{name}: {count:,} of {len(rows):,}"
            for name, rows, count in zip(self.names, self.bins, self.counts, strict=True)
        )
        return f"each epoch takes {sum(self.counts):,} rows ({shares})"


def mix(examples: Examples, report: DataReport, settings: MixtureSettings, seed: int) -> Mixture | None:
    """Returns the mixture of the settings, or None if every epoch has all rows once.

    Raises LimbeckError if a source or domain with a share has no rows, or ``num_samples`` exceeds the number of rows.
    """
    capped = any(cap is not None for cap in settings.max_samples)
    proportions = (
        any(weight is not None for weight in settings.weights) or settings.temperature or settings.domain_probs
    )
    if not (capped or proportions or settings.num_samples):
        return None
    groups = examples.groups if examples.groups is not None else np.zeros(len(examples), dtype=np.int32)
    usable = _capped(groups, report, settings, seed)
    if settings.domain_probs:
        names, bins, shares = _by_domain(settings.domain_probs, groups, usable, report)
    elif settings.temperature:
        names, bins, _ = _by_domain(None, groups, usable, report)
        # In logarithms, because a large power of a large number is no float.
        powers = np.log([len(rows) for rows in bins]) / settings.temperature
        shares = np.exp(powers - powers.max()).tolist()
    elif proportions:
        names, bins, shares = _by_source(settings.weights, groups, usable, report)
    else:
        names, bins, shares = ("all",), (np.flatnonzero(usable),), [1.0]
    total = int(usable.sum())
    requested = total if settings.num_samples is None else settings.num_samples
    if requested > total and not proportions:
        raise LimbeckError(
            f"num_samples = {requested} is more than the {total} rows of the data; lower it, or set the weights of the "
            "sources, which allow rows to repeat."
        )
    if not any(share > 0 for share in shares):
        raise LimbeckError("every share of the mixture is 0; give at least one source or domain a share above 0.")
    counts = _rounded(shares, requested)
    for name, rows, share in zip(names, bins, shares, strict=True):
        if share > 0 and not len(rows):
            raise LimbeckError(f"{name} has a share in the mixture, but no row with a supervised token; remove it.")
    kept = [i for i, count in enumerate(counts) if count]
    return Mixture(tuple(names[i] for i in kept), tuple(bins[i] for i in kept), tuple(counts[i] for i in kept), seed)


def _capped(groups: NDArray[np.int32], report: DataReport, settings: MixtureSettings, seed: int) -> NDArray[np.bool_]:
    """[rows] whether each row is used, after ``max_samples``."""
    usable = np.ones(len(groups), dtype=bool)
    source_of = np.array([source for source, _ in report.groups], dtype=np.int32)
    for source, cap in enumerate(settings.max_samples):
        if cap is None:
            continue
        rows = np.flatnonzero(source_of[groups] == source)
        usable[np.random.default_rng((seed, _CAP, source)).permutation(rows)[cap:]] = False
    return usable


def _by_source(
    weights: Sequence[float | None], groups: NDArray[np.int32], usable: NDArray[np.bool_], report: DataReport
) -> tuple[tuple[str, ...], tuple[Ints, ...], list[float]]:
    given = [weight for weight in weights if weight is not None]
    if len(given) < len(weights):
        raise LimbeckError("some sources have a weight and some have none; set the weight of every source.")
    source_of = np.array([source for source, _ in report.groups], dtype=np.int32)
    names = dict(reversed(report.groups))
    bins = tuple(np.flatnonzero(usable & (source_of[groups] == source)) for source in range(len(weights)))
    return tuple(names.get(source, f"source {source}") for source in range(len(weights))), bins, given


def _by_domain(
    probabilities: Mapping[str, float] | None, groups: NDArray[np.int32], usable: NDArray[np.bool_], report: DataReport
) -> tuple[tuple[str, ...], tuple[Ints, ...], list[float]]:
    domain_of = np.array([domain for _, domain in report.groups])
    there = list(dict.fromkeys(domain for _, domain in report.groups))
    if probabilities is not None:
        if set(probabilities) != set(there):
            raise LimbeckError(
                f"domain_interleave_probs names {', '.join(probabilities)}, and the data has the domains "
                f"{', '.join(there)}; name exactly those, with 0 for one to leave out."
            )
        if not math.isclose(sum(probabilities.values()), 1, abs_tol=1e-6):
            raise LimbeckError(
                f"domain_interleave_probs adds up to {sum(probabilities.values()):g}; its values must add up to 1."
            )
    bins = tuple(np.flatnonzero(usable & (domain_of == name)[groups]) for name in there)
    return tuple(there), bins, [1.0 if probabilities is None else probabilities[name] for name in there]


def _rounded(shares: Sequence[float], total: int) -> list[int]:
    """Integers that add up to ``total``, each less than 1 from its share (largest-remainder method)."""
    exact = np.asarray(shares, dtype=np.float64) / np.sum(shares) * total
    counts = np.floor(exact).astype(np.int64)
    first = np.argsort(-(exact - counts), kind="stable")[: total - int(counts.sum())]
    counts[first] += 1
    return [int(count) for count in counts]
