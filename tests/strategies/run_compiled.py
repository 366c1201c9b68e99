"""Run by torchrun with names of configurations: counts the executions of compiled graphs on this rank.

Writes ``<output_dir>/graph_runs-<rank>.json`` with those of each role.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import yaml

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from limbeck.models import compile as compiling
from limbeck.strategies.world import start_world

runs: dict[str, int] = {}


def count(graph, example_inputs):
    def run(*args):
        role = "student" if torch.is_grad_enabled() else "without gradients"
        runs[role] = runs.get(role, 0) + 1
        return graph.forward(*args)

    return run


with patch.object(compiling, "BACKEND", count), start_world() as world:
    for path in map(Path, sys.argv[1:]):
        torch._dynamo.reset()
        runs.clear()
        config = load_mapping(yaml.safe_load(path.read_text())).config
        DistillPipeline(config).run()
        (Path(config.output_dir) / f"graph_runs-{world.rank}.json").write_text(json.dumps(runs))
torch._dynamo.reset()
