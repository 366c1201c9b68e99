"""A teacher in this process: no transport, no copy of logits, only hidden states that the loss reads where they lie."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.models import HiddenStateCapture, hidden_states
from limbeck.objectives import OutputHead
from limbeck.teachers.signals import Signal, SignalFuture, SignalSpec, TeacherRequest


class LocalTeacher:
    """A body (perhaps sharded over the processes) and its head, both frozen."""

    def __init__(self, model_body: nn.Module, head: OutputHead, num_parameters: int) -> None:
        self.body = model_body.eval().requires_grad_(False)
        self.head = head
        self.num_parameters = num_parameters
        self._taps, self._supervised_only = HiddenStateCapture(), False

    def tap(self, taps: HiddenStateCapture, *, supervised_only: bool) -> None:
        """From now on signals carry what ``taps`` find, at every token that is not padding or at the supervised ones."""
        self._taps, self._supervised_only = taps, supervised_only

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return len(self.head.weight)

    def ask(self, batch: Batch, wanted: SignalSpec) -> SignalFuture:
        """Nothing begins before the answer is needed: this teacher works on the student's own device. Nothing travels
        either, so that it gives its hidden states whatever is ``wanted``."""
        return self.signals

    def move(self, device: torch.device | str) -> None:
        """Keep body and head on ``device`` from now on."""
        self.body.to(device)
        bias = None if self.head.bias is None else self.head.bias.to(device)
        self.head = replace(self.head, weight=self.head.weight.to(device), bias=bias)

    def say(self, question: TeacherRequest) -> tuple[Tensor, ...]:
        """What is wanted of the positions that are asked about, as it travels."""
        return question.wanted.say(self.hidden(question), self.head)

    def signals(self, batch: Batch) -> Signal:
        """The signal for one micro-batch on the teacher's device, in the teacher's own tokens where the batch has them."""
        with self._taps.capture() as found:
            hidden = self.hidden(TeacherRequest.of(batch))
        if batch.teacher_tokens is not None:
            return Signal(hidden, self.head)
        places = batch.supervised if self._supervised_only else batch.real
        return Signal(hidden, self.head, self._taps.rows(found, batch.labels.shape, places))

    @torch.no_grad()
    def hidden(self, question: TeacherRequest) -> Tensor:
        """The last hidden states [supervised, H] at the positions that are asked about."""
        return self._states(question).flatten(0, 1).index_select(0, question.supervised)

    def _states(self, question: TeacherRequest) -> Tensor:
        return hidden_states(self.body, question.input_ids, question.position_ids, question.documents)
