"""Run by torchrun: a tensor-parallel run that records how much of a model each ``module.to(device)`` moves."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch.distributed.tensor import DTensor

from limbeck import DistillPipeline
from limbeck.config import load_mapping

moved = []
plain = torch.nn.Module.to


def recording(module, *args, **kwargs):
    local = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    moved.append(sum(parameter.numel() for parameter in local))
    return plain(module, *args, **kwargs)


dist.init_process_group("gloo")
torch.nn.Module.to = recording
DistillPipeline(load_mapping(yaml.safe_load(Path(sys.argv[1]).read_text())).config).run()
if dist.get_rank() == 0:
    Path(sys.argv[2]).write_text(json.dumps(moved))
dist.destroy_process_group()
