"""Files that inherit from paths, relative references, and functions in references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.config.compose import compose_file
from limbeck.errors import LimbeckError

Write = Callable[..., Path]
BASE = """
length: 8
model: &model
  name: small
  batch: {size: 2, tokens: "${mul:${...length}, ${.size}}"}
  list: [1, 2]
other:
  <<: *model
  name: "${..model.name}-er"
"""


def test_a_file_wins_over_what_it_inherits_and_mappings_merge(write: Write) -> None:
    write(BASE, "base.yaml")
    write("defaults: [../base.yaml]\nlength: 16\nmodel: {list: [3]}\n", "recipes/one.yaml")
    file = write("defaults: recipes/one.yaml\nmodel: {batch: {size: 4}}\nextra: 1e-8\n", "run.yaml")
    composed = compose_file(file, ["other.batch.size=3", "++model.new=true", "~extra"])
    assert composed.values == {
        "length": 16,
        "model": {"name": "small", "batch": {"size": 4, "tokens": 64}, "list": [3], "new": True},
        "other": {"name": "small-er", "batch": {"size": 3, "tokens": 48}, "list": [1, 2]},
    }
    places = {path: composed.locations[path].short for path in ("length", "model.batch.size", "other.batch.tokens")}
    assert places == {"length": "one.yaml:2", "model.batch.size": "run.yaml:2", "other.batch.tokens": "base.yaml:4"}
    assert str(composed.locations["other.batch.size"]) == "command line"


def test_later_parents_win_and_a_marked_section_replaces(write: Write) -> None:
    write("a: {x: 1, y: 1}\nb: {x: 1, y: 1}\n", "one.yaml")
    write("a: {x: 2}\n", "two.yaml")
    file = write("defaults: [one.yaml, two.yaml]\nb: {_override_: true, z: 3}\n", "run.yaml")
    assert compose_file(file, []).values == {"a": {"x": 2, "y": 1}, "b": {"z": 3}}


@pytest.mark.parametrize(
    ("parent", "text", "overrides", "sentence"),
    [
        ("", "x: 1\ndefaults: none.yaml\n", [], "run.yaml:2: defaults: none.yaml is not a file; give its path"),
        (
            "defaults: run.yaml\n",
            "defaults: base.yaml\n",
            [],
            "base.yaml:1: defaults: run.yaml inherits from this file",
        ),
        ("defaults: [base]\n", "defaults: base.yaml\n", [], "base.yaml:1: defaults must be the path of a .yaml file"),
        ("a: {\n", "defaults: base.yaml\n", [], "base.yaml:2: this is not YAML"),
        ("a: 1\n", "defaults: base.yaml\nb: ${mul:x,y}\n", [], "run.yaml:2: b cannot be resolved:"),
        ("a: 1\n", "defaults: base.yaml\nb: ???\n", [], "run.yaml:2: b is ???, a missing value"),
        ("a: 1\n", "defaults: base.yaml\n", ["~b"], "command line: ~b removes a key that"),
    ],
)
def test_a_mistake_is_reported_with_file_and_line(
    write: Write, parent: str, text: str, overrides: list[str], sentence: str
) -> None:
    folder = write(parent, "base.yaml").parent
    with pytest.raises(LimbeckError) as caught:
        compose_file(write(text, "run.yaml"), overrides)
    assert str(caught.value).replace(f"{folder}/", "").startswith(sentence)
