"""Architectures that Megatron-Bridge describes, on CPUs without Transformer Engine."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import assert_same_weights, comparable, metrics, rows
from safetensors.torch import load_file, save_file
from tiny import make_data, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from limbeck.errors import LimbeckError
from limbeck.strategies.megatron.check import check_family
from limbeck.strategies.parallel_dims import ParallelDims
from strategies.megatron_runs import CP, EP, PP, SHARDED, SP, TP, VPP, layout, run_ranks

HERE = Path(__file__).parent
FOUND = importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.bridge") is not None
needs_bridge = pytest.mark.skipif(not FOUND, reason="needs megatron-bridge")

GLM = {"kind": "glm4_moe", "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
       "n_group": 1, "routed_scaling_factor": 1.5, "use_qk_norm": True, "attention_bias": True}  # fmt: skip
MODELS = {
    "nemotron": {"kind": "nemotron", "head_dim": 8, "vocab_size": 325},  # which two ranks pad
    "gemma": {"kind": "gemma", "head_dim": 8, "tie_word_embeddings": True, "layers": 4},
    "glm4_moe": {**GLM, "first_k_dense_replace": 1},
}
CASES = {  # ranks, model, the student's strategy_config and the teacher's
    "tp": (2, "nemotron", {TP: 2, **SP, **SHARDED}, {PP: 2}),
    "pp": (2, "gemma", VPP, {TP: 1}),
    "ep": (2, "glm4_moe", {EP: 2, **SHARDED}, {TP: 2, **SP}),
    "tp of experts": (2, "glm4_moe", {TP: 2, **SP, EP: 2, "expert_tensor_parallel_size": 1}, {CP: 2}),
    "one": (1, "glm4_moe", {}, {}),
}


def configuration(folder: Path, output: Path, model: str, **changes) -> dict:
    pairs = [[f"model.{x}"] * 2 for x in ("embed_tokens", "layers.0.self_attn.o_proj", "layers.1.mlp")]
    of_all = {**rows(2, 4), "sequence_length": 64, "student.use_sequence_packing": True, "features.pairs": pairs}
    return comparable(folder, output, model, f"{model}-teacher", **{**of_all, **changes})


@needs_bridge
@pytest.mark.processes
@pytest.mark.workers
def test_a_bridged_model_trains_as_with_fsdp2_and_takes_its_checkpoint(tmp_path):
    for name, shape in MODELS.items():
        for folder, seed in ((tmp_path / name, 0), (tmp_path / f"{name}-teacher", 1)):
            make_model(folder, seed=seed, **shape)
            weights = load_file(folder / "model.safetensors")
            for key in (key for key in weights if key.endswith("e_score_correction_bias")):
                weights[key] = torch.linspace(0.2, -0.2, len(weights[key]))
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
    make_data(tmp_path / "rows.jsonl", 48)
    for model in MODELS:
        DistillPipeline(load_mapping(configuration(tmp_path, tmp_path / f"{model}-fsdp2", model)).config).run()
    files = {}
    for name, (ranks, model, ours, teachers) in CASES.items():
        data = 2 if EP in ours and TP not in ours else 1
        changes = {**rows(2, 4 // data), **layout(ours, teachers)}
        changes["plugins"] = [str(HERE / f"{plugin}_on_cpu.py") for plugin in ("megatron", "bridge")]
        settings = configuration(tmp_path, tmp_path / name, model, **changes)
        files.setdefault(ranks, {})[tmp_path / f"{name}.yaml"] = settings
    resumed = {
        "output_dir": str(tmp_path / "again"),
        "resume_from_checkpoint": f"{tmp_path}/glm4_moe-fsdp2/checkpoint-2",
    }
    files[2][tmp_path / "again.yaml"] = files[2][tmp_path / "ep.yaml"] | resumed
    # Rounding sends a token to another expert.
    half = {"student.model_args.dtype": "bf16", "max_steps": 1, **layout({TP: 2, **SP})}
    half["plugins"] = files[1][tmp_path / "one.yaml"]["plugins"]
    files[2][tmp_path / "half.yaml"] = configuration(tmp_path, tmp_path / "half", "glm4_moe", **rows(2, 4), **half)
    # Bridge counts one shared expert.
    other = {"student_pretrain": str(make_model(tmp_path / "other", **MODELS["glm4_moe"], n_shared_experts=2))}
    files[1][tmp_path / "other.yaml"] = files[1][tmp_path / "one.yaml"] | {"output_dir": f"{tmp_path}/refused", **other}
    for ranks, group in files.items():
        run_ranks(ranks, group)
    errors = {path.stem: path.read_text() for path in tmp_path.glob("*.error")}
    assert errors.keys() == {"other"}, errors
    assert (
        "megatron-core has no parameter that fits model.layers.1.mlp.shared_experts.down_proj.weight" in errors["other"]
    )
    for name, (_, model, *_) in CASES.items():
        one, other = tmp_path / f"{model}-fsdp2", tmp_path / name
        for key in ("train/loss", "student/grad_norm"):
            assert metrics(other, key) == pytest.approx(metrics(one, key), rel=1e-5, abs=1e-5), f"{name}: {key}"
        assert_same_weights(one / "student", other / "student", tolerance=1e-5)
    assert_same_weights(tmp_path / "glm4_moe-fsdp2" / "student", tmp_path / "again" / "student", tolerance=1e-5)


@needs_bridge
@pytest.mark.processes
@pytest.mark.workers
def test_a_bridged_model_has_the_logits_of_transformers_and_gives_its_weights_back():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(HERE / "run_megatron_families.py"), *MODELS, "arcee"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def model_of(kind: str, **changes):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0}  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | changes))


@needs_bridge
@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("gemma2", {}, "with layers of its own (Gemma2ModelProvider), which Limbeck cannot build in"),
        ("olmoe", {}, "with layers of its own (olmoe_layer_spec)"),
        ("deepseek_v3", {}, "with multi_latent_attention = True"),
        ("ernie4_5_moe", {}, "with layers of its own (_ernie45_decoder_block_spec)"),
        ("gpt_oss", {}, "with position_embedding_type = yarn"),
        ("nemotron", {"hidden_act": "silu"}, "the activation squared_relu for hidden_act = silu"),
        ("olmo2", {}, "no weight map for model_type olmo2, only for llama"),
    ],
)
def test_what_limbeck_cannot_build_of_a_bridged_model_is_refused(kind, changes, sentence):
    importlib.import_module("strategies.megatron_on_cpu")
    importlib.import_module("strategies.bridge_on_cpu")
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        check_family(model_of(kind, **changes), ParallelDims(), "tiny", "student")


def test_a_sentence_names_megatron_bridge(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    with pytest.raises(LimbeckError, match=r"student\.strategy_args.*tiny.*no weight map.* install megatron-bridge"):
        check_family(model_of("nemotron"), ParallelDims(), "tiny", "student")
