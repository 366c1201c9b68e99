"""Fixtures that write and load a YAML file, and the shortest complete configuration."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.config import LoadedConfig, load_config
from limbeck.errors import LimbeckError

MINIMAL = """
student_pretrain: small
teacher_pretrain: large
student:
  data_args:
    file_name: data.json
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
        return path

    return write


@pytest.fixture
def load(write: Callable[..., Path]) -> Callable[..., LoadedConfig]:
    """Load the minimal configuration, or the YAML that is given, with overrides."""

    def load(*overrides: str, yaml: str = MINIMAL, dialect: str | None = None) -> LoadedConfig:
        return load_config(write(yaml), overrides, dialect)

    return load


@pytest.fixture
def mistakes(write: Callable[..., Path]) -> Callable[..., list[str]]:
    """The lines of the error that loading ends in, without the folder of the file."""

    def mistakes(*overrides: str, yaml: str = MINIMAL) -> list[str]:
        path = write(yaml)
        with pytest.raises(LimbeckError) as caught:
            load_config(path, overrides)
        return str(caught.value).replace(f"{path.parent}/", "").splitlines()

    return mistakes
