"""Megatron's layouts give what FSDP2 gives with the Hugging Face model, and their checkpoints are everybody's."""

import importlib.util
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
from limbeck.errors import LimbeckError
from limbeck.strategies.megatron.families import Heads, MambaSizes, check_family, joined, padded_rows, slice_of
from limbeck.strategies.parallel_dims import ParallelDims

TP, CP, PP = "tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"
VPP = {PP: 2, "virtual_pipeline_model_parallel_size": 2}
SP, SHARDED = {"sequence_parallel": True}, {"use_distributed_optimizer": True}
RECOMPUTED, SELECTIVE = {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}
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
STUDENTS = {
    "qwen3": ({"kind": "qwen3", "head_dim": 8, "vocab_size": 325}, {"student.sequence_length_round_in_train": 1}),
    "llama": (
        {"kind": "llama", "vocab_size": 333, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
        {"student.use_sequence_packing": True, "sequence_length": 96},
    ),
    "hybrid": (
        {"kind": "nemotron_h", **HYBRID},
        {"student.use_sequence_packing": True, "sequence_length": 95, "student.sequence_length_round_in_train": 1},
    ),
}
TEACHERS = {"hybrid": "teacher of hybrid"}  # other students have the same teacher
CASES = {  # ranks, student, what the student's strategy_config has, and the teacher's; None is fsdp2_infer
    "tp": (2, "qwen3", {TP: 2, **SELECTIVE}, None),
    "tp, sequence": (2, "qwen3", {TP: 2, **SP, **RECOMPUTED}, {TP: 2, **SP}),
    "pp": (2, "qwen3", {PP: 2}, {TP: 2}),
    "pp, interleaved": (2, "llama", VPP, {PP: 2}),
    "dp, sharded": (2, "qwen3", {**SHARDED, **OVERLAPPED}, {PP: 2}),
    "cp": (2, "llama", {CP: 2, **SHARDED}, {CP: 2}),
    "hybrid, tp": (2, "hybrid", {TP: 2, **SP, **RECOMPUTED}, {PP: 2}),
    "hybrid, pp": (2, "hybrid", {**VPP, **SHARDED}, {TP: 2}),
    "tp x pp": (4, "llama", {TP: 2, PP: 2, **SP, **SHARDED}, {TP: 4}),
    "dp x pp, interleaved": (4, "llama", {**VPP, **SHARDED}, {PP: 2, CP: 2}),
    "dp x tp": (4, "qwen3", {TP: 2, **SP, **SHARDED}, {TP: 2, PP: 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models and data."""
    folder = tmp_path_factory.mktemp("megatron")
    make_model(folder / "teacher", hidden=32, layers=4, seed=1, num_key_value_heads=4)
    for path in (folder / "teacher").glob("tokenizer*"):  # Transformers reads one file as another tokenizer for llama
        path.unlink()
    make_data(folder / "rows.jsonl", 96)
    for name, (shape, _) in STUDENTS.items():
        make_model(folder / name, layers=4, **shape)
        if name in TEACHERS:
            make_model(folder / TEACHERS[name], seed=1, **shape)
    weights = load_file(folder / "qwen3" / "model.safetensors")
    for name in weights:  # as in a fresh model; three times that, attention is so sharp that rounding grows
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name] /= 3
    save_file(weights, folder / "qwen3" / "model.safetensors", {"format": "pt"})
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
    if ranks == 2:
        sharded = files[tmp_path / "4.yaml"]
        for output, source in ((begun, runs_of_fsdp2["qwen3"]), (again, tmp_path / "4")):
            resumed = {"output_dir": str(output), "resume_from_checkpoint": str(source / "checkpoint-4")}
            files[tmp_path / f"{output.name}.yaml"] = sharded | resumed
        # Steps that are lost without float32 masters.
        half = {"student.model_args.dtype": "bf16", "student.training_args.learning_rate": 1e-9, "max_steps": 1}
        for name, sizes in {"bf16-dp": {**SHARDED, **RECOMPUTED}, "bf16-pp": {PP: 2}}.items():
            changes = {**half, **rows(2, 2), **layout(sizes), "eval_steps": 0}
            files[tmp_path / f"{name}.yaml"] = configuration(folder, tmp_path / name, "qwen3", **changes)
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
        for key in ("train/loss", "train/train_distill_loss", "student/grad_norm", "val/loss"):
            assert metrics(many, key) == pytest.approx(metrics(one, key), rel=1e-5, abs=1e-5), f"{name}: {key}"
        assert_same_weights(one / "student", many / "student", tolerance=1e-5)
        assert_same_state(one / "checkpoint-8", many / "checkpoint-8")
    if ranks == 2:
        assert_same_weights(runs_of_fsdp2["qwen3"] / "student", begun / "student", tolerance=1e-5)
        assert_same_weights(tmp_path / "4" / "student", again / "student")  # exactly
        started = load_file(folder / "qwen3" / "model.safetensors")
        for name in ("bf16-dp", "bf16-pp"):
            for key, master in training_state(tmp_path / name / "checkpoint-1", "masters").items():
                torch.testing.assert_close(master, started[key], rtol=0, atol=1e-8)
    else:
        assert_same_weights(runs_of_fsdp2["llama"] / "student", again / "student", tolerance=1e-5)
        # And back: what the slices and stages of the first case have saved goes on in one process with FSDP2.
        forget_after(tmp_path / "0", 4)
        settings = configuration(folder, tmp_path / "0", "llama", resume_from_checkpoint=True)
        DistillPipeline(load_mapping(settings).config).run()
        assert_same_weights(runs_of_fsdp2["llama"] / "student", tmp_path / "0" / "student", tolerance=1e-5)


def assert_same_state(one: Path, other: Path) -> None:
    for name in ("masters", "optimizer"):
        first, second = (training_state(path, name) for path in (one, other))
        assert first.keys() == second.keys()
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, rtol=0, atol=1e-5, msg=key)


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
        (
            {"student.model_args.dtype": "fp16"},
            "student.model_args.dtype = fp16 with student.strategy_args.strategy_name",
        ),
        ({"student.model_args.lora_target": "all-linear"}, "student.model_args.lora_target with"),
        ({"compile_model": True}, "compile_model = true with"),
        ({"features.pairs": [["model.layers.0", "model.layers.0"]]}, "features.pairs with"),
        (layout({"virtual_pipeline_model_parallel_size": 2}), "= 2 needs a pipeline_model_parallel_size above 1"),
    ],
)
def test_what_is_not_built_is_refused_before_anything_is_loaded(folder, tmp_path, changes, sentence):
    settings = configuration(folder, tmp_path / "out", "qwen3", **{**layout({}), **changes})
    del settings["plugins"]
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        DistillPipeline(load_mapping(settings).config).run()


@pytest.mark.parametrize(
    ("kind", "changes", "tp", "sentence"),
    [
        (
            "gpt2",
            {},
            1,
            "has no weight map for tiny (model_type gpt2), only for llama, mistral, qwen2, qwen3, nemotron_h; use fsdp2",
        ),
        (
            "llama",
            {"attention_bias": True},
            1,
            "the parameter model.layers.0.self_attn.k_proj.bias, which differs from",
        ),
        ("llama", {"attention_dropout": 0.1}, 1, "tiny has attention_dropout = 0.1, which is not built for megatron"),
        ("llama", {"hidden_act": "gelu"}, 1, "hidden_act = gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 1, "RoPE scaling"),
        (
            "mistral",
            {"sliding_window": 8},
            1,
            "set student.model_args.model_config_kwargs: {sliding_window: null}, else",
        ),
        (
            "mistral",
            {"sliding_window": None},
            4,
            "tensor_model_parallel_size = 4 does not divide the 2 key and value heads",
        ),
        ("nemotron_h", {**HYBRID, "n_groups": 1}, 2, "does not divide the 1 groups of Mamba layers of tiny; use a"),
        ("nemotron_h", {**HYBRID, "mlp_hidden_act": "gelu"}, 1, "tiny has mlp_hidden_act = gelu, which is not built"),
        (
            "nemotron_h",
            {**HYBRID, "hybrid_override_pattern": "ME"},
            1,
            "the parameter model.layers.1.mixer.experts.down_proj",
        ),
        (
            "qwen2",
            {"intermediate_size": 63},
            2,
            "= 2 does not divide the 63 feed-forward columns of tiny; use a divisor",
        ),
    ],
)
def test_models_that_megatron_does_not_compute_alike_are_refused(kind, changes, tp, sentence):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_hidden_layers": 1, "vocab_size": 64}  # fmt: skip
    config = AutoConfig.for_model(kind, **({} if kind == "gpt2" else {**shape, **changes}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        check_family(model, ParallelDims(tp=tp), "tiny", "student")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("copy", [(6,)]),
        ("vocabulary", [(13, 6)]),
        ("row", [(6, 24)]),
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
    first, second = ({name: x.shape for name, x in mixer.named_parameters()} for mixer in (theirs, ours))
    assert first == second
