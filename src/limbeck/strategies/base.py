"""The two protocols of this package: a strategy builds models over the ranks, an engine trains one.

The training loop knows ``Engine`` only. A strategy is registered by name (``limbeck/registry.py``), and everything that
depends on how a model is distributed is behind it: checks before loading, dimensions, wrapping, stepping, sharded
states, offloading. Nothing here knows what the loss is: a root module takes one micro-batch and returns an object whose
``loss`` is minimised.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck.config import DistillConfig
from limbeck.config.schema import StudentConfig, TeacherConfig, WorkerConfig
from limbeck.models import HiddenStateCapture, ModelSource, model_outline, submodules
from limbeck.models.dtypes import DTYPES
from limbeck.objectives import OutputHead
from limbeck.registry import STRATEGIES
from limbeck.strategies.parallel_dims import ParallelDims
from limbeck.strategies.pipeline_parallel import PipelineGroup
from limbeck.strategies.shards import Shard, Sliceable
from limbeck.strategies.world import World

T = TypeVar("T")

LibraryFunctions = Sequence[tuple[Any, str]]
"""Functions, each as its owner and its name there."""

MODEL = "model."
"""Prefix of the student's own parameters among those of the root module."""

Capture = Callable[[Sequence[str]], HiddenStateCapture]
"""Captures those of the named submodules of a model (under Hugging Face names) that these layers hold."""

_DEFAULTS = {"student": "fsdp2_train", "teacher": "fsdp2_infer"}


class MicroBatches(Generic[T]):
    """A step's micro-batches, each made when the engine is ready for it.

    Args:
        count: number of micro-batches.
        make: returns an iterator over them.
    """

    def __init__(self, count: int, make: Callable[[], Iterator[T]]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        return self._make()


@dataclass
class EngineState(Generic[T]):
    """What a checkpoint keeps of an engine.

    model: trained parameters in float32 by their names in the root module. optimizer: its tensors as
    ``<parameter>|<entry>``; those of a parameter's shape are divided as the parameter is.
    scaler: JSON values of the fp16 loss scaler, empty without one.
    """

    model: Mapping[str, T] = field(default_factory=dict)
    optimizer: Mapping[str, T] = field(default_factory=dict)
    scaler: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """One trained model on this rank. Every rank must call every method in the same order."""

    optimizer: torch.optim.Optimizer
    """Its parameter groups hold the learning rates that a schedule sets."""

    @property
    def root(self) -> nn.Module:
        """The module with the model and the loss, as it was given; its outputs are those of ``forward_backward``."""

    def forward_backward(self, micro_batches: MicroBatches[Any]) -> Iterator[Any]:
        """Add the gradients of a step's micro-batches; yields the root's outputs (on the last stage of a pipeline), and those
        of terms of the loss on earlier stages. What all ranks yield sums to the whole.
        """

    def evaluate(self, micro_batch: Any) -> Any | None:
        """The root's output in evaluation mode, without gradients. On pipeline stages before the last, that of their own
        terms of the loss, or None.
        """

    def step(self) -> Tensor:
        """Reduce and clip the gradients, step the optimizer, clear the gradients; returns the norm before clipping."""

    def iter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names within the model and full float32 (or frozen) tensors, one at a time, on every rank. Every rank must exhaust
        it. A tensor may be the engine's own.
        """

    def state_dict(self) -> EngineState[Sequence[Shard]]:
        """What this rank holds of trained parameters and optimizer, and the scaler. The values are the engine's own: they
        are read before the next step.
        """

    def load_state_dict(self, state: EngineState[Sliceable]) -> None:
        """Load whole tensors, of which each rank reads what it holds; learning rates stay as they are."""

    def trained_names(self) -> set[str]:
        """Names of the trained parameters of the whole root module, also of those on other pipeline stages."""

    def offload(self) -> None:
        """Move parameters, buffers and optimizer state to host memory, between steps."""

    def reload(self) -> None:
        """The inverse of ``offload``."""

    def held_tensors(self) -> dict[str, list[Tensor]]:
        """What this rank holds now, as ``parameters``, ``gradients`` and ``optimizer`` (with masters); for memory
        planning.
        """


@dataclass(frozen=True)
class ModelOutline:
    """Facts about a whole model, collected before it is divided into pipeline stages.

    trained: names of trained parameters under a root; parameters: their number in all; width: of hidden states; tied:
    names of
    embeddings and output head under a root where they are one parameter.
    """

    trained: frozenset[str]
    parameters: int
    width: int
    tied: tuple[str, str] | None


@dataclass(frozen=True)
class Placement:
    """How a model was divided, for the root module that is built around it.

    vocab_group: tensor-parallel ranks that hold slices of the output head, or None. head_rows: rows of the whole output
    head.
    pipeline: this rank's stage, or None.
    capture: how outputs of submodules are captured if the strategy replaced them, or None.
    """

    outline: ModelOutline
    head_rows: int
    vocab_group: dist.ProcessGroup | None = None
    pipeline: PipelineGroup | None = None
    capture: Capture | None = None


@dataclass(frozen=True)
class StudentSpec:
    """A loaded student and what a strategy needs to train it.

    model: a Hugging Face causal language model on the CPU, adapters added and parameters frozen. name: for error
    messages.
    make_root: builds the module that is wrapped: it contains ``model`` as its attribute of that name and ends in the
    loss.
    make_term: for layers before the last of a pipeline, builds the module of their own terms of the loss, or None if they
    have none: given a micro-batch and what the hooks in its ``taps`` captured in the layers, it returns an object like the
    root's. Called where a strategy replaces the layers, with captures of named submodules.
    verify: compare hidden states before and after the model is divided.
    compiled: compile the layers, where the strategy can.
    """

    model: Any
    name: str
    config: DistillConfig
    make_root: Callable[[Placement], nn.Module]
    make_term: Callable[[Capture], nn.Module | None] = lambda capture: None
    verify: bool = True
    compiled: bool = False

    @property
    def worker(self) -> StudentConfig:
        """The student's section of the configuration."""
        return self.config.student


@dataclass(frozen=True)
class TeacherSpec:
    """A loaded teacher: ``model`` on the CPU in the precision in which it computes. The rest is as in
    ``StudentSpec``.
    """

    model: Any
    name: str
    worker: TeacherConfig
    verify: bool = True


@dataclass(frozen=True)
class ModelParallelGroup:
    """Process groups of one model-parallel replica.

    group: all its ranks. context: those that divide its rows' time, or None. pipeline: its stages, or None. owners:
    global ranks
    that bring a batch of their own; the replica computes one owner's batch after the other. owner: the one with this
    rank's batch.
    """

    group: dist.ProcessGroup
    context: dist.ProcessGroup | None
    pipeline: PipelineGroup | None
    owners: tuple[int, ...]
    owner: int


@dataclass
class FrozenModel:
    """A model distributed for inference.

    body: gives last hidden states. head: whole on every rank. num_parameters: of the whole model. group: None unless
    several ranks compute one batch together. can_compile: whether the layers may be compiled. offloaded: parameters that are in
    host memory between forward passes. names, replaced: names of submodules and how their outputs are captured, if the
    strategy has replaced ``body``.
    """

    body: nn.Module
    head: OutputHead
    num_parameters: int
    group: ModelParallelGroup | None = None
    can_compile: bool = True
    offloaded: frozenset[nn.Parameter] = frozenset()
    names: Collection[str] = ()
    replaced: Capture | None = None

    def submodules(self) -> Collection[str]:
        """Names of the submodules of ``body`` in the whole model."""
        return self.names or submodules(self.body)

    def capture(self, names: Sequence[str]) -> HiddenStateCapture:
        """Captures the outputs of those of the named submodules that this rank holds."""
        if self.replaced is not None:
            return self.replaced(names)
        return HiddenStateCapture.from_names(self.body, names, "teacher")

    def held_tensors(self) -> list[Tensor]:
        """What this rank holds of the model on its device; for memory planning."""
        head = [tensor for tensor in (self.head.weight, self.head.bias) if tensor is not None]
        # Of a parameter that ZeRO-3 shards, this rank's part.
        kept = (parameter for parameter in self.body.parameters() if parameter not in self.offloaded)
        shards = [getattr(parameter, "ds_tensor", parameter) for parameter in kept]
        return [*shards, *self.body.buffers(), *head]


class Strategy(Protocol):
    """A way to distribute models over the ranks. One object serves all runs; it keeps no state."""

    def dims(self, worker: WorkerConfig, ranks: int, role: str) -> ParallelDims:
        """How ``ranks`` ranks divide the model; raises LimbeckError if the configured sizes do not divide them."""

    def check(self, config: DistillConfig, dims: ParallelDims, role: str, device_type: str) -> None:
        """Raise LimbeckError, before anything is loaded, for what this strategy does not run."""

    def check_model(self, model: Any, dims: ParallelDims, name: str, role: str) -> None:
        """Raise LimbeckError unless ``model`` (which may be on the meta device) can be divided so."""

    def simulate(self, worker: WorkerConfig, role: str) -> AbstractContextManager[LibraryFunctions]:
        """The context in which this strategy builds and trains models on fake tensors, for memory planning. Optional.

        It is entered when the process group exists, and yields the functions through which the strategy's library acts
        on a model. What is allocated in them belongs to the library, not to the model.

        Raises:
            UnknownMemory: if sizes do not determine what the library holds.
        """

    def build_student(self, spec: StudentSpec, world: World) -> Engine:
        """Distribute the student over ``world`` and wrap it in an engine."""

    def build_teacher(self, spec: TeacherSpec, world: World) -> FrozenModel:
        """Distribute the teacher over ``world``, frozen."""


def strategy_of(worker: WorkerConfig, role: str) -> Strategy:
    """The strategy that a role's ``strategy_name`` selects; FSDP2 if it is unset."""
    strategy: Strategy = STRATEGIES.get(worker.strategy_args.strategy_name or _DEFAULTS[role])
    return strategy


def dims_of(worker: WorkerConfig, ranks: int, role: str) -> ParallelDims:
    """How ``ranks`` ranks divide a role's model under its strategy."""
    return strategy_of(worker, role).dims(worker, ranks, role)


def check_worker(config: DistillConfig, role: str, worker: WorkerConfig, ranks: int, device_type: str) -> None:
    """Raise LimbeckError unless a role's strategy runs on its ranks and divides its model, of which no weight is loaded."""
    strategy, dims, args = strategy_of(worker, role), dims_of(worker, ranks, role), worker.model_args
    strategy.check(config, dims, role, device_type)
    # The model of another source of teachers is not its own, and a class from the hub may not support the meta device.
    if dims.model_parallel_size > 1 and args.names_a_model and not args.trust_remote_code:
        source = ModelSource.from_args(args, role)
        strategy.check_model(model_outline(source, DTYPES[args.dtype]), dims, source.name, role)
