"""This rank's parameters of Megatron's under Hugging Face names: loading slices, and streaming whole tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck.errors import LimbeckError
from limbeck.models import unwrap_model
from limbeck.models.megatron_families import EMBEDDINGS, HEAD, Heads, Kind, family_of, joined, slice_of
from limbeck.strategies.shards import Sliceable, whole_box


@dataclass(frozen=True, eq=False)
class HeldParameter:
    """A parameter of this rank. kind, sources: see ``Rule``; the sources have the layer's number in the whole model."""

    parameter: nn.Parameter
    kind: Kind
    sources: tuple[str, ...]


class WeightMap:
    """The parameters of this rank's ``chunks`` (GPTModels) and the tensors of the Hugging Face ``model`` in them.

    With tied embeddings, a last stage apart from the first holds a copy of them, which is loaded but not streamed.
    """

    def __init__(self, chunks: Sequence[Any], model: Any, tensor: dist.ProcessGroup) -> None:
        config = unwrap_model(model).config
        self.tied = bool(config.tie_word_embeddings)
        self._heads, self._group = Heads.of(config), tensor
        self._vocab_size = unwrap_model(model).get_input_embeddings().num_embeddings
        self.held = [
            HeldParameter(parameter, *_origin(name, chunk, family_of(model).rules, self.tied))
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
        ]
        own_copy = {id(chunk.output_layer.weight) for chunk in chunks if self.tied and chunk.post_process}
        self.streamed = [held for held in self.held if id(held.parameter) not in own_copy]

    def slices(self, tensors: Mapping[str, Sliceable]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter of this rank of which ``tensors`` has the whole sources, and its slice of them."""
        rank, ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        for held in self.held:
            if held.sources[0] in tensors:
                sources = [tensors[name][whole_box(tensors[name].shape)] for name in held.sources]
                yield held.parameter, slice_of(held.kind, sources, self._heads, rank, ranks)

    def whole(self, held: HeldParameter, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors of what is in ``value``, of the parameter's shape, on all tensor-parallel ranks.
        Collective.
        """
        slices = [value]
        if held.kind != "copy" and dist.get_world_size(self._group) > 1:
            slices = [torch.empty_like(value) for _ in range(dist.get_world_size(self._group))]
            dist.all_gather(slices, value.contiguous(), group=self._group)
        yield from zip(held.sources, joined(held.kind, slices, self._heads, self._vocab_size), strict=True)

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
            wanted = {name: trained[name] for name in held.sources}
            if len(set(wanted.values())) > 1:
                frozen = next(name for name, value in wanted.items() if not value)
                raise LimbeckError(
                    f"student.model_args freezes {frozen}, but Megatron holds {', '.join(wanted)} in one parameter; freeze or "
                    "train all of them, or use fsdp2_train."
                )
            held.parameter.requires_grad_(wanted[held.sources[0]])


def _origin(name: str, chunk: Any, rules: Mapping[str, Any], tied: bool) -> tuple[Kind, tuple[str, ...]]:
    local = re.search(r"layers\.(\d+)\.", name)
    rule = rules[re.sub(r"layers\.\d+\.", "layers.*.", name)]
    layer = str(chunk.decoder.layers[int(local[1])].layer_number - 1) if local else ""
    sources = tuple(source.replace("*", layer) for source in rule.sources)
    return rule.kind, (EMBEDDINGS,) if tied and sources == (HEAD,) else sources
