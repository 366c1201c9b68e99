"""Where each key of a YAML file is written, so that a mistake can be shown by file and line.

Only positions are read here; values are Hydra's business.
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
class Place:
    """A line (from 1) of a file, named as the user would find it; line 0 is the command line."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    @property
    def short(self) -> str:
        """Without the folders."""
        return f"{Path(self.file).name}:{self.line}" if self.line else self.file


COMMAND_LINE = Place("command line", 0)


def read_places(file: Path, shown: str, package: str = "") -> dict[str, Place]:
    """The place of every key of `file` by dotted path, below `package`. Raises LimbeckError if it is not YAML."""
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise LimbeckError(
            f"{shown} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from error
    except yaml.MarkedYAMLError as error:
        raise not_yaml(error, shown) from error
    except yaml.YAMLError as error:
        raise LimbeckError(f"{shown}: this is not YAML: {' '.join(str(error).split())}.") from error
    places: dict[str, Place] = {}
    if root is None:
        return places
    if not isinstance(root, yaml.MappingNode):
        raise LimbeckError(f"{shown}:{root.start_mark.line + 1}: a configuration is made of `key: value` lines.")
    _walk(root, f"{package}." if package else "", shown, places, depth=0)
    return places


def not_yaml(error: yaml.MarkedYAMLError, shown: str) -> LimbeckError:
    """The sentence for YAML that its reader refused."""
    mark = error.problem_mark or error.context_mark
    line = f":{mark.line + 1}" if mark else ""
    said = " ".join(part for part in (error.context, error.problem) if part)
    return LimbeckError(f"{shown}{line}: this is not YAML: {said}.")


def _walk(node: yaml.MappingNode, prefix: str, shown: str, places: dict[str, Place], depth: int) -> None:
    if depth > MAX_DEPTH:
        line = node.start_mark.line + 1
        raise LimbeckError(f"{shown}:{line}: this is nested more than {MAX_DEPTH} deep; does an alias contain itself?")
    own: dict[str, Place] = {}
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(merged, yaml.MappingNode):
                    _walk(merged, prefix, shown, places, depth + 1)
            continue
        path, place = f"{prefix}{key.value}", Place(shown, key.start_mark.line + 1)
        if path in own:
            raise LimbeckError(f"{place}: {path} is written twice, first in line {own[path].line}; keep one of them.")
        own[path] = place
    places.update(own)
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode) and key.tag != "tag:yaml.org,2002:merge":
            _walk(value, f"{prefix}{key.value}.", shown, places, depth + 1)


def place_of(path: str, places: Mapping[str, Place]) -> Place | None:
    """Where `path` is written, or else something inside it, or else the nearest section around it."""
    if path not in places:
        inside = next((inner for inner in places if inner.startswith(f"{path}.")), None)
        if inside is not None:
            return places[inside]
    while path and path not in places:
        path = path.rpartition(".")[0]
    return places.get(path)


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is not itself a section (or is an empty one), by dotted path."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
