"""The engine around DeepSpeed.

DeepSpeed keeps float32 masters and moments in flat pieces, one per rank. Here these are boxes of whole tensors under plain
names, so a checkpoint is the same as any other strategy's and resumes on another stage or number of ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from limbeck.errors import LimbeckError
from limbeck.strategies.base import (
    MODEL,
    EngineState,
    MicroBatches,
)
from limbeck.strategies.deepspeed.library import configuration, initialize, load_deepspeed
from limbeck.strategies.shards import Shard, Sliceable, flat_boxes, shard_of, whole_box
from limbeck.strategies.world import World

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class ZeroEngine:
    """Trains ``root``, which DeepSpeed wraps and shards, with ``optimizer``. The methods are those of ``Engine``.

    Args:
        block: DeepSpeed's configuration, without what the run decides.
        compute_dtype: precision in which parameters are held and computed, the masters staying float32; None is
        float32.
        accumulates: whether a step may have several micro-batches.
    """

    def __init__(
        self,
        root: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        block: Mapping[str, Any],
        *,
        compute_dtype: torch.dtype | None = None,
        max_norm: float = 0.0,
        accumulates: bool = False,
    ) -> None:
        self.root, self.optimizer = root, optimizer
        # References, not copies: DeepSpeed makes its masters from the rounded parameters, so these are set again below.
        exact = {name: p.detach() for name, p in root.named_parameters() if p.requires_grad} if compute_dtype else {}
        config = configuration(block, compute_dtype)
        config |= {
            "gradient_clipping": max_norm,
            # A number above 1 makes DeepSpeed accumulate at all; the boundaries are set step by step.
            "gradient_accumulation_steps": 2 if accumulates else 1,
            "zero_allow_untested_optimizer": True,
        }
        self._deepspeed = load_deepspeed()
        self._engine = initialize(root, config, world, compute_dtype, optimizer)
        self._zero: Any = self._engine.optimizer
        self._by_name = dict(root.named_parameters())
        if exact:
            self._load_model(exact)

    def forward_backward(self, micro_batches: MicroBatches[Any]) -> Iterator[Any]:
        self._set_training(True)
        count = len(micro_batches)
        for number, micro_batch in enumerate(micro_batches, 1):
            output = self._engine(micro_batch)
            del micro_batch
            self._engine.set_gradient_accumulation_boundary(number == count)
            self._engine.backward(output.loss, scale_wrt_gas=False)
            yield output

    @torch.no_grad()
    def evaluate(self, micro_batch: Any) -> Any | None:
        self._set_training(False)
        return self._engine(micro_batch)

    def step(self) -> Tensor:
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self._engine.device)

    def iter_weights(self) -> Iterator[tuple[str, Tensor]]:
        state = {
            name: tensor for name, tensor in self.root.state_dict(keep_vars=True).items() if name.startswith(MODEL)
        }
        uses = Counter(map(id, state.values()))
        tied: dict[int, Tensor] = {}  # kept, since gathering is not free and they come up again
        for name, tensor in state.items():
            value = tied[id(tensor)] if id(tensor) in tied else self._whole(tensor)
            if uses[id(tensor)] > 1:
                tied[id(tensor)] = value
            yield name.removeprefix(MODEL), value

    def state_dict(self) -> EngineState[Sequence[Shard]]:
        model = {name: self._shards(parameter, None) for name, parameter in self._trained()}
        return EngineState(model, self._optimizer_shards(), self._scaler_state())

    def load_state_dict(self, state: EngineState[Sliceable]) -> None:
        self._load_model(state.model)
        self._load_optimizer(state.optimizer)
        for key in _SCALER:
            if self._scaler is not None and key in state.scaler:
                setattr(self._scaler, key, state.scaler[key])

    def trained_names(self) -> set[str]:
        return {name for name, _ in self._trained()}

    def offload(self) -> None:
        raise LimbeckError("DeepSpeed moves no states between steps; use its own offload_optimizer and offload_param.")

    def reload(self) -> None:
        """Nothing was moved."""

    def held_tensors(self) -> dict[str, list[Tensor]]:
        parameters = list(self.root.parameters())
        kept = list(getattr(self._zero, "averaged_gradients", {}).values())
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return {
            # Of a parameter that ZeRO-3 shards, this rank's part.
            "parameters": [*(getattr(p, "ds_tensor", p) for p in parameters), *self.root.buffers()],
            "gradients": [
                *(p.grad for p in parameters if p.grad is not None),
                *(leaf for leaf in tree_leaves(kept) if torch.is_tensor(leaf)),
            ],
            "optimizer": [*(value for value in states if torch.is_tensor(value)), *self._flat_masters()],
        }

    def _set_training(self, training: bool) -> None:
        if self._engine.training != training:
            self._engine.train(training)

    def _whole(self, tensor: Any) -> Tensor:
        """The full value of a parameter, in float32 if it is trained, or of a buffer. Collective."""
        if not isinstance(tensor, nn.Parameter):
            return torch.as_tensor(tensor).detach()
        if tensor.requires_grad:
            value: Tensor = self._deepspeed.utils.safe_get_full_fp32_param(tensor)
            return value.detach()
        with self._gathered([tensor]):
            return tensor.detach().clone()

    def _load_model(self, state: Mapping[str, Sliceable]) -> None:
        for name, value in state.items():
            parameter = self._by_name[name]
            with self._gathered([parameter], writer=0), torch.no_grad():
                if not self._is_sharded or dist.get_rank() == 0:
                    parameter.copy_(value[whole_box(value.shape)])
            if parameter.requires_grad:
                self._set(parameter, value, None)

    def _optimizer_shards(self) -> dict[str, list[Shard]]:
        entries = self.optimizer.state.get(self._flat_masters()[0], {})
        if entries:
            self._link_moments()
        return {
            f"{name}|{entry}": self._shards(parameter, entry)
            if _is_moment(value)
            else [shard_of(torch.as_tensor(value).detach().float())]
            for name, parameter in self._trained()
            for entry, value in entries.items()
        }

    def _shards(self, parameter: nn.Parameter, entry: str | None) -> list[Shard]:
        """This rank's piece of the float32 master (``entry`` None) or of a moment: boxes of the flattened tensor."""
        shape, (start, stop) = self._shape(parameter), self._piece(parameter)
        shards: list[Shard] = []
        for box in flat_boxes(shape, start, stop):
            sizes = [part.stop - part.start for part in box]
            read = partial(self._read_piece, parameter, entry, sum(shard.size for shard in shards), sizes)
            shards.append(Shard(shape, box, read))
        return shards

    def _read_piece(self, parameter: nn.Parameter, entry: str | None, start: int, sizes: list[int]) -> Tensor:
        utils, mapping = self._deepspeed.utils, getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            piece = mapping.get_hp_fragment(entry)
        elif entry is None:
            piece = utils.safe_get_local_fp32_param(parameter)
        else:
            piece = utils.safe_get_local_optimizer_state(parameter, entry)
        return piece.detach()[start : start + math.prod(sizes)].view(sizes)

    def _piece(self, parameter: Any) -> tuple[int, int]:
        """Where this rank's piece of the flattened parameter begins and ends."""
        if self._is_sharded:
            size, rank = parameter.ds_tensor.numel(), dist.get_rank(parameter.ds_process_group)
            # The last rank's piece is padded.
            return min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel)
        if parameter._hp_mapping is None:
            return 0, 0
        address = parameter._hp_mapping.lp_fragment_address
        return address.start, address.start + address.numel

    @staticmethod
    def _shape(parameter: Any) -> tuple[int, ...]:
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def _load_optimizer(self, tensors: Mapping[str, Sliceable]) -> None:
        first = next(iter(self._trained()))[0]
        keys = [key for key in tensors if key.startswith(f"{first}|")]
        moments = {key.rpartition("|")[2] for key in keys if len(tensors[key].shape)}
        counts = {key.rpartition("|")[2]: tensors[key][()] for key in keys if not len(tensors[key].shape)}
        for flat in self._flat_masters():  # the optimizer makes its state in its first step, which is still to come
            self.optimizer.state[flat] = {
                **{entry: torch.zeros_like(flat) for entry in moments},
                **{entry: self._count_of(value) for entry, value in counts.items()},
            }
        self._link_moments()
        for name, parameter in self._trained():
            for entry in moments:
                self._set(parameter, tensors[f"{name}|{entry}"], entry)

    def _scaler_state(self) -> dict[str, Any]:
        scaler = self._scaler
        return {} if scaler is None else {key: getattr(scaler, key) for key in _SCALER if hasattr(scaler, key)}

    @property
    def _scaler(self) -> Any:
        return getattr(self._zero, "loss_scaler", None) if self._engine.fp16_enabled() else None

    @property
    def _is_sharded(self) -> bool:
        return bool(self._engine.zero_optimization_partition_weights())

    def _trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._by_name.items() if p.requires_grad)

    def _flat_masters(self) -> Sequence[Tensor]:
        """The float32 pieces of this rank, which are what the optimizer steps."""
        return (
            self._zero.fp32_partitioned_groups_flat if self._is_sharded else self._zero.single_partition_of_fp32_groups
        )

    def _link_moments(self) -> None:
        """Let every parameter of ZeRO 1 and 2 know its piece of the moments; DeepSpeed does so for the first group
        alone.
        """
        if not self._is_sharded:
            link = self._deepspeed.utils.lazy_init_hp_params_optimizer_state
            for group, flat in zip(self._zero.bit16_groups, self._flat_masters(), strict=True):
                link(group, flat, self.optimizer.state)

    def _gathered(self, parameters: Sequence[nn.Parameter], writer: int | None = None) -> Any:
        if not self._is_sharded:
            return nullcontext()
        return self._deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=writer)

    def _set(self, parameter: nn.Parameter, value: Sliceable, entry: str | None) -> None:
        """Put this rank's piece of a whole tensor into the masters (``entry`` None) or a moment of them."""
        utils, owner = self._deepspeed.utils, cast(Any, parameter)
        parts = [value[box].flatten().float() for box in flat_boxes(self._shape(parameter), *self._piece(parameter))]
        mine = torch.cat(parts) if parts else torch.empty(0)
        if not self._is_sharded:
            if owner._hp_mapping is not None:
                owner._hp_mapping.get_hp_fragment(entry).data.copy_(mine)
            return
        piece = torch.zeros(owner.ds_tensor.numel(), device=self._engine.device)  # the last rank's is padded
        piece[: mine.numel()] = mine
        if entry is None:
            utils.safe_set_local_fp32_param(parameter, piece)
        else:
            utils.safe_set_local_optimizer_state(parameter, piece, entry)

    def _count_of(self, value: Tensor) -> Any:
        """A step count as this optimizer keeps it: DeepSpeed's as an int, PyTorch's as a tensor beside the masters."""
        if type(self.optimizer).__module__.startswith("deepspeed."):
            return int(value)
        return value.clone().to(self._flat_masters()[0].device)


def _is_moment(value: Any) -> bool:
    return torch.is_tensor(value) and value.ndim > 0
