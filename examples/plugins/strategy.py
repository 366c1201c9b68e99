"""A strategy: plain SGD with momentum in one process. Use it with ``student.strategy_args.strategy_name: sgd_train``."""

import torch

from limbeck.errors import LimbeckError
from limbeck.models import output_head
from limbeck.registry import OFFLOADS, STRATEGIES
from limbeck.strategies.base import Placement
from limbeck.strategies.model_parallel import outline_of
from limbeck.strategies.parallel_dims import ParallelDims
from limbeck.strategies.torch_engine import TorchEngine


class SgdStrategy:
    def dims(self, worker, ranks, role):
        return ParallelDims(dp_replicate=ranks)

    def check(self, config, dims, role, device_type):
        if dims.size > 1:
            raise LimbeckError("strategy_name = sgd_train runs in one process; use fsdp2_train on several ranks.")

    def check_model(self, model, dims, name, role):
        """Any model fits."""

    def build_student(self, spec, world):
        head_rows = output_head(spec.model).weight.shape[0]
        root = spec.make_root(Placement(outline_of(spec.model), head_rows)).to(world.device)
        trained = [parameter for parameter in root.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=spec.worker.training_args.learning_rate, momentum=0.9)
        return TorchEngine(root, optimizer, world, max_norm=spec.config.max_grad_norm)


# OFFLOADS: between steps, is_offload_states may move this strategy's models to host memory, as TorchEngine.offload does.
STRATEGIES.register("sgd_train", OFFLOADS)(SgdStrategy())
