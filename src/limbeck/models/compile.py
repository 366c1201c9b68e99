"""Compiles the decoder layers of a model with ``torch.compile``, one by one and in place.

A layer's ``forward`` is replaced on the instance, so the names of modules and parameters do not change. All layers of one
kind share compiled code, and lengths are dynamic, so the number of compilations does not depend on the number of layers
or on the data. What wraps a layer stays outside of compiled code: activation checkpointing, the hooks of FSDP2, captured
hidden states.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from limbeck.objectives import compiler_found

BACKEND: str | Callable[..., Any] = "inductor"
"""The backend of ``torch.compile``; tests count what another one compiles and runs."""

_WORTH_COMPILING = {"cpu": 1 << 46, "cuda": 1 << 54}
"""FLOPs of one process in a run from which compiling its model saves more time than it takes. Measured: about 3% of a step on
two CPU cores for 12 s of compilation, and 28% on an H100 for 30 s."""

_RECOMPILE_LIMIT = 32
"""Student and teacher of one architecture share a limit: training and evaluation, one row or several, each kind of
layer. PyTorch's 8 can be too few, and beyond the limit layers silently run uncompiled."""

_WITH_BACKWARD = {"force_non_lazy_backward_lowering": True}
"""An option of AOTAutograd, which PyTorch has from 2.10 on: a failure to compile a backward pass is raised when the forward
pass is compiled, where the layers can still run uncompiled. Otherwise it is raised again in the backward pass."""

_FORWARD_CHECKPOINTS = "__call__" not in vars(GradientCheckpointingLayer)
"""Whether transformers wraps activation checkpointing around a layer's ``forward``; older versions wrap ``__call__``."""


def should_compile(setting: Literal["auto"] | bool, flops: float, device_type: str) -> bool:
    """Whether to compile the layers of a model under ``compile_model: setting``.

    flops: of this model on one process in the whole run: 6 per parameter and token for a student, 2 for a teacher.
    """
    if setting == "auto":
        return flops >= _WORTH_COMPILING.get(device_type, _WORTH_COMPILING["cuda"]) and compiler_found()
    return setting


def compile_layers(layers: Sequence[nn.Module]) -> None:
    """Compile each of ``layers`` at its first call.

    Call it after tensor, context and pipeline parallelism have changed the layers. FSDP and activation checkpointing may
    come before or after it. If compilation fails, all of these layers run uncompiled, after one warning.
    """
    if not layers:
        warnings.warn(
            "compile_model: the model does not name its layers (_no_split_modules); it runs uncompiled.", stacklevel=2
        )
    model = _Model()
    for layer in layers:
        layer.forward = _CompiledForward(layer, model)


def undo_around(layers: Sequence[nn.Module], modules: Iterable[nn.Module | None]) -> None:
    """Let those of ``layers`` that contain one of ``modules`` run uncompiled: compiled code ignores hooks inside a layer
    that are registered for a single pass.
    """
    hooked = set(modules)
    for layer in layers:
        if isinstance(layer.forward, _CompiledForward) and hooked.intersection(layer.modules()) - {layer}:
            del layer.forward  # that of the class is left


def compile_function(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled ``forward`` of a class of layers. `limbeck plan` replaces it."""
    return torch.compile(forward, dynamic=True, backend=_compile_graph)


def _compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """``BACKEND``, which compiles the backward pass at once."""
    config = torch._functorch.config
    with config.patch(_WITH_BACKWARD if hasattr(config, *_WITH_BACKWARD) else {}):
        return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)


@dataclass
class _Model:
    """What the compiled layers of a model share. ``failed``: one of them could not be compiled, so that all run uncompiled."""

    failed: bool = False


class _CompiledForward:
    """The compiled ``forward`` of one layer."""

    def __init__(self, layer: nn.Module, model: _Model) -> None:
        self._layer, self._model = layer, model
        self._plain: Callable[..., Any] = type(layer).forward
        # PyTorch runs the inside of a checkpoint uncompiled, so the compiled code must begin there.
        self._checkpoints = _FORWARD_CHECKPOINTS and isinstance(layer, GradientCheckpointingLayer)
        if self._checkpoints:
            self._plain = self._plain.__wrapped__  # type: ignore[attr-defined]
        self._compiled = compile_function(self._plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self._layer
        if not (self._checkpoints and layer.gradient_checkpointing and layer.training):
            return self._run(*args, **kwargs)
        checkpoint = layer._gradient_checkpointing_func
        if checkpoint.keywords["use_reentrant"]:  # code with gradients is first compiled in the backward pass
            return checkpoint(partial(self._run, **kwargs), *args)
        # Other checkpoints recompute what ran, of which a failed attempt may have run a part: each attempt has its own.
        return self._attempt(lambda forward: checkpoint(partial(forward, layer, **kwargs), *args))

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return self._attempt(lambda forward: forward(self._layer, *args, **kwargs))

    def _attempt(self, call: Callable[[Callable[..., Any]], Any]) -> Any:
        """``call`` with the compiled forward, or with the plain one if that cannot be compiled."""
        # PyTorch keeps this setting per thread, and on a GPU a thread of autograd runs what is recomputed.
        if torch._dynamo.config.recompile_limit < _RECOMPILE_LIMIT:
            torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
        if not self._model.failed:
            try:
                return call(self._compiled)
            except torch._dynamo.exc.TorchDynamoException as error:
                self._fail(error)
        return call(self._plain)

    def _fail(self, error: Exception) -> None:
        self._model.failed = True
        warnings.warn(
            f"The layers of {type(self._layer).__name__} could not be compiled ({type(error).__name__}); their model runs "
            "uncompiled, which is slower and gives the same results. compile_model: false avoids the attempt.",
            stacklevel=2,
        )
