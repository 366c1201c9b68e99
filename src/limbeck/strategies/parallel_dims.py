"""Which ranks hold slices of one model, which stretches of one row, which layers, and which are copies that see other rows.

Ranks are numbered with the tensor ranks closest together, then the context ranks, then the stages of a pipeline, then those
with other rows: neighbours, which talk most, share a machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from limbeck.errors import LimbeckError
from limbeck.strategies.pipeline_parallel import PipelineGroup
from limbeck.strategies.world import World

TENSOR = "tensor"
"""The mesh dimension over which matrices are sliced."""


@dataclass(frozen=True)
class Layout:
    """tensor: ranks among which every matrix is sliced. context: ranks among which every row's time is divided. pipeline: ranks
    among which the layers are divided. sequence: the tensor ranks divide the time between their slices, too.
    """

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    sequence: bool = False

    @property
    def together(self) -> int:
        """Neighbouring ranks that work on the same rows."""
        return self.tensor * self.context * self.pipeline

    def told(self) -> str:
        """The same in words; empty where every rank has the whole model and whole rows."""
        slices = f"matrices over {self.tensor} ranks" + (" that divide the time between them" if self.sequence else "")
        parts = {
            slices: self.tensor,
            f"rows over {self.context}": self.context,
            f"layers over {self.pipeline}": self.pipeline,
        }
        return ", ".join(words for words, size in parts.items() if size > 1)

    def check(self, world: World, role: str) -> None:
        """Raise LimbeckError unless the processes can be divided so."""
        if world.size % self.together:
            fitting = [size for size in range(1, world.size + 1) if world.size % size == 0]
            raise LimbeckError(
                f"{role}.strategy_args.strategy_config: tensor_model_parallel_size × context_parallel_size × "
                f"pipeline_model_parallel_size = {self.tensor} × {self.context} × {self.pipeline} does not divide the "
                f"{world.size} {'process' if world.size == 1 else 'processes'}; make their product {_either(fitting)}, or "
                "start another number of processes."
            )

    def context_group(self, world: World) -> dist.ProcessGroup | None:
        """The ranks that share this rank's rows and hold its slice of the matrices; None if it has the rows to itself."""
        if self.context == 1:
            return None
        return self._mesh(world).get_group(2)

    def stages(self, world: World) -> PipelineGroup | None:
        """This rank's place in its pipeline; None if it has all layers."""
        if self.pipeline == 1:
            return None
        return PipelineGroup(self._mesh(world).get_group(1))

    def together_group(self, world: World) -> dist.ProcessGroup | None:
        """All ranks that share this rank's rows; None if it has them to itself."""
        if self.together == 1:
            return None
        return mesh_of(world.device.type, (world.size // self.together, self.together)).get_group(1)

    def _mesh(self, world: World) -> DeviceMesh:
        copies = world.size // self.together
        return mesh_of(world.device.type, (copies, self.pipeline, self.context, self.tensor))


@cache
@unset_fake_temporarily()  # the numbers in a mesh are read, also where a plan's tensors have none
def mesh_of(device: str, shape: tuple[int, ...]) -> DeviceMesh:
    """All ranks as a grid, made once for a process group."""
    return init_device_mesh(device, shape)


def _either(sizes: list[int]) -> str:
    return f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])


def check_divides(
    layout: Layout, sizes: dict[str, int], heads: int, key_value_heads: int, name: str, role: str
) -> None:
    """Raise LimbeckError unless the model called ``name`` can be sliced so.

    sizes: what else the tensor ranks must divide, in words (``{"features of mlp.up_proj": 64}``). Key and value heads are
    divided, or where there are fewer of them than ranks, held by several.
    """

    def shared(ranks: int) -> bool:
        return heads % ranks == 0 and (key_value_heads % ranks == 0 or ranks % key_value_heads == 0)

    def sliced(tensor: int) -> bool:
        return shared(tensor) and not any(size % tensor for size in sizes.values())

    key = f"{role}.strategy_args.strategy_config"
    of_keys = "" if key_value_heads == heads else f" ({key_value_heads} of keys and values)"
    if not sliced(layout.tensor):
        what = next((f"{size} {words}" for words, size in sizes.items() if size % layout.tensor), None)
        what = what if shared(layout.tensor) else None
        fitting = [size for size in range(1, heads + 1) if sliced(size)]
        raise LimbeckError(
            f"{key}.tensor_model_parallel_size = {layout.tensor} does not divide the "
            f"{what or f'{heads} attention heads{of_keys}'} of {name}; use {_either(fitting)}."
        )
    if not shared(layout.tensor * layout.context):
        fitting = [size for size in range(1, heads + 1) if heads % size == 0 and shared(size * layout.tensor)]
        each = "" if layout.tensor == 1 else f" that are left for each of {layout.tensor} tensor ranks"
        raise LimbeckError(
            f"{key}.context_parallel_size = {layout.context} does not divide the {heads // layout.tensor} attention "
            f"heads{of_keys}{each} of {name}; use {_either(fitting)}."
        )
