"""Run by torchrun: trains the named configurations, and ModelOpt with their ``distillation_config`` on the same batches.

Beside each configuration's file, ``<name>.json`` gets the losses and gradient norms of ModelOpt's steps.
"""

import json
import sys
from pathlib import Path

import megatron_on_cpu  # noqa: F401
import modelopt_on_cpu
import torch
import torch.distributed as dist
import yaml
from transformers import AutoModelForCausalLM

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from limbeck.strategies.base import MicroBatches
from limbeck.strategies.megatron.core import ProcessGroups
from limbeck.strategies.megatron.engine import MegatronEngine
from limbeck.strategies.parallel_dims import ParallelDims

plain, steps = MegatronEngine.forward_backward, []


def recorded(engine, micro_batches):
    inputs = list(micro_batches)
    steps.append([one.batch for one in inputs])
    yield from plain(engine, MicroBatches(len(inputs), lambda: iter(inputs)))


MegatronEngine.forward_backward = recorded
dist.init_process_group("gloo")
for path in map(Path, sys.argv[1:]):
    given = yaml.safe_load(path.read_text())
    config = load_mapping(yaml.safe_load(path.read_text())).config
    DistillPipeline(config).run()
    groups = ProcessGroups(ParallelDims(tp=dist.get_world_size()))
    models = [
        modelopt_on_cpu.build_gpt(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), groups)
        for folder in (config.student_pretrain, config.teacher_pretrain)
    ]
    training = config.student.training_args
    trainer = modelopt_on_cpu.Trainer(
        *models, given["distillation_config"], groups, lr=training.learning_rate, weight_decay=training.weight_decay,
        adam_eps=training.adam_epsilon, clip_grad=config.max_grad_norm,
    )  # fmt: skip
    found = [trainer.step(batches)._asdict() for batches in steps]
    path.with_suffix(".json").write_text(json.dumps(found)) if dist.get_rank() == 0 else None
    steps.clear()
dist.destroy_process_group()
