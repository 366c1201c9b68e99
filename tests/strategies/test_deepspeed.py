"""Real DeepSpeed over gloo gives what one process gives, and its checkpoints are everybody's."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from runs import assert_same_weights, forget_after, launch, metrics, rows, train, training_state
from safetensors.torch import load_file
from tiny import make_model
from transformers import AutoModelForCausalLM

from limbeck import DistillPipeline
from limbeck.errors import LimbeckError
from limbeck.objectives import compiler_found

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs limbeck[deepspeed]"),
    pytest.mark.workers,
]


def zero(stage: int, role: str = "student", **block) -> dict:
    kind = "train" if role == "student" else "infer"
    optimization = {"stage": stage, **block.pop("zero_optimization", {})}
    return {
        f"{role}.strategy_args.strategy_name": f"deepspeed_{kind}",
        f"{role}.strategy_args.strategy_config": {"zero_optimization": optimization, **block},
    }


OFFLOADED = {
    "zero_optimization": {name: {"device": "cpu", "pin_memory": False} for name in ("offload_optimizer", "offload_param")},
    "zero_force_ds_cpu_optimizer": False,
}  # fmt: skip
SHORT = {"max_steps": 6, "save_steps": 3}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (1, {**rows(1, 4), **zero(1)}),
        (2, {**rows(4), **zero(2)}),
        (3, {**rows(2, 2), **zero(3, **OFFLOADED), **zero(3, "teacher"),
             "student.model_args.disable_gradient_checkpointing": False}),
    ],
)  # fmt: skip
def test_a_zero_stage_gives_the_run_of_one_process(alone, settings, tmp_path, tied, stage, changes):
    shared = {**SHORT, "student_pretrain": str(tied)} if stage == 3 else SHORT
    one, many = alone(**shared), tmp_path / "out"
    train(settings(**shared, **changes), tmp_path, 2)
    for key in ("train/loss", "train/train_distill_loss", "student/grad_norm", "val/loss", "student/lr"):
        assert metrics(many, key) == pytest.approx(metrics(one, key), rel=1e-5, abs=1e-5), key
    assert_same_weights(one / "student", many / "student", tolerance=1e-5)
    for name in ("masters", "optimizer"):
        expected, found = (training_state(run / "student", name) for run in (one, many))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)
    AutoModelForCausalLM.from_pretrained(many / "student")
    if stage == 2:  # and resumed, it is exact
        shutil.copytree(many / "student", tmp_path / "whole")
        forget_after(many, 3)
        again = train(settings(**shared, **changes), tmp_path, 2, "resume_from_checkpoint=latest")
        assert "at step 3" in again
        assert_same_weights(tmp_path / "whole", many / "student")


@pytest.mark.processes
@pytest.mark.skipif(not compiler_found(), reason="DeepSpeed's CPU Adam is compiled")
@pytest.mark.timeout(600)
def test_an_offloaded_optimizer_steps_as_pytorchs(alone, settings, tmp_path, monkeypatch):
    compiler = tmp_path / "c++"  # which is done in half the time
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0 -g0\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    build = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"
    subprocess.run([sys.executable, "-c", build], check=True, capture_output=True, timeout=500)
    one, many = alone(**SHORT), tmp_path / "out"
    offloaded = zero(2, zero_optimization={"offload_optimizer": {"device": "cpu", "pin_memory": False}})
    train(settings(**SHORT, **rows(4), **offloaded), tmp_path, 2)
    for key in ("train/loss", "student/grad_norm", "val/loss"):
        assert metrics(many, key) == pytest.approx(metrics(one, key), rel=1e-5, abs=1e-5), key
    assert_same_weights(one / "student", many / "student", tolerance=1e-5)


@pytest.mark.processes
def test_a_run_goes_on_with_another_stage_strategy_and_number_of_ranks(configure, settings, tmp_path):
    keys = {"max_steps": 6, "save_steps": 2, "output_dir": str(tmp_path / "out")}
    DistillPipeline(configure(**keys, **rows(24))).run()
    out, whole = tmp_path / "out", tmp_path / "whole"
    shutil.copytree(out / "student", whole)
    forget_after(out, 2)
    # Three ranks: hardly a tensor divides by them, so the last one's pieces are padded.
    launch(settings(**keys, **rows(8), **zero(3)), tmp_path, 3, "resume_from_checkpoint=latest")
    forget_after(out, 4)
    text = train(settings(**keys, **rows(12), **zero(1)), tmp_path, 2, "resume_from_checkpoint=latest")
    assert "at step 4" in text
    assert_same_weights(whole, out / "student", tolerance=1e-5)


@pytest.mark.processes
def test_bf16_keeps_masters_that_bf16_could_not_hold(settings, tmp_path):
    half = {
        "student.model_args.dtype": "bf16",
        "max_steps": 1,
        "eval_steps": 0,
        "student.training_args.learning_rate": 1e-9,
    }
    train(settings(**half, **rows(4), **zero(2)), tmp_path, 2)
    started = load_file(Path(settings()["student_pretrain"]) / "model.safetensors")  # in float32
    for name, master in training_state(tmp_path / "out" / "student", "masters").items():
        torch.testing.assert_close(master, started[name], rtol=0, atol=1e-8)


@pytest.mark.processes
def test_what_is_missing_is_one_sentence(configure, settings, tmp_path, monkeypatch):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(settings(**zero(2, zero_optimization={
        "offload_optimizer": {"device": "cpu"}}))))  # fmt: skip
    nowhere = {"PATH": "/nowhere", "CXX": "/nowhere/c++", "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")}
    command = [sys.executable, "-m", "limbeck", "train", str(tmp_path / "bad.yaml")]
    done = subprocess.run(
        command, env={**os.environ, **nowhere}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "install a C++ compiler, or set strategy_config.zero_force_ds_cpu_optimizer: false" in done.stderr
    assert "Traceback" not in done.stderr
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(LimbeckError, match=r"pip install 'limbeck\[deepspeed\]'"):
        DistillPipeline(configure(**zero(3))).run()
