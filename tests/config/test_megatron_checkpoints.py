"""Megatron-LM's command line finds the checkpoints that it names, and a run goes on with the model that it began with."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from limbeck.config import LoadedConfig, load_arguments
from limbeck.config.dialects import megatron
from limbeck.errors import LimbeckError

RUN = """--micro-batch-size 2 --train-iters 100 --lr 1e-3 --seq-length 64 --mock-data --export-kd-teacher-load hf
    --tokenizer-type NullTokenizer --vocab-size 1000"""
NEW = """--num-layers 4 --hidden-size 64 --num-attention-heads 4 --position-embedding-type rope --normalization RMSNorm
    --swiglu --disable-bias-linear"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two models of Hugging Face and one of Megatron-LM, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(megatron, "has_gpu", lambda: False)
    for name in ("hf", "student"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    rank = tmp_path / "mcore" / "iter_0000004" / "mp_rank_00"
    rank.mkdir(parents=True)
    torch.save({"args": Namespace(num_layers=8, num_experts=8)}, rank / "model_optim_rng.pt")
    (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").write_text("4")
    return tmp_path


def run(text: str) -> LoadedConfig:
    return load_arguments(f"{RUN} {text}".split(), "megatron")


def mistakes(text: str) -> list[str]:
    with pytest.raises(LimbeckError) as caught:
        run(text)
    return str(caught.value).splitlines()


def begin(text: str) -> LoadedConfig:
    """A run in ``out`` with these flags, and its first checkpoint."""
    shutil.rmtree("out", ignore_errors=True)
    begun = run(f"{text} --save out")
    training = Path("out", "checkpoint-9", "training")
    training.mkdir(parents=True, exist_ok=True)
    (training / "state.json").write_text(json.dumps({"config": begun.config.model_dump(mode="json")}))
    (training.parent / "config.json").write_text("{}")
    return begun


@pytest.mark.parametrize("again", ["--load out --save out", "--save new resume_from_checkpoint=out/checkpoint-9"])
@pytest.mark.parametrize(
    "start",
    [
        "--load ./student",
        "--load mcore --use-checkpoint-args",
        "--load mcore --ckpt-step 4 --norm-epsilon 1e-6",
        f"{NEW} --norm-epsilon 1e-6 --rotary-base 500",
        "--pretrained-checkpoint student --load out",
    ],
)
def test_a_run_goes_on_with_the_model_that_it_began_with(start: str, again: str) -> None:
    begun = begin(start).config.student.model_args
    assert run(again).config.student.model_args == begun
    if NEW in start:  # the same command again
        repeated = run(f"{start} {again}")
        assert repeated.config.student.model_args == begun
        assert repeated.notices == run(f"{start} --save other").notices


def test_flags_of_another_model_are_errors_or_named_when_a_run_goes_on() -> None:
    begin(f"{NEW} --norm-epsilon 1e-6")
    (line,) = mistakes("--load out --save out --norm-epsilon 1e-5 --num-layers 4")
    assert line == (
        "--norm-epsilon = 1e-05 contradicts norm_epsilon = 1e-06 of the run that goes on from out/checkpoint-9; remove it, or "
        "give another --save for a new run."
    )
    run("--load out --save out --seq-length 32")
    for start in ("--load student", "--load mcore --use-checkpoint-args"):
        begin(start)
        again = run("--load out --save out --norm-epsilon 1e-5")
        assert again.config.student.model_args.megatron_arguments.keys() <= {"tokenizer_model"}
        assert any("--norm-epsilon" in notice for notice in again.notices if "have no effect" in notice)


def test_a_run_whose_start_is_gone_goes_on_from_its_checkpoint_alone(folder: Path) -> None:
    for start, more in (("student", ""), ("mcore", " --norm-epsilon 1e-6")):
        begin(f"--load ./{start}{more}")
        shutil.rmtree(folder / start)
        found = run("--load out --save out").config.student.model_args
        assert (found.model_name_or_path, found.megatron_arguments) == ("out/checkpoint-9", {})
    (folder / "adapted").mkdir()
    (folder / "adapted" / "config.json").write_text("{}")
    lora = "student.model_args.lora_target=q_proj"
    begin(f"--load ./adapted {lora}")
    shutil.rmtree(folder / "adapted")
    found = run(f"--load out --save out {lora}").config.student.model_args
    assert found.model_name_or_path == "./adapted"  # a checkpoint has the sum of these weights and the adapters


def test_a_flag_about_the_start_without_one_has_no_effect() -> None:
    for flag in ("--use-checkpoint-args", "--ckpt-step 3"):
        (notice,) = [one for one in run(f"{NEW} {flag}").notices if "have no effect" in one]
        assert notice.endswith(f": {flag.split()[0]}.")
    for text in ("--load mcore --use-checkpoint-args", "--load mcore --ckpt-step 4"):
        assert not any("have no effect" in one for one in run(text).notices)


def test_query_groups_count_with_their_switch_only(folder: Path) -> None:
    key = "num_query_groups"
    alone = run(f"{NEW} --num-query-groups 2")
    assert key not in alone.config.student.model_args.megatron_arguments
    assert any("--num-query-groups" in notice for notice in alone.notices if "have no effect" in notice)
    both = run(f"{NEW} --num-query-groups 2 --group-query-attention")
    assert both.config.student.model_args.megatron_arguments[key] == 2
    (folder / "args.yaml").write_text("language_model: {num_query_groups: 2}")
    file = run(f"{NEW} --yaml-cfg args.yaml")  # where Megatron-LM has no switch
    assert file.config.student.model_args.megatron_arguments[key] == 2


def test_the_layers_and_experts_of_a_checkpoint_of_megatron_are_its_own() -> None:
    layout = "--limbeck-strategy megatron --pipeline-model-parallel-size 2"
    experts, first = "--expert-model-parallel-size 2", "--decoder-first-pipeline-num-layers 3"
    loaded = run(f"{NEW} --num-experts 4 {layout} {experts} {first} --export-kd-teacher-load mcore")
    found = loaded.config.teacher.strategy_args.strategy_config.megatron.model_dump(exclude_defaults=True)
    assert found == {"expert_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 3}
    virtual = f"{layout} --num-layers-per-virtual-pipeline-stage 1"
    for start, stages in (("--load mcore --use-checkpoint-args", 4), (f"--load mcore {NEW}", 2)):
        sizes = run(f"{start} {virtual}").config.student.strategy_args.strategy_config.megatron
        assert sizes.virtual_pipeline_model_parallel_size == stages


@pytest.mark.parametrize(
    ("flags", "error", "named"),
    [
        ("--rotary-base abc", "rotary_base = abc must be", "rotary_base (--rotary-base) = abc must be"),
        (
            "--ffn-hidden-size 96",
            "hidden_size = 64 is not a multiple of num_attention_heads = 4",
            "hidden_size (--hidden-size) = 64 is not a multiple of num_attention_heads (--num-attention-heads) = 4",
        ),
        ("", "normalization must be set", "normalization (--normalization) must be set"),
        ("", "moe_router_topk = 2 is not given", "moe_router_topk = 2 is not given"),
    ],
)
def test_an_error_about_an_argument_of_the_model_names_its_flag(flags: str, error: str, named: str) -> None:
    where = "student.model_args.megatron_arguments: "
    assert run(f"{NEW} {flags}").with_origin(where + error) == where + named
