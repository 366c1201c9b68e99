"""Run by torchrun: a tensor-parallel run that records how much of a model each ``module.to(device)`` moves."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import yaml
from torch.distributed.tensor import DTensor

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from limbeck.strategies.world import start_world

moved = []
plain = torch.nn.Module.to


def recording(module, *args, **kwargs):
    local = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    moved.append(sum(parameter.numel() for parameter in local))
    return plain(module, *args, **kwargs)


with patch.object(torch.nn.Module, "to", recording), start_world() as world:
    DistillPipeline(load_mapping(yaml.safe_load(Path(sys.argv[1]).read_text())).config).run()
    if world.is_main:
        Path(sys.argv[2]).write_text(json.dumps(moved))
