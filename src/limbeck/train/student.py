"""The root module of the student: body, output head and loss.

The loss is computed in the forward pass of the root module, so that its wrapper (FSDP2, DeepSpeed or a pipeline stage)
gathers the parameters of the head and reduces their gradients with its own hooks. The projections of intermediate features
are submodules for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from limbeck.data.batch import Batch
from limbeck.models import HiddenStateCapture, body, hidden_states, output_head
from limbeck.objectives import (
    CrossTokenizer,
    DistillationLoss,
    Logits,
    Objective,
    OutputHead,
    SignalPayload,
    VocabParallel,
    cross_tokenizer_distillation,
    fused_linear_distillation,
    modelopt_balance,
)
from limbeck.strategies.pipeline_engine import StageModule
from limbeck.strategies.pipeline_parallel import PipelineGroup
from limbeck.strategies.world import World
from limbeck.teachers.signals import Signal
from limbeck.train.features import Features
from limbeck.train.on_policy import OnPolicyLoss
from limbeck.train.reference_quirks import ReferenceQuirks


@dataclass(frozen=True)
class TrainInput:
    """One micro-batch on the device with its signal.

    Attributes:
        batch: the micro-batch.
        signal: the teacher's signal; None without a teacher.
        normalizer: global weight of the supervised tokens, divided by the number of ranks whose gradients are averaged.
        num_tokens: the same for tokens that are not padding; the divisor of features at all tokens.
        micro_batches: number of micro-batches in the step.
    """

    batch: Batch
    signal: Signal | None
    normalizer: float | Tensor
    num_tokens: float | Tensor = 1.0
    micro_batches: int = 1


class StudentLoss(NamedTuple):
    """The loss of a micro-batch.

    Attributes:
        distillation: the loss, with the features, and its diagnostics.
        features: loss of each pair of intermediate features, [pairs], detached; None without features.
    """

    distillation: DistillationLoss
    features: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """The minimised loss, a scalar."""
        return self.distillation.loss

    def detached(self) -> StudentLoss:
        """The same values without the autograd graph."""
        return self._replace(distillation=self.distillation._replace(loss=self.loss.detach()))

    def plus(self, other: StudentLoss) -> StudentLoss:
        """The sum with another part of the loss of the same micro-batch."""
        parts = zip(self.distillation, other.distillation, strict=True)
        features = [found.features for found in (self, other) if found.features is not None]
        return StudentLoss(
            DistillationLoss(*(a + b for a, b in parts)), torch.stack(features).sum(0) if features else None
        )


@dataclass(frozen=True)
class LossSettings:
    """How the loss of a student is computed.

    Attributes:
        objective: the divergence and its weight.
        objectives: those of ``Batch.objectives``; a batch without these has ``objective``.
        vocab_size: size of the vocabulary that both models share.
        features: the term for intermediate features, or None.
        balance: ``weighted`` adds the features to the loss of the logits. ``modelopt`` scales each term to the size of
            another; ModelOpt's kd_loss_scale is then w / (1 − w), where w is the objective's kd_weight.
        compiled: compile the elementwise part of the loss; None decides by its size.
        cross: for a teacher with another tokenizer.
        quirks: of another system; used in training only.
        on_policy: how tokens that the student has written are read, or None.
    """

    objective: Objective
    vocab_size: int
    features: Features | None = None
    balance: str = "weighted"
    compiled: bool | None = None
    cross: CrossTokenizer | None = None
    quirks: ReferenceQuirks | None = None
    on_policy: OnPolicyLoss | None = None
    objectives: tuple[Objective, ...] = ()


class StudentWithLoss(nn.Module):
    """A Hugging Face causal language model whose forward pass computes the loss.

    Args:
        model: the model; it may be sharded or tensor-parallel.
        settings: of the loss.
        vocab_parallel: set if the output head is a slice of the vocabulary.
    """

    fused: Callable[..., DistillationLoss] = staticmethod(fused_linear_distillation)  # `limbeck plan` replaces it

    def __init__(self, model: Any, settings: LossSettings, vocab_parallel: VocabParallel | None = None) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.features = settings.features  # a submodule: its projections are trained
        self.vocab_parallel = vocab_parallel

    def forward(self, inputs: TrainInput | Callable[[Any], Any]) -> Any:
        """The loss of one micro-batch, ``StudentLoss``.

        In place of a micro-batch, a function may be given: it is called with the model and computes one pass of it, for which
        the wrappers of this module gather the parameters as for any other.
        """
        if not isinstance(inputs, TrainInput):
            return inputs(self.model)
        batch, signal, settings = inputs.batch, inputs.signal, self.settings
        taps = HiddenStateCapture() if self.features is None else self.features.taps
        with taps.capture() as found:
            hidden = hidden_states(
                body(self.model), batch.input_ids, batch.position_ids, batch.documents, cu_seqlens=batch.cu_seqlens
            )
        if settings.quirks is not None and self.training and signal is not None:
            divided = settings.quirks.normalizers(batch, inputs.micro_batches, inputs.normalizer, inputs.num_tokens)
            head, everything = output_head(self.model), hidden.flatten(0, 1)
            return StudentLoss(
                settings.quirks.loss(everything, head, batch, signal, settings.objective, settings.vocab_size, divided)
            )
        return self.loss(hidden, inputs, found)

    def loss(self, hidden: Tensor, inputs: TrainInput, found: Mapping[str, Tensor]) -> StudentLoss:
        """The loss from hidden states.

        Args:
            hidden: [batch, time, hidden], the last hidden states.
            inputs: the micro-batch with its signal.
            found: captured outputs of submodules, by name.
        """
        batch, signal, normalizer = inputs.batch, inputs.signal, inputs.normalizer
        rows = hidden.flatten(0, 1).index_select(0, batch.supervised)
        pairs = None
        if self.features is not None and signal is not None:
            pairs = self.features(found, batch, signal, normalizer, inputs.num_tokens)
        if self.settings.balance == "modelopt" and signal is not None:
            result = self._balanced(rows, batch, signal, normalizer, pairs)
        else:
            result = self._sum_of_objectives(rows, batch, signal, normalizer)
            if self.features is not None and pairs is not None:
                result = result._replace(loss=result.loss + self.features.weight * pairs.mean())
        return StudentLoss(result, None if pairs is None else pairs.detach())

    def _sum_of_objectives(
        self, rows: Tensor, batch: Batch, signal: Signal | None, normalizer: float | Tensor
    ) -> DistillationLoss:
        """The loss of each objective at its own positions; all fields of the result are sums over the objectives."""
        settings = self.settings
        present = [
            (objective, indices)
            for objective, indices in zip(settings.objectives, batch.objectives or (), strict=False)
            if len(indices)
        ]
        if len(present) < 2:  # all positions have one objective, or there are none
            objective = present[0][0] if present else settings.objective
            return self._logits_loss(objective, rows, batch, signal, normalizer)
        parts = [
            self._logits_loss(
                objective,
                rows[indices],
                batch.select(indices),
                None if signal is None else signal.select(indices),
                normalizer,
            )
            for objective, indices in present
        ]
        return DistillationLoss(*(torch.stack(values).sum(0) for values in zip(*parts, strict=True)))

    def _balanced(
        self, rows: Tensor, batch: Batch, signal: Signal, normalizer: float | Tensor, pairs: Tensor | None
    ) -> DistillationLoss:
        """ModelOpt's balanced loss. Its ratios depend on the values of the terms, so these are computed separately."""
        w = self.settings.objective.kd_weight
        result = self._logits_loss(replace(self.settings.objective, kd_weight=1.0), rows, batch, signal, normalizer)
        ce = None
        if w < 1:
            ce = self._logits_loss(replace(self.settings.objective, kd_weight=0.0), rows, batch, None, normalizer).loss
        none = rows.new_zeros(0)
        total = modelopt_balance(result.loss, none if pairs is None else pairs, ce, w / (1 - w) if w < 1 else 1.0)
        return result._replace(loss=total)

    def _logits_loss(
        self, objective: Objective, rows: Tensor, batch: Batch, signal: Signal | None, normalizer: float | Tensor
    ) -> DistillationLoss:
        labels = batch.labels.flatten().index_select(0, batch.supervised)
        if self.settings.cross is not None and signal is not None and batch.teacher_tokens is not None:
            assert signal.hidden is not None and signal.head is not None
            return cross_tokenizer_distillation(
                rows,
                output_head(self.model),
                signal.hidden,
                signal.head,
                labels,
                batch.teacher_tokens.labels,
                batch.teacher_tokens.spans,
                cross=self.settings.cross,
                objective=objective,
                weights=batch.weights,
                normalizer=normalizer,
            )
        on_policy = self.settings.on_policy
        written = None if on_policy is None else on_policy.tokens(batch)
        result = self.fused(
            rows,
            self._head(),
            None if signal is None else signal.hidden,
            None if signal is None or signal.head is None else self._teacher_head(signal.head),
            labels,
            teacher=None if signal is None else self._payload(signal.payload),
            objective=objective,
            vocab_size=self.settings.vocab_size,
            weights=batch.weights,
            normalizer=normalizer,
            all_supervised=True,
            reducer=self.vocab_parallel,
            compiled=self.settings.compiled,
            rollout=written,
        )
        if on_policy is not None and written is not None:
            on_policy.compare(written, batch)
        return result

    def _teacher_head(self, head: OutputHead) -> OutputHead:
        if self.vocab_parallel is None:
            return head
        columns = self.vocab_parallel.columns
        return replace(head, weight=head.weight[columns], bias=None if head.bias is None else head.bias[columns])

    def _payload(self, payload: SignalPayload | None) -> SignalPayload | None:
        if self.vocab_parallel is None or not isinstance(payload, Logits):
            return payload
        return Logits(payload.logits[:, self.vocab_parallel.columns])

    def _head(self) -> OutputHead:
        head = output_head(self.model)
        if self.vocab_parallel is None:
            return head
        return replace(
            head,
            weight=head.weight.to_local() if isinstance(head.weight, DTensor) else head.weight,
            bias=head.bias.to_local() if isinstance(head.bias, DTensor) else head.bias,
        )


class EarlierLayers(nn.Module):
    """The feature term of layers whose hidden states go on to another pipeline stage, or to later layers of this one.

    taps: what captures their outputs.
    """

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features
        self.taps = features.taps

    def forward(self, inputs: TrainInput, found: dict[str, Tensor]) -> StudentLoss | None:
        """The loss of one micro-batch from captured outputs; None without a teacher's signal."""
        if inputs.signal is None:
            return None
        pairs = self.features(found, inputs.batch, inputs.signal, inputs.normalizer, inputs.num_tokens)
        loss = self.features.weight * pairs.mean()
        nothing = torch.zeros_like(loss, requires_grad=False)
        parts = DistillationLoss(*(nothing for _ in DistillationLoss._fields))
        return StudentLoss(parts._replace(loss=loss), pairs.detach())


class StudentStage(StudentWithLoss, StageModule):
    """The root module of one pipeline stage. It computes hidden states for the next stage; the last stage computes the
    loss.
    """

    def __init__(
        self,
        model: Any,
        settings: LossSettings,
        pipeline: PipelineGroup,
        vocab_parallel: VocabParallel | None = None,
    ) -> None:
        super().__init__(model, settings, vocab_parallel)
        self.pipeline = pipeline
        self.outputs = []
        self._inputs: Iterator[TrainInput] = iter(())
        self._slots = 0

    def num_slots(self, micro_batch: TrainInput) -> int:
        return micro_batch.batch.input_ids.numel()

    def begin(self, micro_batches: Sequence[TrainInput], slots: int) -> None:
        self._inputs, self._slots, self.outputs = iter(micro_batches), slots, []

    def forward(self, message: Tensor) -> Tensor:  # type: ignore[override]
        """The message for the next stage, [slots, width]; on the last stage the loss, [1].

        Args:
            message: [slots, width], hidden states of the previous stage with padding; ignored on the first stage.
        """
        inputs = next(self._inputs)
        batch = inputs.batch
        shape, used = batch.input_ids.shape, batch.input_ids.numel()
        received = None if self.pipeline.is_first else message[:used].unflatten(0, shape)
        hidden = hidden_states(
            body(self.model), batch.input_ids, batch.position_ids, batch.documents, received, batch.cu_seqlens
        )
        if not self.pipeline.is_last:
            return nn.functional.pad(hidden.flatten(0, 1), (0, 0, 0, self._slots - used))
        output = self.loss(hidden, inputs, {})
        self.outputs.append(output.detached())
        return torch.stack([output.loss])  # FSDP2 warns about views


def to_device(world: World, batch: Batch) -> tuple[Batch, Batch]:
    """Move a micro-batch to the device.

    Returns:
        The micro-batch with whole sequences, for the teacher's signal, and this rank's part of the sequences under context
        parallelism.
    """
    whole, own = batch.shard_for_context_parallel(world.coordinates.cp, world.dims.cp)
    on_device = whole.to(world.device)
    return on_device, on_device if own is whole else own.to(world.device)
