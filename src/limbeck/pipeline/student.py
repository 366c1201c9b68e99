"""The student as one root module: body, output head and loss.

The loss is computed inside the root's forward, so that whatever wraps the root (FSDP2, a pipeline stage) gathers the head's
parameters and reduces their gradients with its own hooks. Projections of intermediate features live here for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from limbeck.data.batch import Batch
from limbeck.models import Taps, body, hidden_states, output_head
from limbeck.objectives import (
    CrossTokenizer,
    DistillationLoss,
    Objective,
    OutputHead,
    VocabParallel,
    cross_tokenizer_distillation,
    fused_linear_distillation,
    modelopt_balance,
)
from limbeck.pipeline.features import Features
from limbeck.pipeline.parity import Faults
from limbeck.teachers import Signal


class StudentLoss(NamedTuple):
    """What a micro-batch costs. distillation: the diagnostics, its ``loss`` being the whole; features: [pairs], detached."""

    distillation: DistillationLoss
    features: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """What is minimised."""
        return self.distillation.loss


class StudentWithLoss(nn.Module):
    """A Hugging Face causal language model that answers a batch with its loss.

    features: the term for intermediate features, or None. balance: ``weighted`` adds it to the logits' loss; ``modelopt``
    scales every part to the size of another, with w / (1 − w) for its kd_loss_scale, w being the objective's kd_weight.
    faults: of another system, in training alone. across: when the head holds a slice of the vocabulary. finish_gradients: to
    be called after a step's last backward.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        vocab_size: int,
        features: Features | None = None,
        balance: str = "weighted",
        compiled: bool | None = None,
        cross: CrossTokenizer | None = None,
        faults: Faults | None = None,
        across: VocabParallel | None = None,
        finish_gradients: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.vocab_size = vocab_size
        self.compiled = compiled
        self.cross = cross
        self.faults = faults
        self.across = across
        self.finish_gradients = finish_gradients
        self.fused: Callable[..., DistillationLoss] = fused_linear_distillation  # a plan's knows sizes alone
        self.features = features
        self.balance = balance

    def forward(
        self,
        batch: Batch,
        signal: Signal | None,
        normalizer: float | Tensor,
        tokens: float | Tensor = 1.0,
        micro_batches: int = 1,
    ) -> StudentLoss:
        """The loss of one micro-batch; ``normalizer`` is the global weight of supervised tokens (÷ ranks that average).

        ``tokens`` is the same for tokens that are not padding; only features that are compared at all of them need it. How
        many ``micro_batches`` a step has is asked for by a fault alone.
        """
        taps = Taps() if self.features is None else self.features.taps
        with taps.opened() as found:
            hidden = hidden_states(body(self.model), batch.input_ids, batch.position_ids, batch.documents)
        if self.faults is not None and self.training and signal is not None:
            divided = self.faults.normalizers(batch, micro_batches, normalizer, tokens)
            head, everything = output_head(self.model), hidden.flatten(0, 1)
            return StudentLoss(
                self.faults.loss(everything, head, batch, signal, self.objective, self.vocab_size, divided)
            )
        rows = hidden.flatten(0, 1).index_select(0, batch.supervised)
        pairs = None
        if self.features is not None and signal is not None:
            pairs = self.features(found, batch, signal, normalizer, tokens)
        if self.balance == "modelopt" and signal is not None:
            result = self._balanced(rows, batch, signal, normalizer, pairs)
        else:
            result = self._of_logits(self.objective, rows, batch, signal, normalizer)
            if self.features is not None and pairs is not None:
                result = result._replace(loss=result.loss + self.features.weight * pairs.mean())
        return StudentLoss(result, None if pairs is None else pairs.detach())

    def _balanced(
        self, rows: Tensor, batch: Batch, signal: Signal, normalizer: float | Tensor, pairs: Tensor | None
    ) -> DistillationLoss:
        """ModelOpt's total. Its ratios are known after the gradients are formed, so the two terms are walked one by one."""
        w = self.objective.kd_weight
        result = self._of_logits(replace(self.objective, kd_weight=1.0), rows, batch, signal, normalizer)
        ce = None
        if w < 1:
            ce = self._of_logits(replace(self.objective, kd_weight=0.0), rows, batch, None, normalizer).loss
        none = rows.new_zeros(0)
        total = modelopt_balance(result.loss, none if pairs is None else pairs, ce, w / (1 - w) if w < 1 else 1.0)
        return result._replace(loss=total)

    def _of_logits(
        self, objective: Objective, rows: Tensor, batch: Batch, signal: Signal | None, normalizer: float | Tensor
    ) -> DistillationLoss:
        labels = batch.labels.flatten().index_select(0, batch.supervised)
        if self.cross is not None and signal is not None and batch.translation is not None:
            return cross_tokenizer_distillation(
                rows,
                output_head(self.model),
                signal.hidden,
                signal.head,
                labels,
                batch.translation.labels,
                batch.translation.spans,
                cross=self.cross,
                objective=objective,
                weights=batch.weights,
                normalizer=normalizer,
            )
        return self.fused(
            rows,
            self._head(),
            None if signal is None else signal.hidden,
            None if signal is None else self._teacher_head(signal.head),
            labels,
            objective=objective,
            vocab_size=self.vocab_size,
            weights=batch.weights,
            normalizer=normalizer,
            all_supervised=True,
            across=self.across,
            compiled=self.compiled,
        )

    def _teacher_head(self, head: OutputHead) -> OutputHead:
        if self.across is None:
            return head
        columns = self.across.columns
        return replace(head, weight=head.weight[columns], bias=None if head.bias is None else head.bias[columns])

    def _head(self) -> OutputHead:
        head = output_head(self.model)
        if self.across is None:
            return head
        return replace(
            head,
            weight=head.weight.to_local() if isinstance(head.weight, DTensor) else head.weight,
            bias=head.bias.to_local() if isinstance(head.bias, DTensor) else head.bias,
        )
