"""The loss term for intermediate features: which submodules are compared, at which tokens, and how the term joins the
loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.config import DistillConfig
from limbeck.data.batch import Batch
from limbeck.errors import LimbeckError
from limbeck.models import HiddenStateCapture, NamedPair, body, resolve_pairs, submodules
from limbeck.objectives import FeatureLosses
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.protocol import Teacher
from limbeck.teachers.signals import Signal


class Features(nn.Module):
    """The pairs' losses with their projections, and the taps on the student whose outputs they compare.

    weight: of the pairs' mean in the loss. supervised_only: compare at supervised positions (with their weights,
    divided by their global number) instead of at every token that is not padding (divided by the global number of
    these).
    """

    def __init__(
        self,
        losses: FeatureLosses,
        taps: HiddenStateCapture,
        labels: Sequence[str],
        *,
        weight: float,
        supervised_only: bool,
    ) -> None:
        super().__init__()
        self.losses = losses
        self.taps = taps  # no module list, so the tapped submodules are not taken for parts of this one
        self.labels = tuple(labels)
        self.weight = weight
        self.supervised_only = supervised_only

    def forward(
        self, found: dict[str, Tensor], batch: Batch, signal: Signal, normalizer: float | Tensor, tokens: float | Tensor
    ) -> Tensor:
        """[pairs]: each pair's loss. ``normalizer`` and ``tokens`` are global counts, of supervised and of real
        tokens.
        """
        positions = batch.supervised if self.supervised_only else batch.real
        student = self.taps.rows(found, batch.labels.shape, positions)
        if self.supervised_only:
            return self.losses(student, signal.features, normalizer, batch.weights)
        return self.losses(student, signal.features, tokens)


def make_features(config: DistillConfig, student: Any, teacher: Teacher | None) -> Features | None:
    """The feature term of a configuration, and taps on the teacher; None if no pairs are named.

    Both models are run once for the widths of the named outputs. Raises LimbeckError for names and shapes that do not
    fit.
    """
    settings = config.features
    if not settings.pairs or teacher is None:
        return None
    if not isinstance(teacher, LocalTeacher):
        raise LimbeckError(
            "features.pairs needs the teacher's inner states, which are not sent between worker groups; give "
            "teacher.device_mapping the student's devices."
        )
    trunk = body(student)
    pairs = resolve_pairs(settings.pairs, submodules(trunk), submodules(teacher.model.body))
    taps = HiddenStateCapture.from_names(trunk, [pair.student for pair in pairs], "student")
    teacher_taps = HiddenStateCapture.from_names(teacher.model.body, [pair.teacher for pair in pairs], "teacher")
    supervised_only = settings.mask == "supervised"
    with torch.enable_grad():
        ours = taps.probe(trunk)
    with torch.no_grad():
        theirs = teacher_taps.probe(teacher.model.body)
    for pair, rows in zip(pairs, ours, strict=True):
        if not rows.requires_grad:
            raise LimbeckError(
                f"features.pairs: everything that leads to the student's {pair.student} is frozen, so nothing there can "
                "learn; name a later submodule, or freeze less."
            )
    losses = FeatureLosses(
        [pair.loss for pair in pairs],
        [(s.shape[-1], t.shape[-1]) for s, t in zip(ours, theirs, strict=True)],
        shared=settings.projection == "shared",
        seed=config.seed,
    )
    teacher.capture(teacher_taps, supervised_only=supervised_only)
    return Features(losses, taps, _labels(pairs), weight=settings.weight, supervised_only=supervised_only)


def _labels(pairs: Sequence[NamedPair]) -> list[str]:
    """A name for each pair in the metrics: the student's submodule, with the rest where that is not enough."""
    often = Counter(pair.student for pair in pairs)
    return [
        pair.student if often[pair.student] == 1 else f"{pair.student}:{pair.teacher}:{pair.loss}" for pair in pairs
    ]
