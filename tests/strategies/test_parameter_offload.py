"""A teacher whose parameters stay in host memory computes what it computed before."""

import torch
from tiny import make_model
from transformers import AutoModelForCausalLM

from limbeck.config.schema import TeacherConfig
from limbeck.models import decoder_layers, hidden_states
from limbeck.strategies.base import TeacherSpec
from limbeck.strategies.fsdp2 import STRATEGY
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
