"""The student as one root module: body, output head and loss.

The loss is computed inside the root's forward, so that whatever wraps the root (FSDP2, a pipeline stage) gathers the head's
parameters and reduces their gradients with its own hooks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.models import body, hidden_states, output_head
from limbeck.objectives import (
    CrossTokenizer,
    DistillationLoss,
    Objective,
    cross_tokenizer_distillation,
    fused_linear_distillation,
)
from limbeck.teachers import Signal


class StudentWithLoss(nn.Module):
    """A Hugging Face causal language model that answers a batch with its loss."""

    def __init__(
        self,
        model: Any,
        objective: Objective,
        vocab_size: int,
        compiled: bool | None = None,
        cross: CrossTokenizer | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.vocab_size = vocab_size
        self.compiled = compiled
        self.cross = cross

    def forward(self, batch: Batch, signal: Signal | None, normalizer: float | Tensor) -> DistillationLoss:
        """The loss of one micro-batch; ``normalizer`` is the global weight of supervised tokens (÷ ranks that average)."""
        hidden = hidden_states(body(self.model), batch.input_ids, batch.position_ids)
        if self.cross is not None and signal is not None and batch.translation is not None:
            return cross_tokenizer_distillation(
                hidden.flatten(0, 1).index_select(0, batch.supervised),
                output_head(self.model),
                signal.hidden,
                signal.head,
                batch.labels.flatten().index_select(0, batch.supervised),
                batch.translation.labels,
                batch.translation.spans,
                cross=self.cross,
                objective=self.objective,
                weights=batch.weights,
                normalizer=normalizer,
            )
        return fused_linear_distillation(
            hidden.flatten(0, 1).index_select(0, batch.supervised),
            output_head(self.model),
            None if signal is None else signal.hidden,
            None if signal is None else signal.head,
            batch.labels.flatten().index_select(0, batch.supervised),
            objective=self.objective,
            vocab_size=self.vocab_size,
            weights=batch.weights,
            normalizer=normalizer,
            all_supervised=True,
            compiled=self.compiled,
        )
