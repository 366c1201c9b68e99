"""Megatron-LM's arguments as Hugging Face configurations, and models with random weights made of them."""

import re

import pytest
import torch
from tiny import make_tokenizer

from limbeck.config import load_mapping
from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, load_model, megatron_hybrid_config
from limbeck.models.megatron_checkpoint import arguments_of
from limbeck.models.megatron_config import canonical, hf_config, megatron_arguments

LLAMA = {
    "num_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "swiglu": True,
    "add_bias_linear": False,
    "padded_vocab_size": 384,
}
ARCHITECTURES = {
    "llama": {"untie_embeddings_and_output_weights": True, "rotary_base": 500000, "use_rope_scaling": True},
    "qwen2": {"add_qkv_bias": True, "rotary_seq_len_interpolation_factor": 2.0, "kv_channels": 16},
    "qwen3": {"qk_layernorm": True, "group_query_attention": True, "num_query_groups": 2, "norm_epsilon": 1e-6},
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_arguments_of_a_configuration_give_it_again(kind):
    config = hf_config(LLAMA | ARCHITECTURES[kind], "here")
    again = hf_config(megatron_arguments(config), "here")
    assert config.model_type == kind
    assert config.to_dict() == again.to_dict()
    assert canonical(megatron_arguments(config)).items() >= ARCHITECTURES[kind].items()


def test_what_is_not_given_has_the_default_of_megatron():
    config = hf_config(LLAMA, "here")
    assert (config.intermediate_size, config.head_dim, config.num_key_value_heads) == (128, 8, 8)
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.initializer_range) == (1e-5, True, 0.02)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_names_of_the_command_line_are_synonyms():
    flags = {"disable_bias_linear": True, "use_rotary_position_embeddings": True, "layernorm_epsilon": 1e-6}
    rest = {k: v for k, v in LLAMA.items() if k not in ("add_bias_linear", "position_embedding_type")}
    assert hf_config(rest | flags, "here").rms_norm_eps == 1e-6
    both = LLAMA | {"use_rotary_position_embeddings": False}  # in every checkpoint that was trained with the newer flag
    assert hf_config(both, "here").model_type == "llama"


def test_experts_and_hybrids_have_architectures_of_their_own():
    experts = {"num_experts": 4, "moe_ffn_hidden_size": 24, "moe_router_topk": 2}
    mixtral = hf_config(LLAMA | experts, "here")
    assert (mixtral.model_type, mixtral.num_local_experts, mixtral.intermediate_size) == ("mixtral", 4, 24)
    qwen = hf_config(LLAMA | experts | {"qk_layernorm": True, "moe_router_pre_softmax": True}, "here")
    assert (qwen.model_type, qwen.num_experts, qwen.moe_intermediate_size) == ("qwen3_moe", 4, 24)
    assert (qwen.num_experts_per_tok, qwen.norm_topk_prob, mixtral.num_experts_per_tok) == (2, False, 2)
    hybrid = {
        "hybrid_override_pattern": "MM*",
        "swiglu": False,
        "position_embedding_type": "none",
        "mamba_num_groups": 2,
    }
    config = megatron_hybrid_config.hf_config(LLAMA | hybrid | {"untie_embeddings_and_output_weights": True}, "here")
    assert (config.model_type, config.layer_types) == (
        "nemotron_h",
        ["linear_attention", "linear_attention", "full_attention"],
    )
    some = hf_config(LLAMA | experts | {"qk_layernorm": True, "moe_layer_freq": 2}, "here")
    assert some.mlp_only_layers == [1]
    for one, read in (
        (mixtral, hf_config),
        (qwen, hf_config),
        (some, hf_config),
        (config, megatron_hybrid_config.hf_config),
    ):
        assert read(arguments_of(one), "here").to_dict() == one.to_dict()


@pytest.mark.parametrize(
    ("pattern", "dense"),
    [("[0,1,1]", [0]), ("([0]+[1])*1+[1]", [0]), ("2*[1] + [0]", [2]), ("[1]*(1+2)", []), ([1, 0, 1], [1]), (2, [1])],
)
def test_a_pattern_of_layers_means_what_it_means_in_python(pattern, dense):
    arguments = LLAMA | {"num_experts": 4, "qk_layernorm": True, "moe_layer_freq": pattern}
    assert hf_config(arguments, "here").mlp_only_layers == dense


@pytest.mark.parametrize(
    "pattern",
    ["[0]+", "[0,[1,1]]", "[1]*99999999999", "[1]*1.5", "[1]**3", "__import__('os')", "(0,1,1)", "[0]+1", "1+2", "3-1"],
)
def test_another_expression_is_no_pattern_of_layers(pattern):
    arguments = LLAMA | {"num_experts": 4, "qk_layernorm": True, "moe_layer_freq": pattern}
    with pytest.raises(
        LimbeckError, match=re.escape(f"moe_layer_freq = {pattern} must be a whole number above 0, or a list")
    ):
        hf_config(arguments, "here")


def test_the_end_token_of_a_null_tokenizer_is_one_more():
    assert hf_config(LLAMA | {"vocab_size": 300, "tokenizer_type": "NullTokenizer"}, "here").vocab_size == 301


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"normalization": None}, "normalization is not given and has Megatron's default, LayerNorm, which cannot"),
        ({"position_embedding_type": "learned_absolute"}, "= learned_absolute cannot be expressed .* must be rope"),
        ({"add_bias_linear": True}, "add_bias_linear = True cannot be expressed .* must be false"),
        ({"num_experts": 4, "moe_layer_freq": 2}, "moe_layer_freq = 2 with num_experts is neither a mixtral"),
        (
            {"num_experts": 4, "moe_layer_freq": [0, 1]},
            "must be a whole number above 0, or a list of 0 and 1 for each of 3",
        ),
        (
            {"num_experts": 4, "moe_router_pre_softmax": True},
            "moe_router_pre_softmax = true with num_experts is neither",
        ),
        ({"num_experts": 4, "moe_router_topk": 5}, "moe_router_topk = 5 is more than num_experts = 4"),
        ({"num_layers": None}, "num_layers is missing; set it in"),
        ({"num_layers": 2.5}, "num_layers = 2.5 must be a whole number above 0"),
        ({"num_attention_heads": 5}, "hidden_size = 64 is not a multiple of num_attention_heads = 5; correct one"),
        ({"num_query_groups": 3}, "num_attention_heads = 8 is not a multiple of 3, as num_query_groups"),
        ({"add_qkv_bias": True, "qk_layernorm": True}, "together are neither a qwen2 nor a qwen3"),
    ],
)
def test_what_has_no_counterpart_is_one_sentence(changes, sentence):
    given = {name: value for name, value in (LLAMA | changes).items() if value is not None}
    with pytest.raises(LimbeckError, match=f"^here: .*{sentence}"):
        hf_config(given, "here")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("padded", "rows"), [(None, 299), (384, 384)])
def test_a_student_without_a_checkpoint_is_drawn_from_the_arguments(tokenizer, padded, rows):
    config = load_mapping(
        {
            "tokenizer": str(tokenizer),
            "student": {
                "model_args": {"megatron_arguments": {**LLAMA, "padded_vocab_size": padded, "init_method_std": 0.1}},
                "data_args": {"file_name": ["rows.jsonl"]},
            },
            "distill_loss_weight": 0,
        }
    ).config
    model = load_model(ModelSource.from_args(config.student.model_args, "student"), torch.float32, seed=3)
    again = load_model(ModelSource.from_args(config.student.model_args, "student"), torch.float32, seed=3)
    assert config.tokenizer_name_or_path == str(tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model.config.vocab_size == rows
    assert model.config.eos_token_id == make_tokenizer().eos_token_id
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.1 / 6**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_layer": 3}, r"student.model_args.megatron_arguments.num_layer is no argument .* is num_layers meant\?"),
        ({**LLAMA, "vocab_size": 200}, "has 299 tokens, and the vocabulary of the model has 200 rows"),
        (
            {**LLAMA, "num_attention_heads": 5, "kv_channels": 16},
            "^cannot load the new student: The hidden size .64. is not",
        ),
    ],
)
def test_arguments_that_fit_nothing_are_one_sentence(tokenizer, arguments, sentence):
    source = ModelSource(None, "student", megatron_arguments={**arguments, "tokenizer_model": str(tokenizer)})
    with pytest.raises(LimbeckError, match=sentence):
        load_model(source, torch.float32)


def test_a_teacher_needs_weights(tokenizer):
    with pytest.raises(
        LimbeckError, match=r"teacher.model_args.megatron_arguments.* describe a teacher without weights"
    ):
        load_mapping(
            {
                "student_pretrain": str(tokenizer),
                "student": {"data_args": {"file_name": ["rows.jsonl"]}},
                "teacher": {"model_args": {"megatron_arguments": LLAMA}},
            }
        )
