"""With ModelOpt's ``distillation_config``, megatron_train has the losses of ModelOpt's own plugin for Megatron."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import metrics, nested, rows
from tiny import make_data, make_model, make_tokenizer

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs limbeck[megatron]"),
    pytest.mark.skipif(importlib.util.find_spec("modelopt") is None, reason="needs nvidia-modelopt and requests"),
    pytest.mark.processes,
    pytest.mark.workers,
]

PAIRS = [["decoder.layers.1", "decoder.layers.2"], ["decoder.final_layernorm", "decoder.final_layernorm", "mse"]]
CASES = {
    "divergence": {},
    "temperature": {"logit_kl_temperature": 2.0},
    "top k": {"logit_kl_topk": 32},
    "with the LM loss": {"skip_lm_loss": False, "kd_loss_scale": 2.0},
    "with pairs": {"intermediate_layer_pairs": PAIRS, "skip_lm_loss": False},
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_gradients_are_those_of_modelopt(tmp_path, ranks):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(-len(tokenizer) % 4)])  # all ranks have as many of the vocabulary
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for seed, name in enumerate(("student", "teacher")):
        make_model(tmp_path / name, kind="llama", layers=2 + 2 * seed, seed=seed, vocab_size=len(tokenizer))
        for path in (tmp_path / name).glob("tokenizer*"):
            path.unlink()
    make_data(tmp_path / "rows.jsonl", 48)
    files, sizes = {}, {"tensor_model_parallel_size": ranks}
    for name, distillation in CASES.items():
        files[name] = tmp_path / f"{name.replace(' ', '-')}.yaml"
        settings = {
            "student_pretrain": str(tmp_path / "student"),
            "teacher_pretrain": str(tmp_path / "teacher"),
            "output_dir": str(tmp_path / name),
            "distillation_config": distillation,
            "sequence_length": 63,
            "max_steps": 4,
            "logging_steps": 1,
            "save_steps": 0,
            "max_grad_norm": 1.0,
            "track_with": "none",
            "tokenizer": str(tmp_path / "tokenizer"),
            "student.strategy_args.strategy_name": "megatron_train",
            "teacher.strategy_args.strategy_name": "megatron_infer",
            **{f"{role}.strategy_args.strategy_config": sizes for role in ("student", "teacher")},
            **{f"{role}.model_args.dtype": "fp32" for role in ("student", "teacher")},
            "student.training_args.learning_rate": 1e-3,
            "student.training_args.weight_decay": 0.1,
            "student.training_args.lr_scheduler_type": "constant",
            "student.training_args.adam_epsilon": 1e-4,  # else the rounding of gradients near 0 becomes whole steps
            "student.data_args.file_name": [str(tmp_path / "rows.jsonl")],
            **rows(2, 4),
        }  # fmt: skip
        files[name].write_text(yaml.safe_dump(nested(settings)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = str(Path(__file__).with_name("run_beside_modelopt.py"))
    done = subprocess.run(
        [*command, script, *map(str, files.values())], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name, file in files.items():
        theirs = json.loads(file.with_suffix(".json").read_text())
        keys = {"train/loss": "total", "train/train_distill_loss": "logits", "student/grad_norm": "norm"}
        for ours, key in keys.items():
            # ModelOpt sums the gradient of its top-k loss over the tensor-parallel ranks. Here clipping hides that.
            times = ranks if (name, key) == ("top k", "norm") else 1
            expected = pytest.approx([step[key] / times for step in theirs], rel=1e-5, abs=1e-5)
            assert metrics(tmp_path / name, ours) == expected, f"{name}: {ours}"
