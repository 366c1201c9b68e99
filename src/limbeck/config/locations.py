"""Where each configuration key is written, so that an error can name its file and line.

This module reads positions only; ``compose.py`` reads the values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from limbeck.errors import LimbeckError

MAX_DEPTH = 50


@dataclass(frozen=True)
class SourceLocation:
    """A line of a file, counted from 1. Line 0 stands for a source without lines, such as the command line or a flag."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    @property
    def short(self) -> str:
        """The location without its folder."""
        return f"{Path(self.file).name}:{self.line}" if self.line else self.file


COMMAND_LINE = SourceLocation("command line")


def read_locations(file: Path, display_name: str, package: str = "") -> dict[str, SourceLocation]:
    """The location of every key of ``file`` by its dotted path, with ``package`` as the prefix.

    Raises:
        LimbeckError: if the file is not a YAML mapping, or writes a key twice.
    """
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise LimbeckError(
            f"{display_name} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from error
    except yaml.MarkedYAMLError as error:
        raise yaml_error(error, display_name) from error
    except yaml.YAMLError as error:
        raise LimbeckError(f"{display_name}: this is not YAML: {' '.join(str(error).split())}.") from error
    locations: dict[str, SourceLocation] = {}
    if root is None:
        return locations
    if not isinstance(root, yaml.MappingNode):
        line = root.start_mark.line + 1
        raise LimbeckError(f"{display_name}:{line}: a configuration is a list of `key: value` lines.")
    _walk(root, f"{package}." if package else "", display_name, locations, depth=0)
    return locations


def yaml_error(error: yaml.MarkedYAMLError, display_name: str) -> LimbeckError:
    """The error message for a file that the YAML parser rejects."""
    mark = error.problem_mark or error.context_mark
    line = f":{mark.line + 1}" if mark else ""
    problem = " ".join(part for part in (error.context, error.problem) if part)
    return LimbeckError(f"{display_name}{line}: this is not YAML: {problem}.")


def _walk(
    node: yaml.MappingNode, prefix: str, display_name: str, locations: dict[str, SourceLocation], depth: int
) -> None:
    if depth > MAX_DEPTH:
        line = node.start_mark.line + 1
        raise LimbeckError(
            f"{display_name}:{line}: this is nested more than {MAX_DEPTH} deep; does an alias contain itself?"
        )
    own: dict[str, SourceLocation] = {}
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(merged, yaml.MappingNode):
                    _walk(merged, prefix, display_name, locations, depth + 1)
            continue
        path, location = f"{prefix}{key.value}", SourceLocation(display_name, key.start_mark.line + 1)
        if path in own:
            raise LimbeckError(
                f"{location}: {path} is written twice, first in line {own[path].line}; keep one of them."
            )
        own[path] = location
    locations.update(own)
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode) and key.tag != "tag:yaml.org,2002:merge":
            _walk(value, f"{prefix}{key.value}.", display_name, locations, depth + 1)


def find_location(path: str, locations: Mapping[str, SourceLocation]) -> SourceLocation | None:
    """The location of ``path``, else of a key inside it, else of the nearest section around it."""
    if path not in locations:
        inside = next((inner for inner in locations if inner.startswith(f"{path}.")), None)
        if inside is not None:
            return locations[inside]
    while path and path not in locations:
        path = path.rpartition(".")[0]
    return locations.get(path)


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is not a section, and every empty section, with its dotted path."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
