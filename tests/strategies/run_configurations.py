"""Run by torchrun: one process group runs the configurations that are named, one after the other."""

import sys
from pathlib import Path

import yaml

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from limbeck.strategies.world import start_world

with start_world():
    for path in map(Path, sys.argv[1:]):
        DistillPipeline(load_mapping(yaml.safe_load(path.read_text())).config).run()
