"""Renders a configuration with the origin of each value, and the schema as a table of all keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from limbeck.config.load import LoadedConfig
from limbeck.config.schema import DistillConfig, walk_keys
from limbeck.config.validation_errors import describe_type

_PLAIN = re.compile(r"(?:\.{0,2}/)?[A-Za-z][\w./-]*")
_SWITCHES = frozenset({"true", "false", "yes", "no", "on", "off", "y", "n", "null"})


def to_dict(config: DistillConfig) -> dict[str, Any]:
    """The configuration as nested dictionaries, lists and plain values."""
    return config.model_dump()


def render_config(loaded: LoadedConfig) -> str:
    """The whole configuration as YAML with the origin of each value as a comment; `load_config` reads it back unchanged."""
    lines = list(_lines(to_dict(loaded.config), loaded.origins))
    width = min(max(len(text) for text, _ in lines), 60)
    return "".join(f"{text:<{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines)


def render_schema() -> str:
    """Every key as a Markdown table: path, type, default, meaning."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for path, field in walk_keys(DistillConfig):
        default = _flow(field.get_default(call_default_factory=True))
        cells = (f"`{path}`", describe_type(field.annotation), f"`{default}`", field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _lines(values: Mapping[str, Any], origins: Mapping[str, str], path: str = "") -> Iterator[tuple[str, str | None]]:
    indent = "  " * path.count(".")
    for key, value in values.items():
        inner = f"{path}{key}"
        if isinstance(value, Mapping) and value and inner not in origins:
            yield f"{indent}{_text(key)}:", None
            yield from _lines(value, origins, f"{inner}.")
        else:
            yield f"{indent}{_text(key)}: {_flow(value)}", origins[inner]


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, str):
        # A literal ${ would be read as a reference to another key.
        return _text(re.sub(r"(\\*)\$\{", lambda found: found.group(1) * 2 + r"\${", value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(str(key))}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    # For a number, PyYAML ends the document with a line of dots.
    return yaml.safe_dump(value, width=float("inf")).removesuffix("...\n").strip()


def _text(text: str) -> str:
    """Text as YAML, in double quotes unless every YAML parser reads it as text without them."""
    if _PLAIN.fullmatch(text) and text.lower() not in _SWITCHES:
        return text
    return yaml.safe_dump(text, default_style='"', width=float("inf"), allow_unicode=True).strip()
