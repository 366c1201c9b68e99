"""A teacher in this process: no transport, no copy of logits, only hidden states that the loss reads where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.models import Taps, hidden_states
from limbeck.objectives import OutputHead
from limbeck.teachers.signal import Signal


class LocalTeacher:
    """A body (perhaps sharded over the processes) and its head, both frozen."""

    def __init__(self, model_body: nn.Module, head: OutputHead, num_parameters: int) -> None:
        self.body = model_body.eval().requires_grad_(False)
        self.head = head
        self.num_parameters = num_parameters
        self._taps, self._supervised_only = Taps(), False

    def tap(self, taps: Taps, *, supervised_only: bool) -> None:
        """From now on signals carry what ``taps`` find, at every token that is not padding or at the supervised ones."""
        self._taps, self._supervised_only = taps, supervised_only

    @torch.no_grad()
    def signals(self, batch: Batch) -> Signal:
        """The signal for one micro-batch on the teacher's device, in the teacher's own tokens where the batch has them."""
        if batch.translation is not None:
            hidden = self._hidden(batch.translation.input_ids, None, None)
            return Signal(hidden.flatten(0, 1).index_select(0, batch.translation.supervised), self.head)
        with self._taps.opened() as found:
            hidden = self._hidden(batch.input_ids, batch.position_ids, batch.documents)
        features = self._taps.rows(found, batch.labels.shape, batch.supervised if self._supervised_only else batch.real)
        return Signal(hidden.flatten(0, 1).index_select(0, batch.supervised), self.head, features)

    def keep_columns(self, columns: slice) -> None:
        """From now on the head is that of a slice of the vocabulary."""
        bias = None if self.head.bias is None else self.head.bias[columns].clone()
        self.head = replace(self.head, weight=self.head.weight[columns].clone(), bias=bias)

    def _hidden(self, ids: Tensor, positions: Tensor | None, documents: Sequence[int] | None) -> Tensor:
        return hidden_states(self.body, ids, positions, documents)
