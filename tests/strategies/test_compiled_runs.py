"""Whole runs with ``compile_model: true`` execute compiled layers of both models and give the uncompiled results."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from ranks import run_on_ranks
from runs import assert_same_weights, comparable, metrics, rows, weights
from tiny import make_data, make_model

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from limbeck.errors import LimbeckError
from limbeck.models import compile as compiling
from limbeck.models import decoder_layers
from limbeck.plan.models import simulated_student, simulated_teacher
from limbeck.strategies.base import strategy_of
from limbeck.strategies.parallel_dims import ParallelDims

KEYS = ("train/loss", "student/grad_norm")
LAYERS, STEPS, PIECES = 2, 2, 4
PACKED = {"student.use_sequence_packing": True, "sequence_length": 96}
RECOMPUTED = {"student.model_args.disable_gradient_checkpointing": False}
LORA = {"student.model_args.lora_target": "all-linear", "student.model_args.lora_rank": 4}
ZERO2 = {
    "student.strategy_args.strategy_name": "deepspeed_train",
    "student.strategy_args.strategy_config": {"zero_optimization": {"stage": 2}},
    "teacher.strategy_args.strategy_name": "hf_infer",
}
TP2 = {
    f"{role}.strategy_args.strategy_config.tensor_model_parallel_size": size
    for role, size in (("student", 2), ("teacher", 2))
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compiled-runs")
    make_model(folder / "teacher", layers=LAYERS, seed=1)
    make_model(folder / "student", layers=LAYERS)
    make_data(folder / "rows.jsonl")
    return folder


def configuration(folder: Path, output: Path, **changes) -> dict:
    of_all = {
        **rows(8),
        "max_steps": STEPS,
        "save_steps": 0,
        "logging_steps": 1,
        "student.model_args.disable_gradient_checkpointing": True,
    }
    return comparable(folder, output, **{**of_all, **changes})


@pytest.fixture
def runs(monkeypatch):
    """The number of executions of compiled graphs, in a list of one."""
    count = [0]

    def backend(graph, example_inputs):
        def run(*args):
            count[0] += 1
            return graph.forward(*args)

        return run

    monkeypatch.setattr(compiling, "BACKEND", backend)
    torch._dynamo.reset()
    yield count
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 2),  # the student's and the teacher's
        pytest.param(
            {"student.model_args.dtype": "bf16", "teacher.model_args.dtype": "bf16"}, 2, marks=pytest.mark.slow
        ),
        # And the student's once more.
        pytest.param({**PACKED, **RECOMPUTED, **LORA}, 3 * PIECES, marks=pytest.mark.slow),
    ],
    ids=["fp32", "autocast", "packed, recomputed, LoRA"],
)
def test_a_compiled_run_gives_the_student_of_an_uncompiled_one(folder, tmp_path, runs, changes, passes):
    for compiled in (False, True):
        settings = configuration(folder, tmp_path / str(compiled), compile_model=compiled, **changes)
        DistillPipeline(load_mapping(settings).config).run()
        assert runs[0] == compiled * STEPS * LAYERS * passes
    for key in KEYS:
        assert metrics(tmp_path / "True", key) == pytest.approx(metrics(tmp_path / "False", key), rel=1e-5)
    assert_same_weights(tmp_path / "False" / "student", tmp_path / "True" / "student", tolerance=1e-6)
    assert not any("_orig_mod" in name for name in weights(tmp_path / "True" / "student"))


@pytest.mark.slow
def test_pairs_of_features_inside_layers_are_captured(folder, tmp_path, runs):
    pairs = [["model.layers.0", "model.layers.0"], ["model.layers.1.mlp", "model.layers.1.mlp"]]
    for compiled in (False, True):
        output = tmp_path / str(compiled)
        settings = configuration(folder, output, compile_model=compiled, **{"features.pairs": pairs})
        DistillPipeline(load_mapping(settings).config).run()
    # The first layer of each model, and the teacher's once more where the widths of its outputs are found.
    assert runs[0] == STEPS * 2 + 1
    assert metrics(tmp_path / "True", "train/loss") == pytest.approx(metrics(tmp_path / "False", "train/loss"))


def test_a_plan_compiles_nothing(folder, tmp_path, monkeypatch):
    def fail(*args):
        raise AssertionError("a plan compiled a model")

    monkeypatch.setattr(compiling._CompiledForward, "__init__", fail)
    config = load_mapping(configuration(folder, tmp_path / "out", compile_model=True)).config
    with simulated_student(config, ranks=2, rank=0) as simulated:
        assert simulated.teacher is not None


@pytest.mark.parametrize(
    ("options", "compiled"),
    [
        ({"tensor_model_parallel_size": 2}, True),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, False),
        ({"offload_policy": True}, False),
    ],
)
def test_teachers_with_sequence_parallelism_or_offloaded_weights_are_not_compiled(folder, tmp_path, options, compiled):
    changes = {f"teacher.strategy_args.strategy_config.{key}": value for key, value in options.items()}
    config = load_mapping(configuration(folder, tmp_path / "out", compile_model=True, **changes)).config
    with simulated_teacher(config, ranks=2, rank=0) as teacher:
        teacher.compile(config, 1.0, "cpu")
        layers = decoder_layers(teacher.model.body)
        assert [isinstance(layer.forward, compiling._CompiledForward) for layer in layers] == [compiled] * LAYERS


def test_a_short_run_compiles_nothing_by_default(folder, tmp_path, runs):
    DistillPipeline(load_mapping(configuration(folder, tmp_path / "out")).config).run()
    assert runs[0] == 0


@pytest.mark.processes
def test_two_ranks_run_compiled_layers_and_give_the_uncompiled_losses(folder, tmp_path):
    cases = {"fsdp2": {}, "fsdp2-recomputed": {**RECOMPUTED, **PACKED}, "tp2": TP2}
    if find_spec("deepspeed") is not None:
        cases["zero2"] = ZERO2
    files = []
    for name, changes in cases.items():
        for compiled in (False, True):
            output = tmp_path / f"{name}-{compiled}"
            settings = configuration(folder, output, compile_model=compiled, **{**rows(4), **changes})
            files.append(tmp_path / f"{output.name}.yaml")
            files[-1].write_text(yaml.safe_dump(settings))
    run_on_ranks(2, str(Path(__file__).with_name("run_compiled.py")), *map(str, files))
    for name in cases:
        one, other = tmp_path / f"{name}-False", tmp_path / f"{name}-True"
        for key in KEYS:
            assert metrics(other, key) == pytest.approx(metrics(one, key), rel=1e-5), f"{name}: {key}"
        student, teacher = (STEPS * LAYERS * (PIECES if "recomputed" in name else 1) for _ in range(2))
        student *= 2 if "recomputed" in name else 1
        for rank in range(2):
            assert json.loads((one / f"graph_runs-{rank}.json").read_text()) == {}
            found = json.loads((other / f"graph_runs-{rank}.json").read_text())
            assert found == {"student": student, "without gradients": teacher}, name


@pytest.mark.parametrize(
    ("strategy", "block", "sentence"),
    [
        (
            "fsdp2_train",
            {"sequence_parallel": True, "tensor_model_parallel_size": 2},
            "sequence_parallel is not built yet; set one of them to false",
        ),
        ("deepspeed_train", {"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3, which gathers"),
    ],
)
def test_compilation_is_refused_where_layers_exchange_data_in_hooks(folder, tmp_path, strategy, block, sentence):
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    changes = {"student.strategy_args.strategy_name": strategy, "student.strategy_args.strategy_config": block}
    for setting, refused in ((True, True), ("auto", False)):
        settings = configuration(folder, tmp_path / "out", compile_model=setting, **changes)
        config = load_mapping(settings).config
        dims = ParallelDims(tp=2, sequence_parallel=True) if strategy == "fsdp2_train" else ParallelDims(dp_shard=2)
        if refused:
            with pytest.raises(LimbeckError, match=re.escape(sentence)):
                strategy_of(config.student, "student").check(config, dims, "student", "cpu")
        else:
            strategy_of(config.student, "student").check(config, dims, "student", "cpu")
