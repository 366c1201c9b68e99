"""The loss term for intermediate features of student and teacher."""

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
    """The losses of pairs of submodules, with their projections.

    Args:
        losses: the loss of each pair.
        taps: capture the outputs of the student's submodules.
        labels: name of each pair in the metrics.
        weight: factor of the mean over the pairs in the loss.
        supervised_only: compare at supervised positions, with their weights and divided by their global number. Otherwise
            compare at every token that is not padding, divided by the global number of these tokens.
        computed: indices of the labels whose losses are computed here; None for all.
    """

    def __init__(
        self,
        losses: FeatureLosses,
        taps: HiddenStateCapture,
        labels: Sequence[str],
        *,
        weight: float,
        supervised_only: bool,
        computed: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.losses = losses
        self.taps = taps  # not a module list, so that the captured submodules do not become submodules of this one
        self.labels = tuple(labels)
        self.weight = weight
        self.supervised_only = supervised_only
        self._computed = tuple(range(len(self.labels))) if computed is None else tuple(computed)

    @property
    def is_divided(self) -> bool:
        """Whether other pairs are computed elsewhere."""
        return len(self._computed) < len(self.labels)

    def per_pair(self) -> Features:
        """The same term, with new projections that no two pairs share."""
        losses = self.losses.per_pair()
        return Features(losses, self.taps, self.labels, weight=self.weight, supervised_only=self.supervised_only)

    def on(self, taps: HiddenStateCapture) -> Features | None:
        """The term of the pairs whose student submodule ``taps`` holds, which has the names of all; None if it holds none.

        The losses of other pairs are 0 there, so the terms of all layers sum to the whole term.
        """
        computed = [i for i, module in enumerate(taps.modules) if module is not None]
        if not computed:
            return None
        return Features(
            self.losses.only(computed),
            taps,
            self.labels,
            weight=self.weight,
            supervised_only=self.supervised_only,
            computed=computed,
        )

    def forward(
        self, found: dict[str, Tensor], batch: Batch, signal: Signal, normalizer: float | Tensor, tokens: float | Tensor
    ) -> Tensor:
        """The loss of each pair, [pairs].

        Args:
            found: outputs of the student's submodules.
            batch: the micro-batch.
            signal: with the outputs of the teacher's submodules.
            normalizer: global number of supervised tokens.
            tokens: global number of tokens that are not padding.
        """
        positions = batch.supervised if self.supervised_only else batch.real
        student = self.taps.rows(found, batch.labels.shape, positions)
        teacher = [signal.features[i] for i in self._computed]
        if self.supervised_only:
            losses = self.losses(student, teacher, normalizer, batch.weights)
        else:
            losses = self.losses(student, teacher, tokens)
        if not self.is_divided:
            return losses
        by_pair, nothing = dict(zip(self._computed, losses, strict=True)), losses.new_zeros(())
        return torch.stack([by_pair.get(i, nothing) for i in range(len(self.labels))])


def make_features(config: DistillConfig, student: Any, teacher: Teacher | None) -> Features | None:
    """Create the feature term of a configuration, and capture the outputs of the teacher's submodules.

    Both models run once to find the widths of the outputs.

    Returns:
        None if there are no pairs or there is no teacher.

    Raises:
        LimbeckError: if a name or a shape does not fit the models.
    """
    settings = config.features
    if not settings.pairs or teacher is None:
        return None
    if not isinstance(teacher, LocalTeacher):
        raise LimbeckError(
            "features.pairs needs the teacher's hidden layers, which are not sent between worker groups; set "
            "teacher.device_mapping to the student's devices."
        )
    trunk = body(student)
    pairs = resolve_pairs(settings.pairs, submodules(trunk), teacher.model.submodules())
    taps = HiddenStateCapture.from_names(trunk, [pair.student for pair in pairs], "student")
    supervised_only = settings.mask == "supervised"
    widths = teacher.capture([pair.teacher for pair in pairs], supervised_only=supervised_only)
    with torch.enable_grad():
        ours = taps.probe(trunk)
    for pair, rows in zip(pairs, ours, strict=True):
        if not rows.requires_grad:
            raise LimbeckError(
                f"features.pairs: all parameters up to the student's {pair.student} are frozen, so its loss trains nothing; "
                "name a later submodule, or freeze fewer parameters."
            )
    losses = FeatureLosses(
        [pair.loss for pair in pairs],
        [(rows.shape[-1], width) for rows, width in zip(ours, widths, strict=True)],
        shared=settings.projection == "shared",
        seed=config.seed,
    )
    return Features(losses, taps, _labels(pairs), weight=settings.weight, supervised_only=supervised_only)


def _labels(pairs: Sequence[NamedPair]) -> list[str]:
    """The name of each pair in the metrics: the student's submodule, with teacher and loss if that is ambiguous."""
    often = Counter(pair.student for pair in pairs)
    return [
        pair.student if often[pair.student] == 1 else f"{pair.student}:{pair.teacher}:{pair.loss}" for pair in pairs
    ]
