"""Writes a Hugging Face model as a checkpoint that Megatron-LM loads in any layout, in its format ``torch_dist``.

The index of that format is a pickle, which torch.distributed.checkpoint writes. It holds plain values only.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from limbeck.folders import MEGATRON_TRACKER
from limbeck.models.megatron_checkpoint.torch_dist import COMMON, STACK
from limbeck.models.megatron_config import megatron_arguments
from limbeck.models.megatron_families import FUSED, HEAD, Heads, family_of, slice_of

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

_WITH_EXTRA_STATE = (
    *("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"),
    *("self_attention.q_layernorm", "self_attention.k_layernorm", "mlp.linear_fc1", "mlp.linear_fc2"),
)
"""Modules of a layer that may require an ``_extra_state``, which is a list of one None without FP8."""


def write_checkpoint(model: Any, folder: Path, iteration: int, tokenizer: str | None = None) -> Path:
    """Write ``model`` as the newest checkpoint in ``folder``, in place of an earlier one of that iteration.

    Args:
        model: a Hugging Face model on the CPU; its precision is kept.
        folder: of checkpoints; what Megatron-LM calls ``--load``.
        iteration: number of optimizer steps.
        tokenizer: folder or hub id, for Megatron-LM's ``tokenizer_model``.

    Returns:
        The folder of the checkpoint.

    Raises:
        LimbeckError: if Megatron-LM has no such model.
    """
    arguments = _arguments(model, tokenizer)
    target, temporary = folder / f"iter_{iteration:07d}", folder / f".iter_{iteration:07d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    writer = dcp.FileSystemWriter(str(temporary))
    dcp.save(
        _state(model, arguments["padded_vocab_size"]),
        storage_writer=writer,
        planner=_Planner(flatten_state_dict=False),
        no_dist=True,
    )
    common = {"args": Namespace(**arguments), "checkpoint_version": 3.0, "iteration": iteration}
    torch.save(common, temporary / COMMON)
    (temporary / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    (folder / MEGATRON_TRACKER).write_text(str(iteration), encoding="utf-8")
    return target


def _arguments(model: Any, tokenizer: str | None) -> dict[str, Any]:
    dtype = next(model.parameters()).dtype
    named = {} if tokenizer is None else {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tokenizer}
    return {
        **megatron_arguments(model.config),
        **named,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


@dataclass(frozen=True)
class _Stack:
    """The tensors of all layers along a first axis, each of which is made when it is written. layers: without that axis."""

    layers: list[Callable[[], Tensor]]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __create_write_items__(self, name: str, whole: object) -> list[WriteItem]:
        """Part of PyTorch's protocol for what can be saved: one part of the file for each layer."""
        size, properties = torch.Size((len(self.layers), *self.shape)), TensorProperties(dtype=self.dtype)
        items = []
        for layer in range(len(self.layers)):
            offsets, sizes = torch.Size((layer, *(0 for _ in self.shape))), torch.Size((1, *self.shape))
            data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, size)
            items.append(WriteItem(MetadataIndex(name, offsets, layer), WriteItemType.SHARD, tensor_data=data))
        return items


class _Planner(dcp.DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        if not isinstance(found, _Stack):
            return super().lookup_object(index)
        assert index.offset is not None
        return found.layers[index.offset[0]]().unsqueeze(0)


def _state(model: Any, rows: int) -> dict[str, Any]:
    """What Megatron-LM's sharded state dict of this model has, with ``rows`` of embeddings and output head."""
    tensors, config = dict(model.named_parameters()), model.config
    heads, layers = Heads.of(config), config.num_hidden_layers
    state: dict[str, Any] = {}
    for name, rule in family_of(model).rules.items():
        if rule.sources == (HEAD,) and config.tie_word_embeddings:
            continue
        for fused, separate in FUSED.items():
            name = name.replace(separate, fused)

        def make(layer: int = 0, rule: Any = rule) -> Tensor:
            sources = [tensors[source.replace("*", str(layer))].detach() for source in rule.sources]
            return slice_of(rule.kind, sources, heads, 0, 1).contiguous()

        if "*" in name:
            first = make()
            state[name.replace("*.", "")] = _Stack(
                [partial(make, layer) for layer in range(layers)], tuple(first.shape), first.dtype
            )
        elif rule.kind == "vocabulary":
            table = make()
            state[name] = torch.nn.functional.pad(table, (0, 0, 0, rows - len(table)))
        else:
            state[name] = make()
    names = [f"{STACK}{module}._extra_state/shard_{i}_{layers}" for module in _WITH_EXTRA_STATE for i in range(layers)]
    names.append("decoder.final_layernorm._extra_state/shard_0_1")
    return {**state, **{name: [None] for name in names}}
