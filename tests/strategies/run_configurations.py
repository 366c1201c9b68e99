"""Run by torchrun: one process group runs the configurations that are named, one after the other.

A mistake in a configuration is written beside it, with the suffix ``.error``.
"""

import sys
from pathlib import Path

import torch.distributed as dist
import yaml

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from limbeck.errors import LimbeckError
from limbeck.strategies.world import start_world

with start_world():
    for path in map(Path, sys.argv[1:]):
        try:
            DistillPipeline(load_mapping(yaml.safe_load(path.read_text())).config).run()
        except LimbeckError as error:
            if dist.get_rank() == 0:
                path.with_suffix(".error").write_text(str(error))
