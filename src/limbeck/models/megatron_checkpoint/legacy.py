"""Megatron's format ``torch``: one file for each rank of tensor, pipeline and expert parallelism, each with its own layer
and expert numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.megatron_files.arguments import LEGACY, legacy_arguments
from limbeck.megatron_files.inert import read_torch_file
from limbeck.models.megatron_checkpoint.stored import LAYERS, Key, StoredCheckpoint, parameter_key

_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")

_EXPERTS = f"{LAYERS}*.mlp.experts."
_ONE_EXPERT = re.compile(rf"{re.escape(_EXPERTS)}(?:local_experts\.(\d+)\.)?linear_fc([12])\.weight(\d+)?")
"""A matrix of one of this rank's experts, as SequentialMLP or Transformer Engine names it."""
_MATRICES = {"1": f"{_EXPERTS}gate_up_proj", "2": f"{_EXPERTS}down_proj"}
_GROUPED = re.compile(rf"{re.escape(_EXPERTS)}weight([12])")
"""Those of all of this rank's experts in one matrix, as GroupedMLP has them."""


@dataclass(frozen=True)
class _Rank:
    """The place of a file in the layout with which it was saved."""

    tensor: int
    pipeline: int
    expert: int


@dataclass(frozen=True)
class _Layout:
    """Sizes of the layout. slices: ranks of tensor parallelism of an expert. experts: of a layer, of all ranks."""

    tensor: int
    pipeline: int
    expert: int
    slices: int
    experts: int


def open_legacy(folder: Path) -> StoredCheckpoint:
    """The checkpoint in ``folder``, whose files are merged.

    Raises:
        LimbeckError: if files are missing or damaged, or can only be unpickled.
    """
    files, arguments = _files(folder)
    layout = _layout(folder, files, arguments)
    states = {rank: read_torch_file(path) for rank, path in files.items()}
    first = next(rank for rank in files if rank.pipeline == 0)
    chunks = [name for name in ("model", *(f"model{i}" for i in range(1000))) if name in states[first]]
    parameters: dict[Key, Callable[[], list[Tensor]]] = {}
    offset = 0
    for chunk in chunks:  # virtual stage by virtual stage, each over all pipeline ranks, is the order of the layers
        for stage in range(layout.pipeline):
            found = {
                rank: _parameters(states[rank].get(chunk), files[rank], layout)
                for rank in files
                if rank.pipeline == stage
            }
            layers = 1 + max((layer for held in found.values() for _, layer in held if layer is not None), default=-1)
            for name, layer in {key: None for held in found.values() for key in held}:
                moved = name, None if layer is None else layer + offset
                held = {rank: held[name, layer] for rank, held in found.items() if (name, layer) in held}
                # Of what several stages hold, such as tied embeddings, the copy of the first counts.
                parameters.setdefault(moved, partial(_slices, held, layout, of_experts=name.startswith(_EXPERTS)))
            offset += layers
    return StoredCheckpoint(str(folder), arguments, parameters)


def _slices(held: dict[_Rank, Callable[[], Tensor]], layout: _Layout, *, of_experts: bool) -> list[Tensor]:
    """The slices of a parameter, given the parts of ranks; of experts with those of all expert-parallel ranks.

    An expert's slice is the one of the rank's number of tensor parallelism, modulo their number.
    """
    if not of_experts:
        whole = {rank.tensor: read for rank, read in held.items()}
        return [whole[number]() for number in sorted(whole)]
    parts = [
        {rank.expert: read for rank, read in held.items() if rank.tensor % layout.slices == number}
        for number in range(layout.slices)
    ]
    return [torch.cat([part[number]() for number in sorted(part)]) for part in parts]


def _files(folder: Path) -> tuple[dict[_Rank, Path], dict[str, Any]]:
    """The files by rank, and the arguments in the first of them."""
    numbers: dict[tuple[int, ...], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        found = _FOLDER.fullmatch(path.name)
        if found is None:
            raise LimbeckError(
                f"{path} is of a Megatron that is too old, which is not read; load it with Megatron-LM and save it with "
                "--ckpt-format torch_dist."
            )
        if not (path / LEGACY).is_file():
            raise LimbeckError(f"{path} has no {LEGACY}; copy the checkpoint again.")
        numbers[tuple(int(number) for number in found.groups() if number is not None)] = path / LEGACY
    arguments = legacy_arguments(next(iter(numbers.values())))
    # A second number is of the pipeline, unless the model has only one stage and its experts are divided.
    divided = (arguments.get("expert_model_parallel_size") or 1) > 1
    of_experts = divided and (arguments.get("pipeline_model_parallel_size") or 1) == 1
    files = {}
    for (tensor, *others), path in numbers.items():
        second, third = [*others, 0, 0][:2]
        files[_Rank(tensor, 0, second) if of_experts else _Rank(tensor, second, third)] = path
    return files, arguments


def _layout(folder: Path, files: Mapping[_Rank, Path], arguments: Mapping[str, Any]) -> _Layout:
    """The sizes by the arguments, or by the files where the arguments do not have them.

    Raises:
        LimbeckError: if the files are not those of the whole layout.
    """

    def size(axis: str) -> int:
        return max(arguments.get(f"{axis}_model_parallel_size") or 1, *(1 + getattr(rank, axis) for rank in files))

    tensor, pipeline, expert = size("tensor"), size("pipeline"), size("expert")
    slices = arguments.get("expert_tensor_parallel_size") or tensor
    layout = _Layout(tensor, pipeline, expert, min(slices, tensor), arguments.get("num_experts") or expert)
    if layout.experts % expert:
        raise LimbeckError(
            f"{folder}: expert_model_parallel_size = {expert} in its arguments does not divide num_experts = {layout.experts}; "
            "copy the checkpoint again."
        )
    for stage in range(pipeline):
        ranks = [rank for rank in files if rank.pipeline == stage]
        whole = {rank.tensor for rank in ranks} == set(range(tensor))
        experts = {(rank.expert, rank.tensor % layout.slices) for rank in ranks}
        missing = {(e, t) for e in range(expert) for t in range(layout.slices)} - experts
        if whole and not missing:
            continue
        t = min(set(range(tensor)) - {rank.tensor for rank in ranks}, default=min(missing, default=(0, 0))[1])
        which = f"tensor-parallel rank {t} and pipeline rank {stage}"
        sizes = f"{tensor} x {pipeline}"
        if expert > 1:
            which, sizes = f"{which} with expert-parallel rank {min(missing, default=(0, 0))[0]}", f"{sizes} x {expert}"
        raise LimbeckError(
            f"{folder} has no file of {which}, but the checkpoint was saved by {sizes} of them; copy it again."
        )
    return layout


def _parameters(state: Any, path: Path, layout: _Layout) -> dict[Key, Callable[[], Tensor]]:
    """Functions that read the parameters of a file; experts as one tensor, [experts of this rank, rows, columns]."""
    if not isinstance(state, Mapping) or "language_model" in state:
        raise LimbeckError(
            f"{path} holds no model of megatron-core; convert it with Megatron-LM's tools/checkpoint/convert.py first."
        )
    found: dict[Key, Callable[[], Tensor]] = {}
    experts: dict[Key, dict[int, Tensor]] = {}
    for key, value in _tensors(state):
        name, layer = key
        one = _ONE_EXPERT.fullmatch(name)
        if one is not None and (one[1] is None) != (one[3] is None):
            experts.setdefault((_MATRICES[one[2]], layer), {})[int(one[1] or one[3])] = value
        elif grouped := _GROUPED.fullmatch(name):
            split = partial(_split, value, layout.experts // layout.expert, int(grouped[1]) - 1, path)
            found[_MATRICES[grouped[1]], layer] = split
        else:
            found[key] = partial(torch.Tensor.detach, value)
    return found | {key: partial(_stack, matrices) for key, matrices in experts.items()}


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[Key, Tensor]]:
    for name, value in state.items():
        key = parameter_key(name)
        if key is not None and isinstance(value, Tensor):
            yield key, value


def _stack(matrices: dict[int, Tensor]) -> Tensor:
    return torch.stack([matrices[number] for number in sorted(matrices)])


def _split(value: Tensor, experts: int, axis: int, path: Path) -> Tensor:
    """[experts, rows, columns] of GroupedMLP's ``weight1`` or ``weight2``, with the model's width along ``axis``.

    Megatron multiplies with the transposed matrices, and views either as [experts, columns, rows].
    """
    if value.numel() % (experts * value.shape[axis]):
        raise LimbeckError(
            f"{path} has experts of the shape {list(value.shape)}, which are not {experts} matrices as num_experts in its "
            "arguments requires; copy the checkpoint again."
        )
    shape = (experts, value.shape[0], -1) if axis == 0 else (experts, -1, value.shape[1])
    return value.reshape(shape).transpose(1, 2)
