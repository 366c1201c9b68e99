"""Megatron-LM's command line: a value of a wrong kind, or flags that exclude each other, are one sentence each."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from limbeck.config import load_arguments
from limbeck.config.dialects import megatron, megatron_table
from limbeck.errors import LimbeckError

MODEL = """--num-layers 4 --hidden-size 64 --num-attention-heads 4 --tokenizer-type NullTokenizer --vocab-size 1000
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"""
RUN = {"micro-batch-size": "2", "train-iters": "100", "lr": "1e-3", "seq-length": "64", "mock-data": ""}
DATA = {name: value for name, value in RUN.items() if name != "mock-data"}
SAMPLES = {name: value for name, value in RUN.items() if name != "train-iters"}
WRONG = ("abc", "", "0", "-1", "1.5", "nan", "inf", "9" * 5000, "[1]", "é\udcff", "a/" * 200)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(megatron, "has_gpu", lambda: False)
    return tmp_path


def words(text: str, base: dict[str, str]) -> list[str]:
    """The arguments of a run with ``text`` in place of the flags that it names."""
    own = text.split()
    return [*" ".join(f"--{name} {value}" for name, value in base.items() if f"--{name}" not in own).split(), *own]


@pytest.mark.parametrize(
    ("text", "base", "sentence"),
    [
        ("--micro-batch-size 0", RUN, "--micro-batch-size = 0 must be at least 1"),
        ("--tensor-model-parallel-size 0", RUN, "--tensor-model-parallel-size = 0 must be at least 1"),
        ("--global-batch-size 0", RUN, "--global-batch-size = 0 must be at least 1"),
        ("--train-iters 0", RUN, "--train-iters = 0 must be at least 1"),
        ("--train-samples 0", SAMPLES, "--train-samples = 0 must be at least 1"),
        ("--train-samples 2 --global-batch-size 4", SAMPLES, "--train-samples = 2 must be at least 4"),
        ("--exit-interval 0", RUN, "--exit-interval = 0 must be at least 1"),
        ("--eval-iters -1", RUN, "--eval-iters = -1 must be a whole number"),
        ("--lr-warmup-fraction abc", RUN, "--lr-warmup-fraction = abc must be a number from 0 to 1"),
        ("--lr-warmup-fraction 2", RUN, "--lr-warmup-fraction = 2 must be a number from 0 to 1"),
        ("--lr-warmup-fraction .1 --lr-warmup-iters 3", RUN, "--lr-warmup-fraction and --lr-warmup-iters are both given"),
        ("--lr-warmup-fraction .1 --lr-warmup-samples 3", RUN, "-fraction and --lr-warmup-samples are both given"),
        ("--lr-decay-iters 9 --lr-decay-samples 99", RUN, "--lr-decay-samples and --lr-decay-iters are both given"),
        ("--data-path a --split 1", RUN, "--mock-data cannot be combined with --data-path; keep one"),
        ("--train-data-path a --data-path b", DATA, "--train-data-path cannot be combined with --data-path; keep one"),
        ("--data-path 0 wiki --split 90,10,0", DATA, "--data-path = 0 wiki must have weights of 0 or more that are not"),
        ("--per-split-data-args-path list.json", DATA, "--per-split-data-args-path = list.json must have a list of paths"),
        ("--per-split-data-args-path number.json", DATA, "--per-split-data-args-path = number.json must have a list of"),
        ("--per-split-data-args-path nowhere", DATA, "--per-split-data-args-path = nowhere cannot be read"),
        ("--data-args-path nowhere --split 1", DATA, "--data-args-path = nowhere cannot be read"),
        ("--export-kd-teacher-load nemo", RUN, 'activation = ["a"] in nemo/model_config.yaml is not a value'),
    ],
)  # fmt: skip
def test_a_wrong_value_or_a_conflict_is_one_sentence(
    folder: Path, text: str, base: dict[str, str], sentence: str
) -> None:
    (folder / "list.json").write_text("[1]")
    (folder / "number.json").write_text('{"train": 5}')
    (folder / "nemo").mkdir()
    (folder / "nemo" / "model_config.yaml").write_text("activation: [a]")
    (folder / "nemo" / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(LimbeckError) as caught:
        load_arguments([*words(text, base), *MODEL.split()], "megatron")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 and sentence in lines[0] and lines[0].endswith("."), lines


def test_an_empty_tokenizer_type_is_one_sentence() -> None:
    with pytest.raises(LimbeckError, match=r'^--tokenizer-type = "" is not supported; convert it .*FOLDER\.$'):
        load_arguments([*words("", RUN), *MODEL.split(), "--tokenizer-type", ""], "megatron")


def test_a_number_of_processes_that_is_no_number_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in ("", "many", "0", "-1", "1.5"):
        monkeypatch.setenv("WORLD_SIZE", number)
        with pytest.raises(LimbeckError, match=f"^the environment variable WORLD_SIZE = '{number}' is not a number of"):
            load_arguments([*words("", RUN), *MODEL.split()], "megatron")


def test_a_zero_beside_another_warmup_is_no_conflict() -> None:
    loaded = load_arguments([*words("--lr-warmup-fraction .1 --lr-warmup-iters 0", RUN), *MODEL.split()], "megatron")
    assert loaded.config.student.training_args.warmup_steps == 10


def test_any_value_of_any_flag_is_a_configuration_or_an_error_of_the_user() -> None:
    unread = megatron_table.IGNORED.keys() | megatron_table.ONLY.keys()
    kinds = {name: kind for name, kind in megatron_table.kinds().items() if name not in unread}
    flags = [name for name, kind in kinds.items() if kind != megatron_table.SWITCH]
    order = random.Random(0)
    for value in WRONG:
        order.shuffle(flags)
        for chosen in (flags[i::12] for i in range(12)):
            given = [f"--{name}={value}" for name in chosen]
            base = DATA if any("data" in name for name in chosen) else RUN
            try:
                load_arguments([*words("", base), *MODEL.split(), *given], "megatron")
            except LimbeckError as error:
                assert str(error).endswith((".", "?")), (given, error)
            except Exception as error:
                raise AssertionError(given) from error
