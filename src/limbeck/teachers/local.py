"""A teacher in this process: no transport, no copy of logits, only hidden states that the loss reads where they lie."""

from __future__ import annotations

import torch
from torch import nn

from limbeck.data.batch import Batch
from limbeck.models import hidden_states
from limbeck.objectives import OutputHead
from limbeck.teachers.signal import Signal


class LocalTeacher:
    """A body (perhaps sharded over the processes) and its head, both frozen."""

    def __init__(self, model_body: nn.Module, head: OutputHead, num_parameters: int) -> None:
        self.body = model_body.eval().requires_grad_(False)
        self.head = head
        self.num_parameters = num_parameters

    @torch.no_grad()
    def signals(self, batch: Batch) -> Signal:
        """The signal for one micro-batch on the teacher's device, in the teacher's own tokens where the batch has them."""
        if batch.translation is not None:
            hidden = hidden_states(self.body, batch.translation.input_ids, None)
            return Signal(hidden.flatten(0, 1).index_select(0, batch.translation.supervised), self.head)
        hidden = hidden_states(self.body, batch.input_ids, batch.position_ids)
        return Signal(hidden.flatten(0, 1).index_select(0, batch.supervised), self.head)
