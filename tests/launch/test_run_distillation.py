"""The script that takes the arguments of NeMo-RL's ``run_distillation.py``."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "run_distillation.py"


def load_script():
    spec = importlib.util.spec_from_file_location("run_distillation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_accepts_overrides_before_and_after_the_file(monkeypatch):
    script, seen = load_script(), []
    monkeypatch.setattr(script, "train_from_config", lambda file, overrides: seen.append((file, overrides)) or 0)
    for argv in (["a=1", "--config", "f.yaml", "++b=2", "~c"], ["a=1"]):
        monkeypatch.setattr(sys, "argv", ["run_distillation.py", *argv])
        assert script.main() == 0
    assert seen[0] == (Path("f.yaml"), ["a=1", "++b=2", "~c"])
    assert seen[1] == (ROOT / "examples" / "configs" / "distillation_math_cl.yaml", ["a=1"])


@pytest.mark.slow
def test_a_recipe_that_inherits_trains_on_a_cpu(assets, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(
        f"defaults: {os.path.relpath(ROOT / 'examples' / 'configs' / 'distillation_math_cl.yaml', tmp_path)}\n"
        "distillation: {max_num_steps: 2, num_prompts_per_step: 4, topk_logits_k: 16, max_length: 240, val_period: 1}\n"
        "policy:\n"
        f"  model_name: {assets / 'student'}\n"
        "  precision: float32\n"
        "  max_total_sequence_length: 240\n"
        "  train_global_batch_size: 4\n"
        "  generation: {max_new_tokens: 8}\n"
        f"teacher: {{model_name: {assets / 'teacher'}, precision: float32}}\n"
        "data:\n"
        f"  train: {{data_path: {assets / 'rows.jsonl'}, input_key: question, output_key: answer}}\n"
        f"  validation: {{data_path: {assets / 'rows.jsonl'}, input_key: question, output_key: answer}}\n"
        "cluster: {gpus_per_node: 1}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which the launch sets; restored after the test
    monkeypatch.setattr(
        sys, "argv", [str(SCRIPT), "--config", "recipe.yaml", "loss_fn.kl_type=reverse", "distillation.lambda=0.5"]
    )
    assert load_script().main() == 0
    run = json.loads((tmp_path / "logs" / "distillation_math_cl" / "run.json").read_text())
    assert run["config"]["kd_objective"] == "reverse_kl"
    lines = (tmp_path / "logs" / "distillation_math_cl" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["step"] for line in found if "train/loss" in line] == [1, 2]
    assert any("val/loss" in line for line in found)
    assert any(line.get("rollout/mean_length", 0) > 0 for line in found)
    assert (tmp_path / "checkpoints" / "distillation_math_cl" / "checkpoint-2").is_dir()
