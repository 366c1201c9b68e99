"""The student as one root module: body, output head and loss.

The loss is computed inside the root's forward, so that whatever wraps the root (FSDP2, a pipeline stage) gathers the head's
parameters and reduces their gradients with its own hooks. Projections of intermediate features live here for the same reason.
In a pipeline each stage has such a root around its part of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from limbeck.data.batch import Batch
from limbeck.models import Taps, body, hidden_states, output_head
from limbeck.objectives import (
    CrossTokenizer,
    DistillationLoss,
    Logits,
    Objective,
    OutputHead,
    TopK,
    VocabParallel,
    cross_tokenizer_distillation,
    fused_linear_distillation,
    modelopt_balance,
)
from limbeck.strategies.pipeline_engine import StageModule
from limbeck.strategies.pipeline_parallel import PipelineGroup
from limbeck.teachers import Signal
from limbeck.train.features import Features
from limbeck.train.reference_quirks import ReferenceQuirks


class StudentLoss(NamedTuple):
    """What a micro-batch costs. distillation: the diagnostics, its ``loss`` being the whole; features: [pairs], detached."""

    distillation: DistillationLoss
    features: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """What is minimised."""
        return self.distillation.loss

    def detached(self) -> StudentLoss:
        """The same without the way back to the gradients."""
        return self._replace(distillation=self.distillation._replace(loss=self.loss.detach()))


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
        faults: ReferenceQuirks | None = None,
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

    @property
    def state_names(self) -> Collection[str]:
        """The names of the whole state."""
        return self.state_dict().keys()

    @property
    def trained_names(self) -> Collection[str]:
        """The names of the parameters that are trained."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    @property
    def num_parameters(self) -> int:
        """Of the student, the projections of features left out."""
        return sum(parameter.numel() for parameter in self.model.parameters())

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
        return self.loss(hidden, batch, signal, normalizer, tokens, found)

    def loss(
        self,
        hidden: Tensor,
        batch: Batch,
        signal: Signal | None,
        normalizer: float | Tensor,
        tokens: float | Tensor,
        found: Mapping[str, Tensor],
    ) -> StudentLoss:
        """What follows the body: the loss of its last ``hidden`` states [batch, time, hidden], and of features ``found``."""
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
            assert signal.hidden is not None and signal.head is not None
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
            None if signal is None or signal.head is None else self._teacher_head(signal.head),
            labels,
            teacher=None if signal is None else self._said(signal.said),
            objective=objective,
            vocab_size=self.vocab_size,
            weights=batch.weights,
            normalizer=normalizer,
            all_supervised=True,
            reducer=self.across,
            compiled=self.compiled,
        )

    def _teacher_head(self, head: OutputHead) -> OutputHead:
        if self.across is None:
            return head
        columns = self.across.columns
        return replace(head, weight=head.weight[columns], bias=None if head.bias is None else head.bias[columns])

    def _said(self, said: TopK | Logits | None) -> TopK | Logits | None:
        if self.across is None or not isinstance(said, Logits):
            return said
        return Logits(said.logits[:, self.across.columns])

    def _head(self) -> OutputHead:
        head = output_head(self.model)
        if self.across is None:
            return head
        return replace(
            head,
            weight=head.weight.to_local() if isinstance(head.weight, DTensor) else head.weight,
            bias=head.bias.to_local() if isinstance(head.bias, DTensor) else head.bias,
        )


@dataclass(frozen=True)
class Outline:
    """What is known of a whole student before it is divided into stages.

    state: the names of its state, under a root; trained: those of its trained parameters; parameters: their number in all;
    width: of its hidden states; tied: the names of embeddings and output head where they are one parameter.
    """

    state: tuple[str, ...]
    trained: frozenset[str]
    parameters: int
    width: int
    tied: tuple[str, str] | None

    @classmethod
    def of(cls, model: Any) -> Outline:
        """The outline of a Hugging Face causal language model."""
        trained = {f"model.{name}" for name, parameter in model.named_parameters() if parameter.requires_grad}
        every, head = model.named_parameters(remove_duplicate=False), output_head(model).weight
        names = [f"model.{name}" for name, parameter in every if parameter is head]
        return cls(
            tuple(f"model.{name}" for name in model.state_dict()),
            frozenset(trained),
            sum(parameter.numel() for parameter in model.parameters()),
            model.config.get_text_config().hidden_size,
            (names[0], names[-1]) if len(names) > 1 else None,
        )


class StudentStage(StudentWithLoss, StageModule):
    """The root of one stage of a pipeline: hidden states for the next stage, or on the last one the loss.

    outline: of the whole student. The rest is ``StudentWithLoss``'s.
    """

    def __init__(self, *args: Any, stages: PipelineGroup, outline: Outline) -> None:
        super().__init__(*args)
        self.stages, self.outline, self.width = stages, outline, outline.width
        self._work: Iterator[Sequence[Any]] = iter(())
        self._slots = 0

    @property
    def state_names(self) -> Collection[str]:
        return self.outline.state

    @property
    def trained_names(self) -> Collection[str]:
        return self.outline.trained

    @property
    def num_parameters(self) -> int:
        return self.outline.parameters

    def slots(self, inputs: Sequence[Any]) -> int:
        batch: Batch = inputs[0]
        return batch.input_ids.numel()

    def begin(self, work: Sequence[Sequence[Any]], slots: int) -> None:
        self._work, self._slots, self.results = iter(work), slots, []

    def forward(self, message: Tensor) -> Tensor:  # type: ignore[override]
        """message: [slots, width], the hidden states of the stage before and what fills them up; nothing on the first stage."""
        batch, signal, normalizer, tokens, *_ = next(self._work)
        shape, used = batch.input_ids.shape, batch.input_ids.numel()
        received = None if self.stages.is_first else message[:used].unflatten(0, shape)
        hidden = hidden_states(body(self.model), batch.input_ids, batch.position_ids, batch.documents, received)
        if not self.stages.is_last:
            return nn.functional.pad(hidden.flatten(0, 1), (0, 0, 0, self._slots - used))
        result = self.loss(hidden, batch, signal, normalizer, tokens, {})
        self.results.append(result.detached())
        return torch.stack([result.loss])  # FSDP2 warns of what is a view
