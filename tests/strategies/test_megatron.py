"""Megatron's layouts give what FSDP2 gives with the Hugging Face model, and their checkpoints are everybody's."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from runs import assert_same_weights, forget_after, metric_by_step, metrics, rows, training_state
from tiny import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from limbeck.config.schema import MegatronConfig
from limbeck.errors import LimbeckError
from limbeck.models.megatron_families import Heads, MambaSizes, joined, local_name, padded_rows, slice_of
from limbeck.strategies.megatron.body import build_gpt_chunks
from limbeck.strategies.megatron.capture import capture_in
from limbeck.strategies.megatron.check import check_family, warn_of_unread_keys
from limbeck.strategies.parallel_dims import ParallelDims
from strategies.megatron_runs import (
    ALLGATHER,
    CP,
    EP,
    FIRST,
    GROUPED,
    HYBRID,
    LAST,
    LAYER,
    OVERLAPPED,
    PP,
    RECOMPUTED,
    SELECTIVE,
    SHARDED,
    SP,
    STUDENTS,
    TP,
    VPP,
    VPP_KEY,
    configuration,
    layout,
    needs_megatron,
    run_ranks,
)

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
    "tp, shared keys": (4, "qwen3", {TP: 4, **SELECTIVE}, None),
    "dp x tp": (4, "qwen3", {TP: 2, **SP, **SHARDED}, {TP: 2, PP: 2}),
}


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
    others = {}  # of experts: the same checkpoint with other sizes
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
        # Heads that context parallelism cannot divide, of models that have no weights to load.
        odd = make_model(tmp_path / "odd", kind="llama", hidden=48, num_attention_heads=3, num_key_value_heads=3)
        for file in odd.glob("*.safetensors"):
            file.unlink()
        for role in ("student", "teacher"):
            changes = {**rows(2, 4), **layout({}, {}), "tokenizer": str(folder / "llama")}
            changes |= {f"{role}.strategy_args.strategy_config": {CP: 2}, f"{role}_pretrain": str(odd)}
            files[tmp_path / f"{role}.yaml"] = configuration(folder, tmp_path / role, "llama", **changes)
    else:
        files[tmp_path / "again.yaml"] = configuration(
            folder,
            again,
            "llama",
            **rows(2, 2),
            **layout({CP: 2}),
            resume_from_checkpoint=str(tmp_path / "0" / "checkpoint-4"),
        )
        for name, source, sizes, micro_batches in (
            ("more experts", "ep x pp", {EP: 4}, 1),
            ("fewer experts", "ep x pp", {EP: 2, TP: 2, **SP, "expert_tensor_parallel_size": 1, **SHARDED}, 2),
            ("whole experts", "ep x tp", {**SHARDED, CP: 2}, 2),
        ):
            number, student = list(cases).index(source), cases[source][1]
            resumed = {"resume_from_checkpoint": str(tmp_path / str(number) / "checkpoint-4")}
            others[name] = student, tmp_path / name
            files[tmp_path / f"{name}.yaml"] = configuration(
                folder, tmp_path / name, student, **rows(2, micro_batches), **layout(sizes), **resumed
            )
        # A stage without experts has no part in dividing them.
        begins = make_model(tmp_path / "begins", layers=4, **STUDENTS["qwen3_moe"][0] | {"mlp_only_layers": [2, 3]})
        stages = {"student_pretrain": str(begins), **rows(2, 2), **layout({EP: 2, PP: 2})}
        files[tmp_path / "stage.yaml"] = configuration(folder, tmp_path / "stage", "qwen3_moe", **stages)
    run_ranks(ranks, files)
    errors = {path.stem: path.read_text() for path in tmp_path.glob("*.error")}
    assert errors.keys() == ({"stage"} if ranks == 4 else {"student", "teacher"}), errors
    for i, (name, (_, student, *_)) in enumerate(cases.items()):
        one, many = runs_of_fsdp2[student], tmp_path / str(i)
        features = ["train/features/total"] if "features.pairs" in STUDENTS[student][1] else []
        for key in ("train/loss", "train/train_distill_loss", *features, "student/grad_norm", "val/loss"):
            assert metrics(many, key) == pytest.approx(metrics(one, key), rel=1e-5, abs=1e-5), f"{name}: {key}"
        assert_same_weights(one / "student", many / "student", tolerance=1e-5)
        assert_same_state(one / "checkpoint-8", many / "checkpoint-8")
    if ranks == 2:
        for role in ("student", "teacher"):
            sentence = (
                f"{role}.strategy_args.strategy_config.context_parallel_size = 2 does not divide the 3 attention heads"
            )
            assert sentence in errors[role]
        assert_same_weights(runs_of_fsdp2["qwen3"] / "student", begun / "student", tolerance=1e-5)
        assert_same_weights(tmp_path / "4" / "student", again / "student")  # exactly
        assert_same_weights(runs_of_fsdp2["qwen3_moe"] / "student", moe_begun / "student", tolerance=1e-5)
        assert_same_steps(runs_of_fsdp2["qwen3_moe"], moe_begun, after=4)
        assert_same_weights(tmp_path / str(number) / "student", moe_again / "student")  # exactly
        for name, (student, _) in halves.items():
            started = AutoModelForCausalLM.from_pretrained(folder / student).state_dict()
            masters = training_state(tmp_path / name / "checkpoint-1", "masters")
            for key, master in ((key, master) for key, master in masters.items() if key in started):
                torch.testing.assert_close(master, started[key], rtol=0, atol=1e-8)
    else:
        assert_same_weights(runs_of_fsdp2["llama"] / "student", again / "student", tolerance=1e-5)
        for student, output in others.values():
            assert_same_steps(runs_of_fsdp2[student], output, after=4)
            assert_same_weights(runs_of_fsdp2[student] / "student", output / "student", tolerance=1e-5)
        assert (
            "one of the stages has no experts of" in errors["stage"] and not (tmp_path / "stage" / "student").exists()
        )
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


def assert_same_steps(one: Path, other: Path, after: int) -> None:
    """The steps of a resumed run, those after ``after``, have the losses and gradients of the whole run."""
    for key in ("train/loss", "student/grad_norm"):
        whole = {step: value for step, value in metric_by_step(one, key).items() if step > after}
        assert metric_by_step(other, key) == pytest.approx(whole, rel=1e-5, abs=1e-5), key


def assert_same_state(one: Path, other: Path) -> None:
    for name in ("masters", "optimizer"):
        first, second = (training_state(path, name) for path in (one, other))
        assert first.keys() == second.keys()
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, rtol=0, atol=1e-5, msg=key)


@needs_megatron
@pytest.mark.processes
@pytest.mark.workers
def test_memory_is_flat_without_the_garbage_collector(folder, tmp_path, monkeypatch):
    # With 1, which DeepSpeed sets if it is installed, PyTorch built for CUDA looks for NVML at each step of Adam where there
    # is no GPU, and each look leaves a cycle of seven objects.
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "0")
    changes = {**rows(1, 2), **layout({}, {}), "max_steps": 500, "save_steps": 0, "eval_steps": 0}
    settings = configuration(folder, tmp_path / "out", "qwen3", **changes, logging_steps=50)
    settings["plugins"].append(str(Path(__file__).with_name("count_objects.py")))
    run_ranks(1, {tmp_path / "run.yaml": settings})
    found = [json.loads(line) for line in (tmp_path / "out" / "objects-0.jsonl").read_text().splitlines()]
    before, *_, after = found
    assert (before["step"], after["step"]) == (100, 500)
    assert after["objects"] - before["objects"] < 400 / 10, "less than one object in ten steps"
    assert after["resident_mb"] - before["resident_mb"] < 10


def test_the_extra_has_what_megatron_hangs_without():
    """megatron-core does not declare psutil, without which saving a distributed checkpoint of its own never ends."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    (extra,) = re.findall(r"^megatron = (.*)$", project, re.MULTILINE)
    assert "psutil" in json.loads(extra)


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
        (
            layout({"recompute_granularity": "selective", "recompute_modules": ["mlp", "layernorm"]}),
            "recompute_modules has layernorm, which megatron-core recomputes with Transformer Engine only",
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
            "tiny: no weight map for model_type gpt2, only for llama, mistral, qwen2, qwen3, mixtral, qwen3_moe, nemotron_h, "
            "and Megatron-Bridge",
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
            {"tp": 3},
            "tensor_model_parallel_size = 3 does not divide the 2 key and value heads",
        ),
        (
            "llama",
            {},
            {"cp": 3},
            "context_parallel_size = 3 does not divide the 4 attention heads (2 of keys and values) of",
        ),
        (
            "llama",
            {"num_key_value_heads": 4},
            {"tp": 2, "cp": 4},
            "= 4 does not divide the 2 attention heads (2 of keys and",
        ),
        (
            "llama",
            {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 3},
            {"cp": 2},
            "the 12 attention heads (3 of keys and",
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


def test_keys_of_experts_on_a_dense_model_are_one_warning():
    given = MegatronConfig(moe_router_dtype="fp32", expert_tensor_parallel_size=1)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    with torch.device("meta"):
        dense, sparse = (
            AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, num_key_value_heads=2))
            for kind in ("llama", "mixtral")
        )
    both = "expert_tensor_parallel_size, moe_router_dtype have no effect: tiny has no experts."
    with pytest.warns(UserWarning, match=both) as found:
        warn_of_unread_keys(dense, given, "tiny", "teacher")
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unread_keys(sparse, given, "tiny", "teacher")
        warn_of_unread_keys(dense, MegatronConfig(), "tiny", "teacher")
    given = MegatronConfig(recompute_granularity="selective", recompute_modules=["core_attn", "mlp", "moe"])
    for model, module, reason in ((dense, "moe", "no experts"), (sparse, "mlp", "experts in every layer")):
        with pytest.warns(UserWarning, match=f"recompute_modules: {module} has no effect: tiny has {reason}") as found:
            warn_of_unread_keys(model, given, "tiny", "student")
        assert len(found) == 1


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
    gpt = SimpleNamespace(config=SimpleNamespace(transformer_impl="local"), decoder=SimpleNamespace(layers=[]))
    trunk = SimpleNamespace(hybrid=False, gpt=gpt)
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
