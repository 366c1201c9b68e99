"""Writes the weights of a Hugging Face model in Megatron's format ``torch_dist``.

The index of that format is a pickle, which torch.distributed.checkpoint writes. It holds plain values only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from limbeck.megatron_files.arguments import COMMON
from limbeck.models.megatron_checkpoint.state import MadeParameter, extra_states, parameters_of
from limbeck.models.megatron_checkpoint.stored import EXPERTS, FUSED, PRE_MLP_NORM
from limbeck.models.megatron_checkpoint.torch_dist import PARTS
from limbeck.models.megatron_families import ExpertShape, Heads, family_of, layers_with_experts

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_torch_dist(model: Any, folder: Path, common: dict[str, Any], rows: int) -> None:
    """Write the files.

    Args:
        model: a Hugging Face model.
        folder: an existing one, of the iteration.
        common: what the checkpoint has beside the model.
        rows: of embeddings and output head.
    """
    writer, planner = dcp.FileSystemWriter(str(folder)), _Planner(flatten_state_dict=False)
    dcp.save(_state(model, rows), storage_writer=writer, planner=planner, no_dist=True)
    torch.save(common, folder / COMMON)
    (folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")


@dataclass(frozen=True)
class _Lazy:
    """A tensor that is made when it is written, from one part for each entry of its first axis, or from a single part.

    shape: of a part, without that axis.
    """

    parts: list[Callable[[], Tensor]]
    shape: tuple[int, ...]
    dtype: torch.dtype
    stacked: bool

    def __create_write_items__(self, name: str, whole: object) -> list[WriteItem]:
        """Part of PyTorch's protocol for what can be saved: one piece of the file for each part."""
        first = (len(self.parts),) if self.stacked else ()
        size, properties = torch.Size((*first, *self.shape)), TensorProperties(dtype=self.dtype)
        items = []
        for number in range(len(self.parts)):
            offsets = torch.Size((*((number,) if self.stacked else ()), *(0 for _ in self.shape)))
            sizes = torch.Size((*((1,) if self.stacked else ()), *self.shape))
            data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, size)
            items.append(WriteItem(MetadataIndex(name, offsets, number), WriteItemType.SHARD, tensor_data=data))
        return items


class _Planner(dcp.DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        if not isinstance(found, _Lazy):
            return super().lookup_object(index)
        assert index.offset is not None
        return found.parts[index.offset[0]]().unsqueeze(0) if found.stacked else found.parts[0]()


def _state(model: Any, rows: int) -> dict[str, Any]:
    """What Megatron-LM's sharded state dict of this model has.

    Equal layers are stacked along a first axis. The layers of a hybrid, and of a model of which only some layers have
    experts, are not equal.
    """
    experts, hybrid = layers_with_experts(model), family_of(model).hybrid
    equal, count = not hybrid and len(set(experts)) == 1, len(experts)
    state: dict[str, Any] = {}
    for name, group in groupby(parameters_of(model, rows), lambda one: one.name):
        parameters = list(group)
        if equal and "*" in name:
            makes = [one.make for one in parameters]
            for file_name in _file_names(parameters[0]):
                state[file_name.replace("*.", "")] = _lazy(makes, stacked=True)
                state |= _extra_states(file_name.replace("*.", ""), model, count)
            continue
        for one in parameters:
            for file_name in _file_names(one):
                numbered = file_name.replace("*", str(one.layer))
                state |= dict(_tensors(numbered, one, Heads.of(model.config)))
                state |= _extra_states(numbered, model, None)
    return state


def _file_names(parameter: MadeParameter) -> set[str]:
    """The names in this format, of which local layers and Transformer Engine's have one each where they differ."""
    if parameter.name == PRE_MLP_NORM:
        return {parameter.fused, FUSED[PRE_MLP_NORM]}
    return {EXPERTS.get(parameter.name, parameter.fused)}


def _tensors(name: str, parameter: MadeParameter, heads: Heads) -> Iterator[tuple[str, _Lazy]]:
    if parameter.kind not in PARTS:
        yield name, _lazy([parameter.make], stacked=False)
        return
    assert heads.mamba is not None
    sections = heads.mamba.sections(parameter.kind)
    for number, part in enumerate(PARTS[parameter.kind]):

        def make(number: int = number) -> Tensor:
            return parameter.make().split(sections)[number].contiguous()

        yield f"{name}.{part}", _lazy([make], stacked=False)


def _lazy(makes: list[Callable[[], Tensor]], *, stacked: bool) -> _Lazy:
    first = makes[0]()
    return _Lazy(makes, tuple(first.shape), first.dtype, stacked)


def _extra_states(name: str, model: Any, layers: int | None) -> dict[str, list[None]]:
    """The extra states of the module with the parameter ``name``, one for each layer of a stack and for each expert."""
    experts = ExpertShape.of(model.config)
    sizes = [layers] if layers is not None else []
    if ".experts." in name and experts is not None:
        sizes.append(experts.count)
    sizes = sizes or [1]
    places = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).view(-1, len(sizes)).tolist()
    whole = ".".join(map(str, sizes))
    return {
        f"{extra}/shard_{'.'.join(map(str, place))}_{whole}": [None] for extra in extra_states(name) for place in places
    }
