"""A teacher in this process. Nothing is transferred: the loss reads its hidden states where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from limbeck.config import DistillConfig
from limbeck.data.batch import Batch
from limbeck.errors import LimbeckError
from limbeck.models import (
    HiddenStateCapture,
    ModelSource,
    check_head,
    check_length,
    check_logit_layer,
    compile_layers,
    decoder_layers,
    enable_varlen_attention,
    hidden_states,
    load_model,
    should_compile,
    undo_around,
)
from limbeck.models.dtypes import compute_dtype
from limbeck.strategies.base import FrozenModel, TeacherSpec, check_worker, dims_of, strategy_of
from limbeck.strategies.world import World
from limbeck.teachers.model_parallel import exchange_batches
from limbeck.teachers.protocol import SignalFuture, TeacherContext, TeacherInfo
from limbeck.teachers.signals import Signal, SignalSpec, TeacherRequest


class LocalTeacher:
    """A frozen model, perhaps distributed over the processes, and its head. See
    ``limbeck.teachers.protocol.Teacher``.
    """

    def __init__(self, model: FrozenModel) -> None:
        self.model = model
        model.body.eval().requires_grad_(False)
        self._taps, self._supervised_only = HiddenStateCapture(), False

    @property
    def info(self) -> TeacherInfo:
        head = self.model.head
        return TeacherInfo(len(head.weight), self.model.num_parameters, head)

    def request(self, batch: Batch, spec: SignalSpec) -> SignalFuture:
        # Computed when the signal is needed, on the student's device. The spec describes a transfer, and there is none.
        return self.compute_signal

    def metrics(self) -> dict[str, float]:
        return {}

    def offload(self) -> None:
        self.move(torch.device("cpu"))

    def reload(self) -> None:
        """Requests are computed where the model is."""

    def move(self, device: torch.device) -> None:
        """Keep body and head on ``device`` from now on."""
        head = self.model.head
        self.model.body.to(device)
        bias = None if head.bias is None else head.bias.to(device)
        self.model.head = replace(head, weight=head.weight.to(device), bias=bias)
        if device.type == "cpu":
            torch.cuda.empty_cache()

    def capture(self, names: Sequence[str], *, supervised_only: bool) -> list[int]:
        """From now on signals carry the outputs of the submodules ``names``, at every token that is not padding or at
        supervised positions. Returns their widths. Collective.
        """
        self._taps, self._supervised_only = self.model.capture(names), supervised_only
        undo_around(decoder_layers(self.model.body), self._taps.modules)
        with torch.no_grad():
            return self._taps.widths(self.model.body)

    def compile(self, config: DistillConfig, tokens: float, device_type: str) -> bool:
        """Compile the model's layers if ``compile_model`` wants that of a teacher that computes ``tokens`` on this rank."""
        wanted = should_compile(config.compile_model, 2 * self.model.num_parameters * tokens, device_type)
        if wanted and self.model.can_compile:
            compile_layers(decoder_layers(self.model.body))
        return wanted

    def compute_signal(self, batch: Batch) -> Signal:
        """The signal for one micro-batch on the teacher's device."""
        request = TeacherRequest.from_batch(batch)
        if batch.teacher_tokens is not None or not self._taps.names:
            return Signal(self.compute_hidden(request), self.model.head)
        if self.model.group is not None:
            with torch.no_grad():
                hidden, found = exchange_batches(
                    self.model.body, self.model.head, self.model.group, request, self._taps
                )
        else:
            with self._taps.capture() as captured:
                hidden = self.compute_hidden(request)
            found = self._taps.outputs(captured, batch.labels.shape)
        positions = batch.supervised if self._supervised_only else batch.real
        return Signal(hidden, self.model.head, self._taps.select(found, positions))

    def encode(self, request: TeacherRequest) -> dict[str, Tensor]:
        """The named tensors of the signal for a request, on the teacher's device."""
        hidden, head = self.compute_hidden(request), self.model.head
        if request.labels is None:
            return request.spec.encode(hidden, head)
        return request.spec.encode(hidden, head, labels=request.labels)

    @torch.no_grad()
    def compute_hidden(self, request: TeacherRequest) -> Tensor:
        """The last hidden states [supervised, H] of a request. Every rank of a model-parallel group must call it."""
        model = self.model
        if model.group is not None:
            return exchange_batches(model.body, model.head, model.group, request)[0]
        states = hidden_states(
            model.body, request.input_ids, request.position_ids, request.documents, cu_seqlens=request.cu_seqlens
        )
        return states.flatten(0, 1).index_select(0, request.supervised)

    def check(self, config: DistillConfig, longest_row: int, largest_token: int) -> None:
        """Raise LimbeckError unless the teacher has a position for every token of the longest row and knows every
        token.
        """
        check_length(self.model.body, str(config.teacher.model_args.model_name_or_path), longest_row)
        # Not the embedding weight's rows: ZeRO-3 keeps them elsewhere.
        embeddings = self.model.body.get_input_embeddings().num_embeddings  # type: ignore[operator]
        check_tokens("teacher", min(self.info.vocab_size, embeddings), largest_token)


def check_tokens(role: str, known: int, largest_token: int) -> None:
    """Raise LimbeckError if the data holds a token id that a model with ``known`` tokens does not have."""
    if largest_token >= known:
        raise LimbeckError(
            f"the data holds token id {largest_token}, but the {role} knows only {known} tokens; "
            "use the tokenizer that both models were trained with, or resize the model's embeddings first."
        )


def load_local_teacher(config: DistillConfig, world: World) -> LocalTeacher:
    """Load the teacher of a configuration and distribute it over the processes of ``world``."""
    worker = config.teacher
    source = ModelSource.from_args(worker.model_args, "teacher")
    dims = dims_of(worker, world.size, "teacher")
    strategy = strategy_of(worker, "teacher")
    check_worker(config, "teacher", worker, world.size, world.device.type)
    model = load_model(source, compute_dtype(worker), config.seed)
    if config.features.logit_layers:
        check_logit_layer(model, config.features.logit_layers[1], "teacher")
    strategy.check_model(model, dims, source.name, "teacher")
    check_head(model, source.name)
    if config.student.use_sequence_packing:
        enable_varlen_attention(model, source.name)
    return LocalTeacher(strategy.build_teacher(TeacherSpec(model, source.name, worker), world))


def load_teacher(context: TeacherContext) -> LocalTeacher:
    """The teacher in the student's own processes (``teacher.source: model``)."""
    teacher = load_local_teacher(context.config, context.world)
    teacher.compile(context.config, context.tokens / context.world.size, context.world.device.type)
    if context.shares_tokenizer:
        teacher.check(context.config, context.longest_row, context.largest_token)
    return teacher
