"""Which data a configuration names, and where it is looked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.config import LoadedConfig

Load = Callable[..., LoadedConfig]
SOURCES = """
student_pretrain: small
teacher_pretrain: large
student:
  data_args:
    sources:
      - {path: a.jsonl, weight: 2, max_samples: 10, format: text, domain: math}
      - {hub: owner/name, config: main, split: test, revision: abc, weight: 1}
"""


def test_names_and_entries_become_sources(load: Load) -> None:
    first, second = load(yaml=SOURCES).config.data_sources
    assert (first.path, first.weight, first.max_samples, first.format, first.domain) == (
        ["a.jsonl"],
        2,
        10,
        "text",
        "math",
    )
    assert (second.hub, second.config, second.split, second.revision) == ("owner/name", "main", "test", "abc")
    by_name = load("student.data_args.file_name=[x.jsonl,'hub:owner/name']").config.data_sources
    assert [(one.path, one.hub) for one in by_name] == [(["x.jsonl"], None), (None, "owner/name")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("weight: 2", "wieght: 2"), "entry 0: wieght is not a key of a source; a source has path, hub"),
        (("hub: owner/name, ", ""), "entry 1"),
        (("path: a.jsonl", "path: a.jsonl, revision: x"), "has config or revision, which only a hub dataset has"),
        (("weight: 2", "weight: -2"), "entry 0: weight"),
        (("sources:", "file_name: b.jsonl\n    sources:"), "both set the training data; keep one"),
        (("sources:", "mixing_temperature: 2\n    sources:"), "and other keys set shares of the data"),
    ],
)
def test_an_invalid_source_is_an_error(mistakes: Callable[..., list[str]], change: tuple[str, str], words: str) -> None:
    (line,) = mistakes(yaml=SOURCES.replace(*change))
    assert words in line
    assert "run.yaml:" in line


def test_data_is_looked_for_beside_the_configuration_first(load: Load, tmp_path: Path) -> None:
    for name in ("data/train.jsonl", "part-1.jsonl", "corpus.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    loaded = load("student.data_args.file_name=[data/train.jsonl,'part-*.jsonl',corpus,elsewhere.jsonl,'hub:a/b',/abs]")
    assert loaded.config.student.data_args.file_name == [
        str(tmp_path / "data/train.jsonl"), str(tmp_path / "part-*.jsonl"), str(tmp_path / "corpus"),
        "elsewhere.jsonl", "hub:a/b", "/abs",
    ]  # fmt: skip
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    (tmp_path / "prompt.txt").write_text("{}")
    args = load(
        "student.data_args.template=mine.jinja", "student.data_args.prompt_file=prompt.txt"
    ).config.student.data_args
    assert (args.template, args.prompt_file) == (str(tmp_path / "mine.jinja"), str(tmp_path / "prompt.txt"))
    assert load("student.data_args.template=chatml").config.student.data_args.template == "chatml"
    (tmp_path / "a.jsonl").write_text("{}")
    assert load(yaml=SOURCES).config.data_sources[0].path == [str(tmp_path / "a.jsonl")]


def test_a_short_name_stands_for_the_parts_of_a_dataset(load: Load) -> None:
    sources = load("student.data_args.file_name=hub:AIME2025", "question_key=frage").config.data_sources
    assert [(one.hub, one.config, one.split, one.question_key) for one in sources] == [
        ("opencompass/AIME2025", "AIME2025-I", "test", "question"),
        ("opencompass/AIME2025", "AIME2025-II", "test", "question"),
    ]
    entry = "{hub: OpenMathInstruct-2, answer_key: generated_solution, max_samples: 5}"
    config = load(f"+validation.data_args.sources=[{entry}]").config
    (valid,) = config.validation_sources
    assert (valid.hub, valid.split, valid.question_key) == ("nvidia/OpenMathInstruct-2", "train_1M", "problem")
    assert (valid.answer_key, valid.max_samples) == ("generated_solution", 5)
