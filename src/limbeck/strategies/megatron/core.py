"""What this package uses of megatron-core beyond its stable interface, so that another version is adapted to here.

Versions 0.16 and later. Megatron is imported by the functions that need it: it is an extra, and importing it takes
seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck.errors import LimbeckError
from limbeck.strategies.parallel_dims import ParallelDims

_OLDEST = (0, 16)
_pristine: dict[str, Any] = {}


def import_megatron() -> Any:
    """The package ``megatron.core``; LimbeckError if it is missing or too old."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that Transformer Engine and Apex are not installed, five times
            import megatron.core
            import megatron.core.distributed
            import megatron.core.models.gpt
            import megatron.core.optimizer
            import megatron.core.parallel_state
            from megatron.core.transformer.moe import moe_utils
    except ImportError as error:
        raise LimbeckError(
            f"strategy_name = megatron_train or megatron_infer needs megatron-core ({error}); pip install "
            "'limbeck[megatron]', or use fsdp2_train and fsdp2_infer, which need nothing more."
        ) from error
    version = str(megatron.core.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise LimbeckError(
            f"megatron-core {version} is older than the versions that Limbeck knows; pip install 'limbeck[megatron]'."
        )
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 reads the name also without Transformer Engine
        moe_utils.te_general_gemm = None
    return megatron.core


def submodules_of(specification: Any) -> Any:
    """The submodules of a feed-forward layer, whose specification is a ModuleSpec in 0.16 and a function in 0.19."""
    return specification.keywords["submodules"] if isinstance(specification, partial) else specification.submodules


class ProcessGroups:
    """Megatron's process groups for one model.

    Megatron keeps the groups of one model in the globals of a module. A student and a teacher in the same processes have
    groups of their own, and ``activate`` puts one model's there before it computes. Every rank must make them.

    tensor: ranks with slices of the same matrices. experts: ranks with different experts. expert_slices: ranks with slices
    of the same expert's matrices. experts_and_slices: both, the slices of the first experts first.
    """

    def __init__(self, dims: ParallelDims, virtual_stages: int | None = None) -> None:
        core = import_megatron()
        state = self._state = vars(core.parallel_state)
        if not dist.is_initialized():  # a single process without a launcher
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        if not _pristine:
            _pristine.update(self._globals())
        state.update(_pristine)
        core.parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=dims.tp,
            pipeline_model_parallel_size=dims.pp,
            virtual_pipeline_model_parallel_size=virtual_stages,
            context_parallel_size=dims.cp,
            # So that Megatron accepts the order of ranks; the groups of experts are made below.
            expert_tensor_parallel_size=dims.tp * dims.cp,
            order="tp-cp-ep-pp-dp",  # as ParallelDims numbers ranks
            create_gloo_process_groups=False,
        )
        held = dims.expert_ranks()
        pp, copies, ep, etp = range(4)
        self.experts, self.expert_slices = _subgroup(held, ep), _subgroup(held, etp)
        self.experts_and_slices = _subgroup(held, ep, etp)
        stages, copies_of_experts = _subgroup(held, pp, ep, etp), _subgroup(held, copies)
        state.update(
            _EXPERT_MODEL_PARALLEL_GROUP=self.experts,
            _EXPERT_MODEL_PARALLEL_RANKS=dist.get_process_group_ranks(self.experts),
            _EXPERT_TENSOR_PARALLEL_GROUP=self.expert_slices,
            _EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP=self.experts_and_slices,
            _EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP=stages,
            _EXPERT_DATA_PARALLEL_GROUP=copies_of_experts,
            _INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP=copies_of_experts,
            # 0.19 also reads these, which are the same without its "GTP".
            _EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP=stages,
            _EXPERT_DATA_PARALLEL_GROUP_WITH_GTP_REMAT=copies_of_experts,
            _INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP_WITH_GTP_REMAT=copies_of_experts,
        )
        # Megatron forks these random states around its layers, although nothing here is drawn from them.
        core.tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        self._own = self._globals()
        self.tensor: dist.ProcessGroup = core.parallel_state.get_tensor_model_parallel_group()

    def activate(self) -> None:
        """Let Megatron's functions use these groups from now on."""
        self._state.update(self._own)

    def _globals(self) -> dict[str, Any]:
        return {name: value for name, value in self._state.items() if name.startswith("_") and name.isupper()}


def _subgroup(held: Tensor, *axes: int) -> dist.ProcessGroup:
    """The ranks that differ from this one along ``axes`` of ``held``, the last axis fastest. Every rank must make it."""
    others = [axis for axis in range(held.ndim) if axis not in axes]
    ranks = held.permute(*others, *axes).reshape(-1, prod(held.shape[axis] for axis in axes))
    group: dist.ProcessGroup = dist.new_subgroups_by_enumeration(ranks.tolist())[0]
    return group


class OptimizerTensors:
    """float32 values and Adam's moments of the model's parameters, under each of Megatron's optimizers.

    ``FP32Optimizer`` steps the parameters themselves, ``Float16OptimizerWithFloat16Params`` float32 copies, and
    ``DistributedOptimizer`` this data-parallel rank's piece of all parameters, laid end to end. Experts that have data-parallel
    ranks of their own have an optimizer of their own.

    Megatron's own loading is not used: without Transformer Engine and Apex it gives all pieces one ``step`` tensor, which
    then advances once for each of them.
    """

    MOMENTS = ("exp_avg", "exp_avg_sq")
    _SCALER = ("growth_tracker", "hysteresis_tracker")  # besides the scale

    def __init__(self, optimizer: Any) -> None:
        chained = getattr(optimizer, "chained_optimizers", [optimizer])
        self._optimizers = [one for one in chained if one.optimizer is not None]
        self.adams: list[torch.optim.Optimizer] = [one.optimizer for one in self._optimizers]
        scalers = [getattr(one, "grad_scaler", None) for one in self._optimizers]
        self._scalers = [one for one in scalers if one is not None]

    def scheduled(self) -> torch.optim.Optimizer:
        """An optimizer with all groups of parameters, for schedules of the learning rate."""
        return self.adams[0] if len(self.adams) == 1 else _Joined(self.adams)

    def read(self, parameter: nn.Parameter, entry: str | None) -> Tensor:
        """The value (``entry`` None) or a moment of ``parameter``, whole as this rank's model holds it. Collective."""
        if not parameter.requires_grad:
            return parameter.detach()
        optimizer = self._optimizer_of(parameter)
        piece = _piece(optimizer, parameter)
        stepped, (start, stop) = piece or (None, (0, 0))
        held = None
        if stepped is not None:
            held = stepped if entry is None else optimizer.optimizer.state[stepped][entry]
        if not _is_sharded(optimizer):
            assert held is not None
            return held.detach()
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if held is not None:
            whole[start:stop] = held.detach().flatten()
        dist.all_reduce(whole, group=optimizer.data_parallel_group)
        return whole.view_as(parameter)

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, entry: str | None, value: Tensor) -> None:
        """The inverse of ``read``, given the whole value on every rank."""
        if entry is None:
            parameter.copy_(value)
        if not parameter.requires_grad:
            return
        optimizer = self._optimizer_of(parameter)
        piece = _piece(optimizer, parameter)
        if piece is None:
            return
        stepped, (start, stop) = piece
        value = value.to(stepped.device, torch.float32).flatten()[start:stop].view_as(stepped)
        if entry is None:
            stepped.copy_(value)
        else:
            optimizer.optimizer.state[stepped][entry] = value.clone()

    def set_steps(self, count: int) -> None:
        """Set the number of steps that Adam has taken, from which it corrects the bias of its moments."""
        for adam in self.adams:
            for group in adam.param_groups:
                if not type(adam).__module__.startswith("torch."):  # Transformer Engine's and Apex's keep it here
                    group["step"] = count
                    continue
                for stepped in group["params"]:
                    adam.state[stepped]["step"] = torch.tensor(float(count))

    def read_scaler(self) -> dict[str, Any]:
        """JSON values of the scale of the loss in float16; empty in other precisions."""
        if not self._scalers:
            return {}
        state = self._scalers[0].state_dict()
        return {"scale": state["scale"].item(), **{key: state[key] for key in self._SCALER}}

    def write_scaler(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``read_scaler``. Another strategy's values are ignored."""
        if not all(key in state for key in ("scale", *self._SCALER)):
            return
        for scaler in self._scalers:
            scaler.load_state_dict({**state, "scale": torch.tensor([state["scale"]])})

    def join_scalers(self) -> None:
        """After a step, give all optimizers one scale: of the one whose gradients overflowed, if one's did."""
        if len(self._scalers) > 1:
            states = [scaler.state_dict() for scaler in self._scalers]
            lowest = min(states, key=lambda state: (state["scale"].item(), state["growth_tracker"]))
            for scaler in self._scalers:
                scaler.load_state_dict(lowest)

    def _optimizer_of(self, parameter: nn.Parameter) -> Any:
        return self._optimizers[-1 if is_divided_expert(parameter) else 0]


def is_divided_expert(parameter: nn.Parameter) -> bool:
    """Whether Megatron reduces the gradient over other ranks than the data-parallel ones."""
    return not getattr(parameter, "allreduce", True)


def _is_sharded(optimizer: Any) -> bool:
    return hasattr(optimizer, "model_param_group_index_map")


def _piece(optimizer: Any, parameter: nn.Parameter) -> tuple[Tensor, tuple[int, int]] | None:
    """What Adam steps of ``parameter`` on this rank, and its place in the flattened parameter; None if nothing."""
    if not _is_sharded(optimizer):
        return getattr(parameter, "main_param", parameter), (0, parameter.numel())
    if parameter not in optimizer.model_param_group_index_map:
        return None
    group, index = optimizer.model_param_group_index_map[parameter]
    place = optimizer._get_model_param_range_map(parameter)["param"]
    return optimizer.optimizer.param_groups[group]["params"][index], (place.start, place.end)


class _Joined(torch.optim.Optimizer):
    """The groups of several optimizers, which Megatron steps one by one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([torch.zeros(())], {})  # pieces of parameters, which it would refuse, replace it
        self.param_groups = [group for one in optimizers for group in one.param_groups]
        self._opt_called = True  # where schedulers look for a first step


def make_optimizer(chunks: Sequence[nn.Module], **settings: Any) -> Any:
    """Megatron's AdamW over its wrapped ``chunks``; weight decay acts on matrices, not on biases and norms."""
    core = import_megatron()
    config = core.optimizer.OptimizerConfig(optimizer="adam", decoupled_weight_decay=True, **settings)
    made = core.optimizer.get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False)
    for group in made.param_groups:  # Megatron leaves that to its own scheduler of learning rates
        group["weight_decay"] = settings["weight_decay"] * group.get("wd_mult", 1.0)
    return made
