"""What a teacher says about a batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from limbeck.objectives import OutputHead


@dataclass(frozen=True)
class Signal:
    """The teacher's last hidden states at the supervised positions, with its head: the whole distribution, exactly.

    hidden: [supervised, H_teacher], in the order of the batch's flattened supervised positions (of its translation's, if it
    has one). head: the same object for every batch. features: the outputs of the submodules that are tapped, each [rows, its
    width], if any are.
    """

    hidden: Tensor
    head: OutputHead
    features: tuple[Tensor, ...] = ()
