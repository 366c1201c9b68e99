"""Run by torchrun: one process group runs the configurations that are named, one after the other."""

import sys
from pathlib import Path

import torch.distributed as dist
import yaml

from limbeck import DistillPipeline
from limbeck.config import load_mapping

dist.init_process_group("gloo")
for path in map(Path, sys.argv[1:]):
    DistillPipeline(load_mapping(yaml.safe_load(path.read_text())).config).run()
dist.destroy_process_group()
