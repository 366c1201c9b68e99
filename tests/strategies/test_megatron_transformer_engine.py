"""Transformer Engine's modules in Megatron's layers: their names, and with a stand-in for its kernels whole runs."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import assert_same_weights, comparable, metrics, rows
from tiny import make_data, make_model

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from limbeck.errors import LimbeckError
from limbeck.models.megatron_families import FUSED_NORMS, local_name
from limbeck.strategies.megatron.capture import capture_in
from strategies.megatron_runs import layout, needs_megatron, run_ranks

HERE = Path(__file__).parent
TP, PP, SP = "tensor_model_parallel_size", "pipeline_model_parallel_size", {"sequence_parallel": True}
ENGINE = {"transformer_impl": "transformer_engine"}

MODELS = {
    "qwen2": {"kind": "qwen2"},  # biases
    "moe": {"kind": "qwen3_moe", "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1],
            "moe_intermediate_size": 24},
    "hybrid": {"kind": "nemotron_h", "hybrid_override_pattern": "M-*-", "layers": 4, "head_dim": 8, "mamba_num_heads": 8,
               "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 16},
}  # fmt: skip


def configuration(folder: Path, output: Path, model: str, student: dict, **changes) -> dict:
    of_all = {
        **rows(2),
        **layout(student, {TP: 2, **SP, **ENGINE}),
        "sequence_length": 64,
        "max_steps": 3,
        "student.use_sequence_packing": True,
        "plugins": [str(HERE / f"{name}_on_cpu.py") for name in ("megatron", "transformer_engine")],
    }
    return comparable(folder, output, model, f"{model}-teacher", **{**of_all, **changes})


@needs_megatron
@pytest.mark.processes
@pytest.mark.workers
def test_layers_of_transformer_engine_train_as_local_ones_and_take_their_checkpoints(tmp_path):
    for name, shape in MODELS.items():
        make_model(tmp_path / name, **shape)
        make_model(tmp_path / f"{name}-teacher", seed=1, **shape)
    make_data(tmp_path / "rows.jsonl", 48)
    pair = {"features.pairs": [["model.layers.0.self_attn.o_proj", "model.layers.1.mlp"]]}
    local = {"transformer_impl": "local"}
    layouts = {"qwen2": {TP: 2, **SP}, "moe": {TP: 2, **SP, "expert_model_parallel_size": 2}, "hybrid": {PP: 2}}
    layouts["moe"]["expert_tensor_parallel_size"] = 1
    files = {}

    def add(name: str, model: str, student: dict, **changes) -> None:
        changes |= pair if model == "qwen2" else {}
        settings = configuration(tmp_path, tmp_path / f"{name}-out", model, student, **changes)
        files[tmp_path / f"{name}.yaml"] = settings

    for model, student in layouts.items():
        add(f"{model}-local", model, student | local)
        add(f"{model}-engine", model, student | ENGINE)
    resumed = {"resume_from_checkpoint": str(tmp_path / "qwen2-local-out" / "checkpoint-2")}
    add("again", "qwen2", {PP: 2, **ENGINE, "use_distributed_optimizer": True}, **resumed)
    run_ranks(2, files)
    for model in MODELS:
        one, other = (tmp_path / f"{model}-{kind}-out" for kind in ("local", "engine"))
        for key in ("train/loss", "student/grad_norm"):
            assert metrics(other, key) == pytest.approx(metrics(one, key), rel=1e-5), model
        assert_same_weights(one / "student", other / "student", tolerance=1e-5)
    assert_same_weights(tmp_path / "qwen2-local-out" / "student", tmp_path / "again-out" / "student", tolerance=1e-5)


@needs_megatron
def test_the_names_of_norms_are_those_of_megatron():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.post_training.modelopt.gpt.state_dict_hooks import mcore_gpt_load_te_state_dict_pre_hook

    names = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.sharded_state_dict_keys_map
    assert {fused: separate for separate, fused in names.items()}.items() <= FUSED_NORMS.items()
    for fused, separate in FUSED_NORMS.items():  # which are also those of Mamba layers
        name = f"decoder.layers.3.{fused}weight"
        state = {name: None}
        mcore_gpt_load_te_state_dict_pre_hook(state, "", {}, True, [], [], [])
        assert list(state) == [f"decoder.layers.3.{separate}weight"] == [local_name(name)]
    assert local_name("decoder.layers.3.mlp.linear_fc1.weight") == "decoder.layers.3.mlp.linear_fc1.weight"


@pytest.mark.parametrize(
    "name", [f"model.layers.{x}" for x in ("0.input_layernorm", "1.post_attention_layernorm", "2.norm")]
)
def test_pairs_of_fused_norms_are_refused(name):
    gpt = SimpleNamespace(config=SimpleNamespace(transformer_impl="transformer_engine"))
    trunk = SimpleNamespace(hybrid=name.endswith(".norm"), gpt=gpt)
    sentence = f"the teacher's {name} together with the matrix after it"
    with pytest.raises(LimbeckError, match=sentence):
        capture_in(trunk, "teacher", [name])


@needs_megatron
@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is there")
def test_a_sentence_says_what_is_missing(tmp_path):
    make_model(tmp_path / "qwen2")
    make_model(tmp_path / "qwen2-teacher", seed=1)
    make_data(tmp_path / "rows.jsonl", 8)
    settings = configuration(tmp_path, tmp_path / "out", "qwen2", ENGINE)
    del settings["plugins"]
    sentence = (
        "student.strategy_args.strategy_config.transformer_impl = transformer_engine needs Transformer Engine 1.9.0 or "
        "later; pip install 'transformer-engine[pytorch]', or use local."
    )
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        DistillPipeline(load_mapping(settings).config).run()
