"""The verification at the start of a model-parallel run."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from ranks import run_on_ranks
from runs import rows, weights

from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, load_model
from limbeck.strategies import model_parallel
from limbeck.strategies.parallel_dims import ParallelDims
from limbeck.strategies.world import World


@pytest.mark.processes
def test_only_slices_of_a_model_move_to_the_devices(settings, assets, tmp_path):
    sizes = {f"{role}.strategy_args.strategy_config.tensor_model_parallel_size": 2 for role in ("student", "teacher")}
    config, found = tmp_path / "run.yaml", tmp_path / "moved.json"
    config.write_text(yaml.safe_dump(settings(**sizes, **rows(8), max_steps=1, eval_steps=0)))
    script = str(Path(__file__).with_name("run_recording_moves.py"))
    run_on_ranks(2, script, str(config), str(found))
    for name, moved in zip(("teacher", "student"), json.loads(found.read_text()), strict=True):
        assert moved < 0.7 * sum(tensor.numel() for tensor in weights(assets / name).values())


def test_a_model_that_changes_when_it_is_divided_is_refused(assets, monkeypatch):
    model = load_model(ModelSource(str(assets / "student"), "student"), torch.float32)
    dims = ParallelDims(cp=2)

    def damage(model, trunk, group, name):
        trunk.layers[0].mlp.down_proj.weight.mul_(2)

    monkeypatch.setattr(model_parallel, "apply_context_parallel", damage)
    monkeypatch.setattr(ParallelDims, "group", lambda self, device_type, axis: object() if axis == "cp" else None)
    with pytest.raises(LimbeckError, match=r"the student .* gives other hidden states with tensor_model_parallel_size"):
        model_parallel.apply_model_parallel(model, dims, World(0, 1, torch.device("cpu")), "the student")
