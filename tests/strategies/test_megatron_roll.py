"""ROLL's example for Megatron runs with only its paths changed, started by its shell wrapper."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import metrics
from tiny import make_data, make_model
from transformers import AutoModelForCausalLM

from strategies.megatron_runs import needs_megatron

ROOT = Path(__file__).parents[2]
REFERENCES = ROOT.parent / "shared" / "references"
FILE = REFERENCES / "configs" / "roll" / "distill_megatron.yaml"
PAGE = REFERENCES / "roll-distill.md"
NAME = "qwen2.5-7B-distill_megatron"


@needs_megatron
@pytest.mark.processes
@pytest.mark.workers
@pytest.mark.skipif(not FILE.exists(), reason="needs ROLL's distill_megatron.yaml")
def test_the_wrapper_of_rolls_megatron_example_trains_on_its_eight_ranks(tmp_path):
    for seed, name in enumerate(("student", "teacher")):
        sizes = {"hidden": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048}
        make_model(tmp_path / name, layers=2, seed=seed, **sizes)
    data = make_data(tmp_path / "rows.json", 360)  # a little more than the 8 x 4 packs of one step
    data.write_text(data.read_text().replace('"question"', '"question_zh"').replace('"answer"', '"answer_zh"'))
    text = FILE.read_text()
    for foreign, ours in (
        ("Qwen/Qwen2.5-7B-Instruct", tmp_path / "student"),
        ("Qwen/Qwen2.5-14B-Instruct", tmp_path / "teacher"),
        ("data/GSM8K_zh.json", tmp_path / "rows.json"),
        ("./output", tmp_path / "output"),
        ("/var/tmp/ckpt", tmp_path / "checkpoints"),
    ):
        assert foreign in text
        text = text.replace(foreign, str(ours))
    folder = tmp_path / "examples" / NAME
    folder.mkdir(parents=True)
    plugin = Path(__file__).with_name("megatron_on_cpu.py")
    (folder / "distill_megatron.yaml").write_text(f"plugins: [{plugin}]\n{text}")
    shutil.copy(ROOT / "examples" / "start_distill_pipeline.py", tmp_path / "examples")
    (script,) = re.findall(rf"```bash\n(#!/bin/bash\n# Example: examples/{NAME}/.*?)```", PAGE.read_text(), re.DOTALL)
    (folder / "run_distill_pipeline.sh").write_text(script)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where the wrapper finds `python`
    command = ["bash", f"examples/{NAME}/run_distill_pipeline.sh"]
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (student,) = tmp_path.glob("checkpoints/**/student")
    AutoModelForCausalLM.from_pretrained(student)
    (log,) = tmp_path.rglob("metrics.jsonl")
    (loss,) = metrics(log.parent, "train/loss")
    assert math.isfinite(loss)
