"""Megatron-LM's arguments of hybrids become the configuration of the same model."""

import importlib.util
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from limbeck.errors import LimbeckError
from limbeck.models.megatron_hybrid_config import hf_config, initialize_mamba, layer_kinds

SYMBOLS = {"linear_attention": "M", "full_attention": "*", "mlp": "-"}
ARGUMENTS = {
    "num_layers": 4,
    "hybrid_override_pattern": "M-M*",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "mamba_head_dim": 16,
    "mamba_num_groups": 2,
    "mamba_state_dim": 8,
    "seq_length": 64,
    "padded_vocab_size": 128,
    "normalization": "RMSNorm",
    "position_embedding_type": "none",
    "add_bias_linear": False,
    "squared_relu": True,
    "untie_embeddings_and_output_weights": True,
}


def pattern(**arguments) -> str:
    return "".join(SYMBOLS[kind] for kind in layer_kinds(arguments, "args"))


@pytest.mark.parametrize(
    ("layers", "attention", "mlp", "expected"),
    [
        (8, 0.0, 0.0, "MMMMMMMM"),
        (10, 0.3, 0.0, "MM*MM*M*MM"),
        (10, 0.2, 0.2, "MMM*-M*MM-"),
        (12, 0.0, 0.5, "M-M-M-M-M-M-"),
    ],
)
def test_ratios_allocate_layers_by_the_rule_of_megatron(layers, attention, mlp, expected):
    given = {"num_layers": layers, "hybrid_attention_ratio": attention, "hybrid_mlp_ratio": mlp}
    assert pattern(**given) == expected


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs limbeck[megatron]")
@settings(deadline=None)
@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
def test_ratios_allocate_layers_as_megatron_itself(layers, attention, mlp):
    from megatron.core.ssm.mamba_hybrid_layer_allocation import allocate_layers

    mlp *= 1 - attention
    expected = "".join(allocate_layers(layers, attention, mlp))
    assert pattern(num_layers=layers, hybrid_attention_ratio=attention, hybrid_mlp_ratio=mlp) == expected


def test_the_configuration_has_the_sizes_of_the_arguments():
    config = hf_config(ARGUMENTS, "args")
    assert config.hybrid_override_pattern == "M-M*"
    assert (config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size) == (4, 16, 2, 8)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert (config.intermediate_size, config.mlp_hidden_act) == (48, "relu2")
    assert (config.vocab_size, config.max_position_embeddings) == (128, 64)
    defaults = {**ARGUMENTS, "hidden_size": 256, "ffn_hidden_size": None}
    for name in ("num_query_groups", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim"):
        del defaults[name]
    config = hf_config(defaults, "args")
    assert (config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size) == (8, 64, 8, 128)
    assert config.intermediate_size == 1024
    assert config.num_key_value_heads == 1
    assert hf_config({**defaults, "group_query_attention": None}, "args").num_key_value_heads == 4


def test_a_new_model_has_the_decays_and_steps_of_megatron():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config({**ARGUMENTS, "mamba_num_heads": 256}, "args"))
    initialize_mamba(model)
    for layer in (model.model.layers[0].mixer, model.model.layers[2].mixer):
        steps, decays = torch.nn.functional.softplus(layer.dt_bias), layer.A_log.exp()
        assert 1e-3 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.1
        assert 1 < decays.min() < 2 and 15 < decays.max() < 16
    assert model(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"normalization": None}, "normalization is not given and has Megatron's default, LayerNorm, which cannot be"),
        ({"position_embedding_type": "rope"}, "position_embedding_type = rope cannot be expressed as a nemotron_h model; it"),
        ({"add_bias_linear": None}, "it must be false (--disable-bias-linear)."),
        ({"squared_relu": False}, "squared_relu = False cannot be"),
        ({"norm_epsilon": 1e-6}, "norm_epsilon = 1e-06 cannot be expressed as a nemotron_h model; it must be 1e-5."),
        ({"untie_embeddings_and_output_weights": False}, "it must be true."),
        ({"hybrid_override_pattern": "MEM*"}, "the hybrid pattern MEM* has a layer E, and only M (Mamba)"),
        ({"num_layers": 5}, "the hybrid pattern M-M* has 4 layers, and num_layers is 5; correct one of them."),
        ({"hybrid_override_pattern": None, "hybrid_attention_ratio": 0.7, "hybrid_mlp_ratio": 0.5}, "must be their sum"),
        ({"hidden_size": None}, "args: hidden_size is missing; set it in model_args.megatron_arguments."),
        ({"mamba_state_dim": 8.5}, "mamba_state_dim = 8.5 must be a whole number above 0"),
        ({"mamba_num_groups": 3}, "heads of a Mamba layer = 4 is not a multiple of mamba_num_groups = 3; correct one."),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused_with_the_argument(changes, sentence):
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        hf_config({**ARGUMENTS, **changes}, "args")
