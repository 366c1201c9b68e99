"""Recurrent layers, such as Mamba, with packed documents: every document begins with an empty state.

A recurrent layer carries its state and the window of its convolution along the row, so packed documents leak into the
next one. Here such a layer is called once per document. The documents are passed to the layers as a keyword argument,
which activation checkpointing keeps for the recomputation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.models.varlen_attention import Documents, current_documents


def recurrent_layers(trunk: nn.Module) -> list[nn.Module]:
    """The modules of a body that carry a state along the row; every kind of Mamba names the logarithm of its decay so."""
    return [module for module in trunk.modules() if isinstance(getattr(module, "A_log", None), nn.Parameter)]


def separate_recurrent_layers(trunk: nn.Module) -> None:
    """Let the recurrent layers of the body ``trunk`` compute each packed document alone.

    Only for bodies that pass their keyword arguments on to these layers; ``enable_varlen_attention`` verifies the result.
    """
    layers = recurrent_layers(trunk)
    if not layers or isinstance(layers[0].forward, _ByDocument):
        return
    for layer in layers:
        layer.forward = _ByDocument(layer)
    trunk.register_forward_pre_hook(_pass_documents, with_kwargs=True)


def _pass_documents(trunk: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    documents = current_documents()
    return None if documents is None else (args, {**kwargs, "documents": documents})


class _ByDocument:
    """The ``forward`` of one recurrent layer: [batch, time, hidden] to the same shape."""

    def __init__(self, layer: nn.Module) -> None:
        self._plain = layer.forward

    def __call__(self, hidden_states: Tensor, *args: Any, documents: Documents | None = None, **kwargs: Any) -> Tensor:
        if documents is None:
            output: Tensor = self._plain(hidden_states, *args, **kwargs)
            return output
        return self._each(hidden_states, documents, *args, **kwargs)

    @torch.compiler.disable  # it would be compiled anew for the lengths of every batch
    def _each(self, hidden_states: Tensor, documents: Documents, *args: Any, **kwargs: Any) -> Tensor:
        parts = hidden_states.split(list(documents.lengths), 1)
        return torch.cat([self._plain(part, *args, **kwargs) for part in parts], 1)
