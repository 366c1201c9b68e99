"""bfloat16 copies of float32 parameters, for a process that trains alone.

Autocast casts every parameter again in every micro-batch. Here a module computes with copies that are cast once per optimizer
step, as FSDP2's mixed precision does on several ranks. Gradients of all micro-batches are summed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MasterWeights:
    """Keeps the float32 parameters of ``module`` as masters and lets it compute in ``dtype``.

    The parameters stay the same objects under the same names; what changes is their data. Outside of ``in_float32`` they hold
    the copies, and their gradients are those of the current micro-batch.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._masters = {p: p.data for p in module.parameters() if p.dtype is torch.float32}
        self._copies = {p: p.data.to(dtype) for p in self._masters}
        self._grads: dict[nn.Parameter, Tensor] = {}
        for p, copy in self._copies.items():
            p.data = copy

    def accumulate(self) -> None:
        """Add the gradients of a micro-batch to the float32 sums; to be called after its backward pass."""
        new = {p: p.grad for p in self._masters if p.grad is not None}
        before = [p for p in new if p in self._grads]
        if before:
            torch._foreach_add_([self._grads[p] for p in before], [new[p] for p in before])
        for p, grad in new.items():
            if p not in self._grads:
                self._grads[p] = grad.float()
            p.grad = None

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Within the block the parameters are the masters, with their summed gradients. Afterwards the copies are renewed
        from the masters, which the block may have changed, moved or replaced.
        """
        for p, master in self._masters.items():
            p.data, p.grad = master, self._grads.get(p)
        try:
            yield
        finally:
            self._grads = {p: p.grad for p in self._masters if p.grad is not None}
            self._masters = {p: p.data for p in self._masters}
            masters, copies = list(self._masters.values()), list(self._copies.values())
            if masters and masters[0].device != copies[0].device:
                copies = [copy.to(master.device) for copy, master in zip(copies, masters, strict=True)]
            torch._foreach_copy_(copies, masters)
            self._copies = dict(zip(self._masters, copies, strict=True))
            for p, copy in self._copies.items():
                p.grad = None
                p.data = copy

    def held_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """The masters, and the summed gradients."""
        return list(self._masters.values()), list(self._grads.values())
