"""Megatron's layouts give what FSDP2 gives with the Hugging Face model, and their checkpoints are everybody's."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from runs import assert_same_weights, forget_after, metrics, nested, rows, training_state
from safetensors.torch import load_file, save_file
from tiny import make_data, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from limbeck.config.schema import MegatronConfig
from limbeck.errors import LimbeckError
from limbeck.models.megatron_families import Heads, MambaSizes, joined, local_name, padded_rows, slice_of
from limbeck.strategies.megatron.body import build_gpt_chunks
from limbeck.strategies.megatron.capture import capture_in
from limbeck.strategies.megatron.check import check_family
from limbeck.strategies.parallel_dims import ParallelDims

TP, CP, PP = "tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"
VPP_KEY = "virtual_pipeline_model_parallel_size"
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
VPP = {PP: 2, VPP_KEY: 2}
SP, SHARDED = {"sequence_parallel": True}, {"use_distributed_optimizer": True}
RECOMPUTED, SELECTIVE = {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}
EP = "expert_model_parallel_size"
ALLGATHER, GROUPED = {"moe_token_dispatcher_type": "allgather"}, {"moe_grouped_gemm": True}
OVERLAPPED = {"overlap_grad_reduce": True, "ddp_average_in_collective": True}

needs_megatron = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs limbeck[megatron]")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
HYBRID = {
    "hybrid_override_pattern": "M-*M",
    "head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 16,
}
# Norms of queries and keys; rows of uneven lengths, which neither 2 nor 4 divides. Tied and padded vocabulary, packed.
# Pairs of layers on the same and on different stages; the teacher is wider, so projections are trained.
LAYER = "model.layers."
STUDENTS = {
    "qwen3": (
        {"kind": "qwen3", "head_dim": 8, "vocab_size": 325},
        {
            "student.sequence_length_round_in_train": 1,
            "features.pairs": [
                ["model.embed_tokens", "model.embed_tokens", "mse"],
                [f"{LAYER}0.mlp", f"{LAYER}3.mlp"],
                [f"{LAYER}2.post_attention_layernorm", f"{LAYER}0.input_layernorm"],
                [f"{LAYER}3.self_attn", f"{LAYER}1.self_attn.o_proj", "mse"],
            ],
        },
    ),
    "llama": (
        {"kind": "llama", "vocab_size": 333, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
        {
            "student.use_sequence_packing": True,
            "sequence_length": 96,
            "features.pairs": [[f"{LAYER}*", f"{LAYER}*"], ["model.norm", f"{LAYER}3", "mse"]],
            "features.mask": "supervised",
        },
    ),
    # A layer without experts; weights of experts that do not sum to 1, and that do.
    "qwen3_moe": (
        {"kind": "qwen3_moe", "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "mlp_only_layers": [1]},
        {"student.sequence_length_round_in_train": 1},
    ),
    "mixtral": (
        {"kind": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True},
        {"student.use_sequence_packing": True, "sequence_length": 96},
    ),
    "hybrid": (
        {"kind": "nemotron_h", **HYBRID},
        {"student.use_sequence_packing": True, "sequence_length": 95, "student.sequence_length_round_in_train": 1},
    ),
}  # fmt: skip
TEACHERS = {"hybrid": "teacher of hybrid", "mixtral": "qwen3_moe"}  # other students have the same teacher
CASES = {  # ranks, student, what the student's strategy_config has, and the teacher's; None is fsdp2_infer
    "tp": (2, "qwen3", {TP: 2, **SELECTIVE}, None),
    "tp, sequence": (2, "qwen3", {TP: 2, **SP, **RECOMPUTED}, {TP: 2, **SP}),
    "pp": (2, "qwen3", {PP: 2, "num_layers_in_first_pipeline_stage": 1}, {TP: 2}),
    "pp, interleaved": (2, "llama", VPP, {PP: 2}),
    "dp, sharded": (2, "qwen3", {**SHARDED, **OVERLAPPED}, {PP: 2}),
    "cp": (2, "llama", {CP: 2, **SHARDED}, {CP: 2}),
    "ep": (2, "qwen3_moe", {EP: 2, **SHARDED}, None),
    "ep, all-gather": (2, "mixtral", {EP: 2, **ALLGATHER, **GROUPED, **RECOMPUTED}, {EP: 2}),
    "tp of experts": (2, "qwen3_moe", {TP: 2, **SP, **SELECTIVE, "recompute_modules": ["moe"]}, None),
    "ep of tp": (2, "mixtral", {TP: 2, **SP, EP: 2, "expert_tensor_parallel_size": 1}, None),
    "ep of cp": (2, "mixtral", {CP: 2, EP: 2}, {PP: 2}),
    "hybrid, tp": (2, "hybrid", {TP: 2, **SP, **RECOMPUTED}, {PP: 2}),
    "hybrid, pp": (2, "hybrid", {**VPP, **SHARDED}, {TP: 2}),
    "tp x pp": (4, "llama", {TP: 2, PP: 2, **SP, **SHARDED}, {TP: 4}),
    "dp x pp, interleaved": (4, "llama", {**VPP, **SHARDED}, {PP: 2, CP: 2}),
    "ep x pp": (4, "qwen3_moe", {EP: 2, PP: 2, **SHARDED}, None),
    "ep x tp": (4, "mixtral", {EP: 2, TP: 2, **SP}, {EP: 2, PP: 2, **ALLGATHER}),
    "dp x tp": (4, "qwen3", {TP: 2, **SP, **SHARDED}, {TP: 2, PP: 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models and data."""
    folder = tmp_path_factory.mktemp("megatron")
    make_model(folder / "teacher", hidden=48, layers=4, seed=1, num_key_value_heads=4)
    for path in (folder / "teacher").glob("tokenizer*"):  # Transformers reads one file as another tokenizer for llama
        path.unlink()
    make_data(folder / "rows.jsonl", 96)
    for name, (shape, _) in STUDENTS.items():
        make_model(folder / name, layers=4, **shape)
        if name == "hybrid":
            make_model(folder / TEACHERS[name], seed=1, **shape)
    for student in ("qwen3", "qwen3_moe"):
        weights = load_file(folder / student / "model.safetensors")
        for name in weights:  # as in a fresh model; three times that, attention is so sharp that rounding grows
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weights[name] /= 3
        save_file(weights, folder / student / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def runs_of_fsdp2(folder) -> dict[str, Path]:
    """For each student the folder of its run by one process."""
    outputs = {name: folder / f"{name}-one" for name in STUDENTS}
    for name, output in outputs.items():
        DistillPipeline(load_mapping(configuration(folder, output, name)).config).run()
    return outputs


def configuration(folder: Path, output: Path, student: str, **changes) -> dict:
    return nested(
        {
            "student_pretrain": str(folder / student),
            "teacher_pretrain": str(folder / TEACHERS.get(student, "teacher")),
            "output_dir": str(output),
            "sequence_length": 63,
            "max_steps": 8,
            "save_steps": 4,
            "eval_steps": 8,
            "track_with": "none",
            "student.model_args.dtype": "fp32",
            "student.model_args.disable_gradient_checkpointing": True,
            "student.training_args.learning_rate": 1e-3,
            "student.training_args.weight_decay": 0.1,
            "student.training_args.adam_epsilon": 1e-4,  # else the rounding of gradients near 0 becomes whole steps
            **rows(2, 4),
            "student.data_args.file_name": [str(folder / "rows.jsonl")],
            "teacher.model_args.dtype": "fp32",
            "validation.data_args.file_name": [str(folder / "rows.jsonl")],
            **STUDENTS[student][1],
            **changes,
        }
    )


def layout(student: dict, teacher: dict | None = None) -> dict:
    """Megatron for the student and, unless it has no settings, for the teacher."""
    found = {
        "plugins": [str(Path(__file__).with_name("megatron_on_cpu.py"))],
        "student.strategy_args.strategy_name": "megatron_train",
        "student.strategy_args.strategy_config": student,
    }
    if teacher is not None:
        found |= {
            "teacher.strategy_args.strategy_name": "megatron_infer",
            "teacher.strategy_args.strategy_config": teacher,
        }
    return found


def run_ranks(ranks: int, configurations: dict[Path, dict]) -> None:
    for path, settings in configurations.items():
        path.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = str(Path(__file__).with_name("run_configurations.py"))
    done = subprocess.run(
        [*command, script, *map(str, configurations)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_megatron
@pytest.mark.processes
@pytest.mark.workers
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_layout_gives_the_losses_and_the_student_of_fsdp2_and_takes_its_checkpoint(
    folder, runs_of_fsdp2, tmp_path, ranks
):
    cases = {name: case for name, case in CASES.items() if case[0] == ranks}
    files = {}
    for i, (_, student, ours, teachers) in enumerate(cases.values()):
        data = 1 if ours.get(TP, 1) * ours.get(PP, 1) * ours.get(CP, 1) == ranks else 2
        changes = {**rows(2, 4 // data), **layout(ours, teachers)}
        files[tmp_path / f"{i}.yaml"] = configuration(folder, tmp_path / str(i), student, **changes)
    # What one process has begun with FSDP2 goes on, and what other ranks have begun with other sizes.
    begun, again = tmp_path / "begun", tmp_path / "again"
    moe_begun, moe_again = tmp_path / "experts-begun", tmp_path / "experts-again"
    if ranks == 2:
        sharded = files[tmp_path / "4.yaml"]
        for output, source in ((begun, runs_of_fsdp2["qwen3"]), (again, tmp_path / "4")):
            resumed = {"output_dir": str(output), "resume_from_checkpoint": str(source / "checkpoint-4")}
            files[tmp_path / f"{output.name}.yaml"] = sharded | resumed
        # The same of experts: begun with FSDP2, and begun with their own optimizer.
        experts, number = files[tmp_path / f"{list(cases).index('ep')}.yaml"], list(cases).index("ep")
        for output, source in ((moe_begun, runs_of_fsdp2["qwen3_moe"]), (moe_again, tmp_path / str(number))):
            resumed = {"output_dir": str(output), "resume_from_checkpoint": str(source / "checkpoint-4")}
            files[tmp_path / f"{output.name}.yaml"] = experts | resumed
        # Steps that are lost without float32 masters.
        half = {"student.model_args.dtype": "bf16", "student.training_args.learning_rate": 1e-9, "max_steps": 1}
        halves = {
            "bf16-dp": ("qwen3", {**SHARDED, **RECOMPUTED}),
            "bf16-pp": ("qwen3", {PP: 2}),
            "bf16-ep": ("qwen3_moe", {EP: 2, "moe_router_dtype": "fp32"}),
        }
        for name, (student, sizes) in halves.items():
            changes = {**half, **rows(2, 2), **layout(sizes), "eval_steps": 0}
            files[tmp_path / f"{name}.yaml"] = configuration(folder, tmp_path / name, student, **changes)
    else:
        files[tmp_path / "again.yaml"] = configuration(
            folder,
            again,
            "llama",
            **rows(2, 2),
            **layout({CP: 2}),
            resume_from_checkpoint=str(tmp_path / "0" / "checkpoint-4"),
        )
    run_ranks(ranks, files)
    for i, (name, (_, student, *_)) in enumerate(cases.items()):
        one, many = runs_of_fsdp2[student], tmp_path / str(i)
        features = ["train/features/total"] if "features.pairs" in STUDENTS[student][1] else []
        for key in ("train/loss", "train/train_distill_loss", *features, "student/grad_norm", "val/loss"):
            assert metrics(many, key) == pytest.approx(metrics(one, key), rel=1e-5, abs=1e-5), f"{name}: {key}"
        assert_same_weights(one / "student", many / "student", tolerance=1e-5)
        assert_same_state(one / "checkpoint-8", many / "checkpoint-8")
    if ranks == 2:
        assert_same_weights(runs_of_fsdp2["qwen3"] / "student", begun / "student", tolerance=1e-5)
        assert_same_weights(tmp_path / "4" / "student", again / "student")  # exactly
        assert_same_weights(runs_of_fsdp2["qwen3_moe"] / "student", moe_begun / "student", tolerance=1e-5)
        assert_same_weights(tmp_path / str(number) / "student", moe_again / "student")  # exactly
        for name, (student, _) in halves.items():
            started = AutoModelForCausalLM.from_pretrained(folder / student).state_dict()
            masters = training_state(tmp_path / name / "checkpoint-1", "masters")
            for key, master in ((key, master) for key, master in masters.items() if key in started):
                torch.testing.assert_close(master, started[key], rtol=0, atol=1e-8)
    else:
        assert_same_weights(runs_of_fsdp2["llama"] / "student", again / "student", tolerance=1e-5)
        # And back: what the slices and stages of the first case have saved goes on in one process with FSDP2.
        forget_after(tmp_path / "0", 4)
        settings = configuration(folder, tmp_path / "0", "llama", resume_from_checkpoint=True)
        DistillPipeline(load_mapping(settings).config).run()
        assert_same_weights(runs_of_fsdp2["llama"] / "student", tmp_path / "0" / "student", tolerance=1e-5)


@needs_megatron
@pytest.mark.processes
@pytest.mark.workers
def test_every_family_has_the_logits_of_transformers_and_gives_its_weights_back():
    script = str(Path(__file__).with_name("run_megatron_families.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def assert_same_state(one: Path, other: Path) -> None:
    for name in ("masters", "optimizer"):
        first, second = (training_state(path, name) for path in (one, other))
        assert first.keys() == second.keys()
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, rtol=0, atol=1e-5, msg=key)


@needs_megatron
@pytest.mark.processes
@pytest.mark.workers
def test_memory_is_flat_without_the_garbage_collector(folder, tmp_path):
    changes = {**rows(1, 2), **layout({}, {}), "max_steps": 500, "save_steps": 0, "eval_steps": 0}
    settings = configuration(folder, tmp_path / "out", "qwen3", **changes, logging_steps=50)
    settings["plugins"].append(str(Path(__file__).with_name("count_objects.py")))
    run_ranks(1, {tmp_path / "run.yaml": settings})
    found = [json.loads(line) for line in (tmp_path / "out" / "objects-0.jsonl").read_text().splitlines()]
    before, *_, after = found
    assert (before["step"], after["step"]) == (100, 500)
    assert after["objects"] - before["objects"] < 400 / 10, "less than one object in ten steps"
    assert after["resident_mb"] - before["resident_mb"] < 10


SHARED = Path(__file__).parents[3] / "shared" / "references" / "configs" / "roll" / "distill_megatron.yaml"


@needs_megatron
@pytest.mark.processes
@pytest.mark.workers
@pytest.mark.skipif(not SHARED.exists(), reason="needs ROLL's distill_megatron.yaml")
@pytest.mark.skipif((os.cpu_count() or 1) < 8, reason="needs 8 cores")
def test_the_megatron_example_of_roll_runs_with_other_paths(tmp_path):
    make_model(tmp_path / "student", layers=2, hidden=64, num_attention_heads=8, num_key_value_heads=4)
    make_model(tmp_path / "teacher", layers=2, hidden=64, seed=1, num_attention_heads=8, num_key_value_heads=4)
    for name in ("student", "teacher"):
        config = tmp_path / name / "config.json"
        config.write_text(
            config.read_text().replace('"max_position_embeddings": 256', '"max_position_embeddings": 2048')
        )
    data = make_data(tmp_path / "rows.json", 480)
    data.write_text(data.read_text().replace('"question"', '"question_zh"').replace('"answer"', '"answer_zh"'))
    text = SHARED.read_text()
    for foreign, ours in (
        ("Qwen/Qwen2.5-7B-Instruct", tmp_path / "student"),
        ("Qwen/Qwen2.5-14B-Instruct", tmp_path / "teacher"),
        ("data/GSM8K_zh.json", tmp_path / "rows.json"),
        ("./output", tmp_path / "output"),
        ("/var/tmp/ckpt", tmp_path / "checkpoints"),
    ):
        assert foreign in text
        text = text.replace(foreign, str(ours))
    plugin = Path(__file__).with_name("megatron_on_cpu.py")
    (tmp_path / "distill.yaml").write_text(f"plugins: [{plugin}]\n{text}")
    script = Path(__file__).parents[2] / "examples" / "start_distill_pipeline.py"
    done = subprocess.run(
        [sys.executable, str(script), "--config_path", str(tmp_path), "--config_name", "distill"],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (student,) = tmp_path.glob("checkpoints/**/student")
    AutoModelForCausalLM.from_pretrained(student)


def test_a_sentence_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron", None)
    settings = configuration(folder, tmp_path / "out", "qwen3", **layout({}))
    del settings["plugins"]
    with pytest.raises(LimbeckError, match=r"pip install 'limbeck\[megatron\]'"):
        DistillPipeline(load_mapping(settings).config).run()


@needs_megatron
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "megatron-core runs on GPUs only, and there is none; use fsdp2_train"),
        ({"student.model_args.lora_target": "all-linear"}, "student.model_args.lora_target with"),
        ({"compile_model": True}, "compile_model = true with"),
        (
            {
                "features.pairs": [[f"{LAYER}0", f"{LAYER}0"]],
                **layout({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
            },
            "recompute_modules = ['mlp'] with features.pairs is not built",
        ),
        (layout({"virtual_pipeline_model_parallel_size": 2}), "= 2 needs a pipeline_model_parallel_size above 1"),
    ],
)
def test_what_is_not_built_is_refused_before_anything_is_loaded(folder, tmp_path, changes, sentence):
    settings = configuration(folder, tmp_path / "out", "qwen3", **{**layout({}), **changes})
    del settings["plugins"]
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        DistillPipeline(load_mapping(settings).config).run()


@pytest.mark.parametrize(
    ("kind", "changes", "dims", "sentence"),
    [
        (
            "gpt2",
            {},
            {},
            "has no weight map for tiny (model_type gpt2), only for llama, mistral, qwen2, qwen3, mixtral, qwen3_moe, "
            "nemotron_h; use",
        ),
        (
            "llama",
            {"attention_bias": True},
            {},
            "the parameter model.layers.0.self_attn.k_proj.bias, which differs from",
        ),
        ("llama", {"attention_dropout": 0.1}, {}, "tiny has attention_dropout = 0.1, which is not built for megatron"),
        ("llama", {"hidden_act": "gelu"}, {}, "hidden_act = gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, {}, "RoPE scaling"),
        (
            "mistral",
            {"sliding_window": 8},
            {},
            "set student.model_args.model_config_kwargs: {sliding_window: null}, else",
        ),
        (
            "mistral",
            {"sliding_window": None},
            {"tp": 4},
            "tensor_model_parallel_size = 4 does not divide the 2 key and value heads",
        ),
        (
            "nemotron_h",
            {**HYBRID, "n_groups": 1},
            {"tp": 2},
            "does not divide the 1 groups of Mamba layers of tiny; use a",
        ),
        ("nemotron_h", {**HYBRID, "mlp_hidden_act": "gelu"}, {}, "tiny has mlp_hidden_act = gelu, which is not built"),
        (
            "nemotron_h",
            {**HYBRID, "hybrid_override_pattern": "ME"},
            {},
            "the parameter model.layers.1.mixer.experts.down_proj",
        ),
        (
            "qwen2",
            {"intermediate_size": 63},
            {"tp": 2},
            "= 2 does not divide the 63 feed-forward columns of tiny; use a divisor",
        ),
        (
            "qwen3",
            {},
            {"ep": 2},
            "expert_model_parallel_size = 2 divides experts, and tiny (model_type qwen3) has none",
        ),
        (
            "mixtral",
            {},
            {"ep": 3},
            "expert_model_parallel_size = 3 does not divide the 8 experts of tiny; use a divisor",
        ),
        (
            "mixtral",
            {"intermediate_size": 63},
            {"tp": 2, "etp": 2, "sequence_parallel": True},
            "= 2 does not divide the 63 feed",
        ),
        (
            "mixtral",
            {},
            {"tp": 2},
            "sequence_parallel: tensor parallel ranks would route the same tokens of tiny several",
        ),
        ("mixtral", {"num_experts_per_tok": 1}, {}, "num_experts_per_tok = 1 with normalized weights"),
        ("mixtral", {"router_jitter_noise": 0.1}, {}, "tiny has router_jitter_noise, which is not built"),
    ],
)
def test_models_that_megatron_does_not_compute_alike_are_refused(kind, changes, dims, sentence):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_hidden_layers": 1, "vocab_size": 64}  # fmt: skip
    config = AutoConfig.for_model(kind, **({} if kind == "gpt2" else {**shape, **changes}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        check_family(model, ParallelDims(**dims), "tiny", "student")


@needs_megatron
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "gives each of 2 (virtual) pipeline stages as many layers, and 2 does not divide the 5 of tiny"),
        ({FIRST: 2, LAST: 2}, "gives each of 0 (virtual) pipeline stages other than the first and last as many"),
        ({FIRST: 5}, "gives each of 1 (virtual) pipeline stages other than the first as many"),
        ({FIRST: 3, VPP_KEY: 2}, f"{FIRST} = 3 is no multiple of virtual_pipeline_model_parallel_size = 2"),
        (
            {LAST: 3, "account_for_loss_in_pipeline_split": True},
            f"{LAST} = 3 needs a pipeline_model_parallel_size above 1",
        ),
    ],
)
def test_layers_that_the_stages_cannot_share_are_refused(settings, sentence):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_hidden_layers=5, hidden_size=32))
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        build_gpt_chunks(
            model,
            ParallelDims(pp=2),
            torch.float32,
            MegatronConfig(**settings),
            recompute=False,
            name="tiny",
            role="student",
        )


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.act_fn", "model"])
def test_pairs_of_submodules_that_ranks_hold_slices_of_are_refused(name):
    config = SimpleNamespace(transformer_impl="local")
    trunk = SimpleNamespace(gpt=SimpleNamespace(config=config, decoder=SimpleNamespace(layers=[])))
    with pytest.raises(LimbeckError, match=f"no submodule of megatron-core computes the student's {name} on one rank"):
        capture_in(trunk, "student", [name])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("copy", [(6,)]),
        ("vocabulary", [(13, 6)]),
        ("row", [(6, 24)]),
        ("experts_gate_up", [(3, 16, 6)]),
        ("experts_down", [(3, 6, 24)]),
        ("gate_up", [(16, 6), (16, 6)]),
        ("qkv", [(24, 6), (12, 6), (12, 6)]),
        ("qkv", [(24,), (12,), (12,)]),
        ("column", [(8, 6)]),
        ("mamba_in", [(24 + 24 + 12 + 12 + 8, 6)]),
        ("mamba_conv", [(24 + 12 + 12, 1, 4)]),
    ],
)
def test_slices_of_all_ranks_join_to_what_they_were_made_of(kind, shapes, ranks):
    mamba = MambaSizes(heads=8, dim=3, groups=4, state=3, width=4, chunk=16, smallest_step=0.001, eps=1e-5)
    heads, whole = Heads(8, 4, 3, mamba), [torch.randn(shape) for shape in shapes]
    slices = [slice_of(kind, whole, heads, rank, ranks) for rank in range(ranks)]
    assert len({part.shape for part in slices}) == 1
    for before, after in zip(whole, joined(kind, slices, heads, 13), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    if kind == "vocabulary":
        assert sum(map(len, slices)) == padded_rows(13, ranks)
        assert not torch.cat(slices)[13:].any()  # padded rows are nothing


@needs_megatron
def test_mamba_layers_have_the_parameters_of_megatrons_own(monkeypatch):
    from megatron.core.ssm import mamba_mixer as megatrons
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig

    from limbeck.strategies.megatron.mamba import MambaMixer

    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(megatrons, "HAVE_MAMBA_SSM", True)  # which its computation needs, but not its parameters
    monkeypatch.setattr(megatrons, "ExtendedRMSNorm", lambda size, **unused: torch.nn.RMSNorm(size))
    monkeypatch.setattr(megatrons, "get_cuda_rng_tracker", MagicMock())
    sizes = {"mamba_num_heads": 8, "mamba_head_dim": 4, "mamba_num_groups": 2, "mamba_state_dim": 3}
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=4, use_cpu_initialization=True, **sizes
    )
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    projections = megatrons.MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear)
    theirs = megatrons.MambaMixer(config, projections, 16, pg_collection=SimpleNamespace(tp=alone, cp=alone))
    ours = MambaMixer(config, alone, MambaSizes(8, 4, 2, 3, width=4, chunk=16, smallest_step=0.001, eps=1e-5))
    first, second = (
        {local_name(f"mixer.{name}"): x.shape for name, x in mixer.named_parameters()} for mixer in (theirs, ours)
    )
    assert first == second
