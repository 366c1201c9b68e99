"""Which rows an epoch consists of when sources are mixed: a function of (seed, epoch), so that a run can go on anywhere.

The rows themselves are tokenised once, whatever the mixture. Their order within the epoch is the stream's business.
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
    """How sources are mixed; at most one of weights, temperature and domain_probs is given.

    weights: of each source, its share of an epoch's rows. temperature: shares proportional to rows^(1 / temperature), by
    domain. domain_probs: the share of each domain; they add up to 1. max_samples: of each source, how many of its rows are
    used at all, drawn once by the seed; None for all. num_samples: rows in an epoch; None for as many as there are.
    """

    weights: tuple[float | None, ...] = ()
    temperature: float | None = None
    domain_probs: Mapping[str, float] | None = None
    max_samples: tuple[int | None, ...] = ()
    num_samples: int | None = None


@dataclass(frozen=True, eq=False)
class Mixture:
    """Bins of rows and how many of each an epoch takes.

    A bin is walked through in a shuffled order, then in another one, and so on; an epoch goes on where the last one
    stopped. So no row of a bin comes more than once oftener than another, over any number of epochs.
    """

    names: tuple[str, ...]
    bins: tuple[Ints, ...]
    counts: tuple[int, ...]
    seed: int

    def rows_of_epoch(self, epoch: int) -> Ints:
        """[rows of an epoch] numbers of rows, with repetitions, in a fixed order."""
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
    """The mixture that the settings ask for, or None if every epoch is simply all rows.

    Raises LimbeckError if a share is asked of something that has no rows, or more rows than there are.
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
    wanted = total if settings.num_samples is None else settings.num_samples
    if wanted > total and not proportions:
        raise LimbeckError(
            f"num_samples = {wanted} is more than the {total} rows there are; lower it, or give the sources weights, "
            "with which rows are repeated."
        )
    if not any(share > 0 for share in shares):
        raise LimbeckError("every share of the mixture is 0; give at least one source or domain a share above 0.")
    counts = _rounded(shares, wanted)
    for name, rows, share in zip(names, bins, shares, strict=True):
        if share > 0 and not len(rows):
            raise LimbeckError(f"{name} has a share in the mixture, but no row that can be learned from; take it out.")
    kept = [i for i, count in enumerate(counts) if count]
    return Mixture(tuple(names[i] for i in kept), tuple(bins[i] for i in kept), tuple(counts[i] for i in kept), seed)


def _capped(groups: NDArray[np.int32], report: DataReport, settings: MixtureSettings, seed: int) -> NDArray[np.bool_]:
    """[rows] which rows are used at all."""
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
        raise LimbeckError("some sources have a weight and some have none; give each one its weight.")
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
    """Whole numbers that add up to ``total``, each less than one away from its share (largest remainders)."""
    exact = np.asarray(shares, dtype=np.float64) / np.sum(shares) * total
    counts = np.floor(exact).astype(np.int64)
    first = np.argsort(-(exact - counts), kind="stable")[: total - int(counts.sum())]
    counts[first] += 1
    return [int(count) for count in counts]
