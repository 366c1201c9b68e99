"""This rank's parameters of Megatron's under Hugging Face names: loading slices, and streaming whole tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck.errors import LimbeckError
from limbeck.models import unwrap_model
from limbeck.models.megatron_families import EMBEDDINGS, HEAD, Family, Heads, Kind, joined, local_name, slice_of
from limbeck.strategies.megatron.bridge import find_family
from limbeck.strategies.megatron.core import ProcessGroups
from limbeck.strategies.shards import Box, Sliceable, whole_box


@dataclass(frozen=True, eq=False)
class HeldParameter:
    """A parameter of this rank, or a buffer that is saved with them.

    kind, sources: see ``Rule``; the sources have the layer's number in the whole model.
    """

    parameter: nn.Parameter
    kind: Kind
    sources: tuple[str, ...]


class WeightMap:
    """The parameters of this rank's ``chunks`` (GPTModels) and the tensors of the Hugging Face ``model`` in them.

    With tied embeddings, a last stage apart from the first holds a copy of them, which is loaded but not streamed.

    Raises:
        LimbeckError: if Megatron-Bridge describes other parameters than megatron-core builds.
    """

    def __init__(self, chunks: Sequence[Any], model: Any, groups: ProcessGroups) -> None:
        config = unwrap_model(model).config
        self.tied = bool(config.tie_word_embeddings)
        self._heads, self._groups = Heads.of(config), groups
        self._vocab_size = unwrap_model(model).get_input_embeddings().num_embeddings
        family = find_family(model)
        self.held = [
            HeldParameter(parameter, *_origin(name, chunk, family, self.tied))
            for chunk in chunks
            for name, parameter in chain(chunk.named_parameters(), chunk.named_buffers())
            if isinstance(parameter, nn.Parameter) or _rule_name(name) in family.rules
        ]
        own_copy = {id(chunk.output_layer.weight) for chunk in chunks if self.tied and chunk.post_process}
        self.streamed = [held for held in self.held if id(held.parameter) not in own_copy]
        numbers = {layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers}
        self._check(
            {source for one in family.parameters(model) if one.layer in numbers for source in one.sources},
            unwrap_model(model),
        )

    def _check(self, expected: set[str], model: Any) -> None:
        """Raise LimbeckError unless the layers have all tensors that are ``expected`` in them, and in their shapes."""
        odd = expected - {source for held in self.held for source in held.sources}
        for parameter, value in self.slices({name: value.to("meta") for name, value in model.state_dict().items()}):
            odd |= {
                held.sources[0] for held in self.held if held.parameter is parameter and value.shape != parameter.shape
            }
        for source in sorted(odd)[:1]:
            raise LimbeckError(
                f"megatron-core has no parameter that fits {source} of {model.config.model_type} models; use fsdp2_train and "
                "fsdp2_infer."
            )

    def slices(self, tensors: Mapping[str, Sliceable]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter of this rank of which ``tensors`` has the whole sources, and its slice of them."""
        for held in self.held:
            if held.sources[0] in tensors:
                sources = [tensors[name][self._box(held.kind, tensors[name].shape)] for name in held.sources]
                group = self._slicing(held.kind)
                yield (
                    held.parameter,
                    slice_of(held.kind, sources, self._heads, dist.get_rank(group), dist.get_world_size(group)),
                )

    def whole(self, held: HeldParameter, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors of what is in ``value``, of the parameter's shape, on all ranks with other slices of it.
        Collective.
        """
        group = self._groups.experts_and_slices if _of_experts(held.kind) else self._groups.tensor
        slices = [value]
        if held.kind != "copy" and dist.get_world_size(group) > 1:
            slices = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
            dist.all_gather(slices, value.contiguous(), group=group)
        ranks = dist.get_world_size(self._slicing(held.kind))
        parts = [
            joined(held.kind, slices[first : first + ranks], self._heads, self._vocab_size)
            for first in range(0, len(slices), ranks)
        ]
        yield from zip(
            held.sources, (torch.cat(x) if len(x) > 1 else x[0] for x in zip(*parts, strict=True)), strict=True
        )

    def _box(self, kind: Kind, shape: Sequence[int]) -> Box:
        """The part of a whole tensor that this rank reads: of experts, its own."""
        box = whole_box(shape)
        if not _of_experts(kind):
            return box
        own = shape[0] // dist.get_world_size(self._groups.experts)
        first = own * dist.get_rank(self._groups.experts)
        return (slice(first, first + own), *box[1:])

    def _slicing(self, kind: Kind) -> dist.ProcessGroup:
        """The ranks that have slices of the same matrices."""
        return self._groups.expert_slices if _of_experts(kind) else self._groups.tensor

    def stream(
        self, read: Callable[[nn.Parameter], Tensor], *, trained_only: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors of ``read(parameter)`` of the parameters of this rank's pipeline stage. Collective."""
        for held in self.streamed:
            if held.parameter.requires_grad or not trained_only:
                yield from self.whole(held, read(held.parameter))

    def freeze(self, trained: Mapping[str, bool]) -> None:
        """Train a parameter where its sources are trained, by name.

        Raises:
            LimbeckError: if only some of the sources of one parameter are trained.
        """
        for held in self.held:
            wanted = {name: trained.get(name, False) for name in held.sources}  # False for buffers
            if len(set(wanted.values())) > 1:
                frozen = next(name for name, value in wanted.items() if not value)
                raise LimbeckError(
                    f"student.model_args freezes {frozen}, but Megatron holds {', '.join(wanted)} in one parameter; freeze or "
                    "train all of them, or use fsdp2_train."
                )
            held.parameter.requires_grad_(wanted[held.sources[0]])


def _of_experts(kind: Kind) -> bool:
    return kind in ("experts_gate_up", "experts_down")


def _origin(name: str, chunk: Any, family: Family, tied: bool) -> tuple[Kind, tuple[str, ...]]:
    local = re.search(r"layers\.(\d+)\.", name)
    rule = family.rules.get(_rule_name(name))
    if rule is None:
        raise LimbeckError(
            f"megatron-core has a parameter {name} that Megatron-Bridge does not know; use fsdp2_train and fsdp2_infer."
        )
    layer = str(chunk.decoder.layers[int(local[1])].layer_number - 1) if local else ""
    sources = tuple(source.replace("*", layer) for source in rule.sources)
    return rule.kind, (EMBEDDINGS,) if tied and sources == (HEAD,) else sources


def _rule_name(name: str) -> str:
    """The name that ``Family.rules`` has for a parameter of a GPTModel."""
    return re.sub(r"layers\.\d+\.", "layers.*.", local_name(name))
