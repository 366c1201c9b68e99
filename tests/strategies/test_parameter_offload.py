"""Models whose parameters stay in host memory. ``test_model_parallel.py`` compares what sharded ones compute."""

import pytest
import torch
from tiny import make_model
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import AutoModelForCausalLM

from limbeck import DistillPipeline, LimbeckError
from limbeck.config.schema import StrategyConfig, TeacherConfig
from limbeck.errors import UnknownMemory
from limbeck.models import decoder_layers, hidden_states
from limbeck.strategies import fsdp2
from limbeck.strategies.base import TeacherSpec
from limbeck.strategies.fsdp2 import STRATEGY
from limbeck.strategies.parallel_dims import ParallelDims
from limbeck.strategies.world import World
from strategies.engines import ALONE

OFFLOAD = {"strategy_args": {"strategy_config": {"offload_policy": True}}}


def build(folder, **settings):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return STRATEGY.build_teacher(TeacherSpec(model, "teacher", TeacherConfig(**settings)), ALONE)


def test_layers_are_copied_for_their_forward_pass_only(tmp_path):
    folder = make_model(tmp_path / "teacher")
    teacher, plain = build(folder, **OFFLOAD), build(folder)
    layers = decoder_layers(teacher.body)
    weights = [parameter for layer in layers for parameter in layer.parameters()]
    home = [weight.data_ptr() for weight in weights]
    assert teacher.offloaded == frozenset(weights)

    used = []
    first = next(layers[0].parameters())
    layers[0].mlp.register_forward_pre_hook(lambda module, args: used.append(first.data_ptr()))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        found, expected = (hidden_states(one.body, ids, None, None) for one in (teacher, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert used[0] != home[0]
    assert [weight.data_ptr() for weight in weights] == home


def test_a_plan_does_not_count_them_on_the_device(tmp_path):
    folder = make_model(tmp_path / "teacher")
    teacher, plain = build(folder, **OFFLOAD), build(folder)
    assert len(plain.held_tensors()) - len(teacher.held_tensors()) == len(teacher.offloaded)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fsdp_keeps_shards_on_the_host_and_pins_them_for_a_gpu(tmp_path, monkeypatch, device):
    given = []
    monkeypatch.setattr(fsdp2, "fully_shard", lambda module, **options: given.append(options.get("offload_policy")))
    monkeypatch.setattr(ParallelDims, "fsdp_mesh", lambda *args, **options: None)
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path))
    world = World(0, 2, torch.device(device))
    for policy in (None, CPUOffloadPolicy(pin_memory=device == "cuda")):
        fsdp2.shard(
            model, decoder_layers(model), world, world.dims, StrategyConfig(offload_policy=policy is not None), None
        )
        assert given == [policy] * 3  # two layers and the rest
        given.clear()


def test_a_student_alone_has_no_shards_to_keep_there(configure):
    changes = {"student.strategy_args.strategy_config.offload_policy": True}
    with pytest.raises(LimbeckError, match="offload_policy = true needs several processes, over which FSDP shards it"):
        DistillPipeline(configure(**changes)).run()
    simulated = STRATEGY.simulate(configure(**changes).student, "student")
    with pytest.raises(UnknownMemory, match="does not know what a student in host memory needs"), simulated:
        pass
    with pytest.raises(LimbeckError, match="and is_offload_states both keep the student in host memory"):
        configure(
            **changes, is_offload_states=True, **{f"{role}.device_mapping": [0, 1] for role in ("student", "teacher")}
        )
