"""States of recurrent layers (Mamba) for the slots of a ``SlotCache``.

A layer of transformers reads and writes its states through the methods of a cache, which it gets as ``cache_params``. Here they
lead to the slots that a forward pass computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from limbeck.models import recurrent_layers


class RecurrentStates:
    """Windows of the convolution and states of each layer, [slots, ...]; allocated when a layer first writes."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self.windows: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*self.windows.values(), *self.states.values()]

    def write(self, kind: dict[int, Tensor], layer: int, rows: Any, values: Tensor) -> None:
        """Put ``values`` [rows, ...] into the slots ``rows``. kind: ``windows`` or ``states``."""
        if layer not in kind:
            kind[layer] = values.new_zeros((self._slots, *values.shape[1:]))
        kind[layer][rows] = values


class RecurrentPass:
    """The cache that a layer sees in one forward pass.

    Args:
        rows: the slots that are computed, in order.
        begins: whether they begin with an empty state. Else a layer changes the states of the first slots in place.
    """

    def __init__(self, states: RecurrentStates, rows: Any, *, begins: bool) -> None:
        self._states, self._rows, self._begins = states, rows, begins

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._read(self._states.windows, layer_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._read(self._states.states, layer_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, conv_kernel_size: int, **unused: Any) -> Tensor:
        """conv_states: [rows, channels, time], whole prompts."""
        window = pad(conv_states, (conv_kernel_size, 0))[..., -conv_kernel_size:]
        self._states.write(self._states.windows, layer_idx, self._rows, window)
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **unused: Any) -> None:
        self._states.write(self._states.states, layer_idx, self._rows, recurrent_states)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    # What transformers before 5.21 calls in place of the three reading methods.
    def has_previous_state(self, layer_idx: int) -> bool:
        return not self._begins and layer_idx in self._states.windows

    @property
    def layers(self) -> dict[int, SimpleNamespace]:
        return {
            layer: SimpleNamespace(
                conv_states=[self.get_conv_state(layer)],
                recurrent_states=[self.get_recurrent_state(layer)],
                record_past=False,
            )
            for layer in self._states.windows
        }

    def _read(self, kind: dict[int, Tensor], layer: int) -> Tensor | None:
        return None if self._begins or layer not in kind else kind[layer][self._rows]


def keep_states_in_slots(model: nn.Module) -> bool:
    """Let the recurrent layers of ``model`` use the states of ``slots``; returns whether there are any."""
    layers = recurrent_layers(model)
    for layer in layers:
        layer.forward = _SlotForward(layer)
    return bool(layers)


@contextmanager
def states_in_slots(model: nn.Module) -> Iterator[None]:
    """As ``keep_states_in_slots``, for the duration of the block."""
    own = [(layer, vars(layer).get("forward")) for layer in recurrent_layers(model)]
    keep_states_in_slots(model)
    try:
        yield
    finally:
        for layer, forward in own:
            if forward is None:
                del layer.forward  # that of the class is left
            else:
                layer.forward = forward


class _SlotForward:
    """The ``forward`` of one recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        self._plain = layer.forward

    def __call__(self, hidden_states: Tensor, *, slots: Any, **options: Any) -> Tensor:
        output: Tensor = self._plain(hidden_states, **{**options, "cache_params": slots.recurrent})
        return output
