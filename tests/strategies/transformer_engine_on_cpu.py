"""A plug-in for tests, after ``megatron_on_cpu``: PyTorch in place of what Megatron's layers use of Transformer Engine.

Megatron's own wrappers are above it. Nothing here says anything about Transformer Engine's kernels.
"""

import importlib
import sys
from unittest.mock import MagicMock, patch

import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401
import torch
from megatron.core import tensor_parallel, utils
from megatron.core.extensions import transformer_engine
from packaging.version import Version
from torch import nn
from torch.nn.functional import linear, rms_norm

from limbeck.strategies.megatron.core import import_megatron


class Linear(nn.Module):
    """The arguments and names of ``transformer_engine.pytorch.Linear``."""

    normalization: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        parallel_mode: str,
        sequence_parallel: bool,
        tp_group,
        tp_size: int,
        init_method,
        bias: bool,
        params_dtype: torch.dtype,
        device,
        normalization: str | None = None,
        eps: float = 0.0,
        **unused,
    ) -> None:
        super().__init__()
        assert normalization == self.normalization
        size = tp_group.size() if tp_group is not None else tp_size
        self.parallel_mode, self.tp_group, self.eps = parallel_mode, tp_group, eps
        self.sequence_parallel = sequence_parallel and size > 1
        like = {"device": device, "dtype": params_dtype}
        if normalization:
            self.layer_norm_weight = nn.Parameter(torch.ones(in_features, **like))
            self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        column = parallel_mode == "column"
        shape = (out_features // size, in_features) if column else (out_features, in_features // size)
        self.weight = nn.Parameter(torch.empty(shape, **like))
        init_method(self.weight)
        self.bias = nn.Parameter(torch.zeros(shape[0], **like)) if bias else None
        for parameter in filter(lambda x: x is not None, (self.weight, self.bias)):
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0 if column else 1, 1)

    def forward(self, x, is_first_microbatch=None):
        if self.normalization:
            x = rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        mapping = {
            ("column", False): tensor_parallel.copy_to_tensor_model_parallel_region,
            ("column", True): tensor_parallel.gather_from_sequence_parallel_region,
            ("row", False): tensor_parallel.reduce_from_tensor_model_parallel_region,
            ("row", True): tensor_parallel.reduce_scatter_to_sequence_parallel_region,
        }[self.parallel_mode, self.sequence_parallel]
        if self.parallel_mode == "column":
            return linear(mapping(x, group=self.tp_group), self.weight, self.bias)
        return mapping(linear(x, self.weight), group=self.tp_group)


class LayerNormLinear(Linear):
    normalization = "RMSNorm"


class RMSNorm(nn.RMSNorm):
    def __init__(
        self, normalized_shape=None, *, hidden_size=None, eps, sequence_parallel, params_dtype, device, **unused
    ) -> None:
        super().__init__(normalized_shape or hidden_size, eps=eps, device=device, dtype=params_dtype)
        self.weight.sequence_parallel = sequence_parallel


def install() -> None:
    """Only Megatron's module of wrappers sees it; the others are imported before."""
    import_megatron()
    package = MagicMock()
    package.pytorch.Linear, package.pytorch.LayerNormLinear, package.pytorch.RMSNorm = Linear, LayerNormLinear, RMSNorm
    utils._te_version = Version("2.2.0")  # later ones need more of the package
    found = {"": package, ".pytorch": package.pytorch, ".pytorch.fp8": package.pytorch.fp8}
    with patch.dict(sys.modules, {f"transformer_engine{name}": module for name, module in found.items()}):
        importlib.reload(transformer_engine)


install()
