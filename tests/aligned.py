"""Aligned products on a CPU, which does not need them: what a GPU computes, in float64."""

from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.objectives import aligned_head

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.addmm_, _aten.bmm, _aten.baddbmm, _aten.mv, _aten.dot}


def aligned_to(multiple):
    """A context in which products with an output head have a width that is a multiple of ``multiple``."""
    return patch.dict(aligned_head._MULTIPLE, cpu=multiple)


class ProductSizes(TorchDispatchMode):
    """A context that collects the ``sizes`` of all dimensions of the matrix products inside, and of their results."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.overloadpacket in _PRODUCTS:
            tensors = (*arguments, *(named or {}).values())
            self.sizes.update(size for x in tensors if isinstance(x, torch.Tensor) for size in x.shape)
        return function(*arguments, **(named or {}))
