"""A plan says what a real run holds, what would be sent, and what would fit where it does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from limbeck.cli import main
from limbeck.config import load_mapping
from limbeck.plan import GPUS, find_gpu, make_plan, refusal, simulate

MODEL = {
    "model_type": "qwen2",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


@pytest.fixture
def from_config(settings, tmp_path):
    """Models that are a config.json alone, and rows that fill the sequence."""

    def build(**changes) -> dict:
        for role, hidden in (("student", 128), ("teacher", 96)):
            folder = tmp_path / role
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps({**MODEL, "hidden_size": hidden}))
        filled = [{"text": "What is 3 plus 4 indeed? " * 200}] * 32
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in filled))
        own = {
            "tokenizer": settings()["student_pretrain"],
            "student_pretrain": str(tmp_path / "student"),
            "teacher_pretrain": str(tmp_path / "teacher"),
            "student.model_args.from_scratch": True,
            "teacher.model_args.from_scratch": True,
            "student.data_args.file_name": str(tmp_path / "rows.jsonl"),
            "distill_on_prompt": True,
            "compile_loss": False,
            "sequence_length": 128,
        }
        return settings(**{**own, **changes})

    return build


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "student.model_args.disable_gradient_checkpointing": False,
            "student.model_args.freeze_module_prefix": "model.embed_tokens",
            "student.training_args.gradient_accumulation_steps": 2,
            "student.training_args.per_device_train_batch_size": 4,
        },
    ],
    ids=["kept", "recomputed-frozen-accumulated"],
)
def test_a_plan_is_what_two_real_ranks_hold(from_config, tmp_path, changes):
    values = from_config(**changes)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(Path(__file__).with_name("held.py")), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    held = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("@"))[1:])
    planned = simulate(load_mapping(values).config, 2, "cpu")
    assert planned.persistent == {name: held[name] for name in planned.persistent}
    assert planned.total == pytest.approx(held["peak"], rel=0.1)


def test_what_is_sent_is_what_fsdp_gathers(from_config):
    plan = make_plan(load_mapping(from_config()).config, 2, 2, find_gpu("h100"))
    whole = 4 * plan.step.student_parameters
    sent = {kind: size for (kind, _), size in plan.step.sent.items()}
    assert sent["reduce_scatter"] == whole  # every gradient once, in float32
    assert sent["all_gather"] > whole  # the layers twice, the root once, and the teacher's layers
    assert {each.wire for each in plan.traffic} == {"between nodes"}
    assert plan.overlapped <= plan.serial
    assert plan.fits


def test_copies_side_by_side_gather_within_a_node(from_config):
    values = from_config(**{"student.strategy_args.strategy_config.fsdp_size": 4})
    plan = make_plan(load_mapping(values).config, 2, 4, GPUS["H100"])
    wires = {(each.collective, each.ranks): each.wire for each in plan.traffic}
    assert wires["reduce_scatter", 4] == "within the node"
    assert wires["all_reduce", 2] == "between nodes"
    eighth = simulate(load_mapping(from_config()).config, 8)
    assert plan.step.persistent["parameters"] == 2 * eighth.persistent["parameters"]


def test_what_does_not_fit_is_told_what_would(from_config):
    from dataclasses import replace

    config = load_mapping(from_config()).config
    plan = make_plan(config, 1, 1, GPUS["H100"])
    two = simulate(config, 2).total
    assert two < plan.step.total
    small = replace(GPUS["H100"], memory=(two + plan.step.total) / 2 / 0.92)
    plan = replace(plan, gpu=small)
    assert not plan.fits
    assert "--nodes 1 --gpus-per-node 2" in str(refusal(config, plan))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "H1000"], "use one of A100"),
        (["--nodes", "0"], "both begin at 1"),
        (["--gpus-per-node", "6", "student.strategy_args.strategy_config.fsdp_size=4"], "does not divide the 6"),
        (["sequence_length=512"], "made for 256"),
        (["student.model_args.dtype=fp16"], "use bf16"),
        (["student.device_mapping=[0]", "teacher.device_mapping=[1]"], "over the same devices"),
    ],
)
def test_an_impossible_layout_is_one_sentence(from_config, tmp_path, capsys, arguments, said):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(from_config()))
    assert main(["plan", str(file), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not dist.is_initialized()


def test_the_command_prints_tables_and_json(from_config, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(from_config()))
    words = ["plan", str(file), "--nodes", "1", "--gpus-per-node", "2", "--gpu", "A100"]
    assert main(words) == 0
    assert "optimizer state" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["memory"]["fits"]
    assert sum(told["memory"]["at_the_peak"].values()) == told["memory"]["peak"]
