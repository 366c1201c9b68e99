"""Loads the weights of another model into a model on the meta device, and shares their memory where that is possible."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import LimbeckError


class SharedWeights:
    """The parameters and persistent buffers of ``model``, by their names in its state dict.

    A tensor that is loaded with the model's dtype and device is used itself: when its owner changes it in place, this
    model changes too. Every other tensor is copied. Names of tied parameters stand for one tensor.

    model: a Hugging Face model on the meta device. device: where it will run. Its other buffers are computed at once.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = torch.empty(0, device=device).device  # with its number, so that devices can be compared
        self._slots: dict[str, list[tuple[nn.Module, str]]] = {}
        self._shapes: dict[str, torch.Size] = {}
        by_tensor: dict[int, list[tuple[nn.Module, str]]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            module, _, attribute = name.rpartition(".")
            self._slots[name] = by_tensor.setdefault(id(tensor), [])
            self._slots[name].append((model.get_submodule(module), attribute))
            self._shapes[name] = tensor.shape
        self._copies: set[int] = set()
        _compute_buffers(model, device)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load all ``weights``, given by name one at a time; one name of tied parameters is enough.

        Raises:
            LimbeckError: if one is missing, unknown or of another shape.
        """
        for name, tensor in checked_weights(weights, self._slots, self._shapes, type(self._model).__name__):
            self._assign(name, tensor)

    def to(self, device: torch.device | str) -> None:
        """Move the weights. What was shared on another device is a copy from then on, until it is loaded again."""
        self._model.to(device)

    def _assign(self, name: str, tensor: Tensor) -> None:
        slots = self._slots[name]
        present: Tensor = getattr(*slots[0])
        if (tensor.dtype, tensor.device) == (present.dtype, self._device):
            self._copies.discard(id(slots))
        elif id(slots) in self._copies and present.device == self._device:
            present.data.copy_(tensor)
            return
        else:
            tensor = tensor.to(self._device, present.dtype)
            self._copies.add(id(slots))
        for module, attribute in slots:
            is_parameter = isinstance(present, nn.Parameter)
            setattr(module, attribute, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def checked_weights(
    weights: Iterable[tuple[str, Tensor]], tied: Mapping[str, list[Any]], shapes: Mapping[str, torch.Size], model: str
) -> Iterator[tuple[str, Tensor]]:
    """The first of ``weights`` for each tensor of a model, detached.

    Args:
        weights: by name; one name of tied parameters is enough.
        tied: all names of the model. Those of tied parameters have the same list.
        shapes: of each name. model: its name.

    Raises:
        LimbeckError: if one is missing, unknown or of another shape.
    """
    missing = {id(group): name for name, group in tied.items()}
    for name, tensor in weights:
        if name not in tied:
            raise LimbeckError(
                f"the generator received the weight {name}, which {model} does not have; send the names of the student's "
                "state dict, with adapters merged."
            )
        if tensor.shape != shapes[name]:
            raise LimbeckError(
                f"the generator received the weight {name} with the shape {list(tensor.shape)} in place of "
                f"{list(shapes[name])}; build it from the student's own configuration."
            )
        if missing.pop(id(tied[name]), None) is not None:
            yield name, tensor.detach()
    if missing:
        raise LimbeckError(
            f"the generator did not receive {', '.join(sorted(missing.values())[:3])} ({len(missing)} weights of {model}); "
            "send every tensor of the student's state dict."
        )


@contextmanager
def transposed_linears(model: nn.Module) -> Iterator[None]:
    """Linear layers of ``model`` compute with copies of their weights [out, in] that are stored as [in, out].

    On a CPU, products of few rows with such a matrix are faster: PyTorch's BLAS rearranges the other kind as a whole in
    every product. The copies need the memory of the weights once more.
    """
    originals = [(module, module.weight) for module in model.modules() if type(module) is nn.Linear]
    try:
        for module, weight in originals:
            module.weight = nn.Parameter(weight.detach().t().contiguous().t(), requires_grad=False)
        yield
    finally:
        for module, weight in originals:
            module.weight = weight


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Replaces buffers that no state dict has, such as rotary frequencies, by ones with values."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers[name] is not None:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
    model.initialize_weights()  # on parameters, which are on the meta device still, it does nothing
