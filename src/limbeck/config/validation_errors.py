"""Turns pydantic's validation errors into error messages: which key, which value, which values are allowed."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from limbeck.config.foreign_keys import FOREIGN_KEYS
from limbeck.config.locations import leaves
from limbeck.config.schema import Contradiction, ContradictionError, DistillConfig, walk_keys

_BOUNDS = {
    "greater_than": ("must be greater than", "gt"),
    "greater_than_equal": ("must be at least", "ge"),
    "less_than": ("must be less than", "lt"),
    "less_than_equal": ("must be at most", "le"),
}
_TYPES: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_PLURALS: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts"}


def explain(error: ValidationError) -> list[Contradiction]:
    """All errors that pydantic found, one per key."""
    known = dict(walk_keys(DistillConfig))
    found: dict[str, Contradiction] = {}
    for details in error.errors():
        cause = details.get("ctx", {}).get("error")
        if isinstance(cause, ContradictionError):
            found.update({one.path: one for one in cause.contradictions})
        elif details["type"] == "extra_forbidden":
            found.update({one.path: one for one in _unknown(details, known)})
        else:
            path, field = _locate(details["loc"], known)
            if path not in found:
                found[path] = Contradiction(path, _invalid_value(details, _type_at(path, field, known)))
    return list(found.values())


def _locate(loc: tuple[int | str, ...], known: Mapping[str, FieldInfo]) -> tuple[str, FieldInfo | None]:
    """The key path and the field of an error, without the parts that pydantic adds for the members of a union."""
    path, field = "", None
    for part in loc:
        if field is not None and get_origin(field.annotation) is not dict and not isinstance(part, int):
            break
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
        field = known.get(path, field)
    return path, field


def _type_at(path: str, field: FieldInfo | None, known: Mapping[str, FieldInfo]) -> Any:
    """The type of the value at `path`: the field's, or that of its items if `path` is inside a list or dictionary."""
    annotation = None if field is None else field.annotation
    if path in known:
        return annotation
    for candidate in (annotation, *get_args(annotation)):
        plain = get_args(candidate)[0] if get_origin(candidate) is Annotated else candidate
        if get_origin(plain) in (list, dict):
            return get_args(plain)[-1]
    return annotation


def _unknown(details: ErrorDetails, known: Mapping[str, FieldInfo]) -> list[Contradiction]:
    path, value = ".".join(str(part) for part in details["loc"]), details["input"]
    paths = [inner for inner, _ in leaves(value, f"{path}.")] if isinstance(value, Mapping) and value else [path]
    return [Contradiction(inner, explain_unknown_key(inner, known)) for inner in paths]


def explain_unknown_key(path: str, known: Mapping[str, FieldInfo]) -> str:
    """The end of the error message for a key that is not in `known`: the section it belongs to, or the nearest key."""
    section, _, leaf = path.rpartition(".")
    elsewhere: dict[str, list[str]] = {}
    for candidate in known:
        elsewhere.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    if path in {candidate.rpartition(".")[0] for candidate in known}:
        return "is a section, not a key with a value"
    if section in known:
        return f"is below {section}, which is not a section but holds one value"
    if near_section := _near_section(section, known):
        return f"is below {section}, which is not a section; did you mean {near_section}?"
    if leaf in FOREIGN_KEYS:
        system, instead = FOREIGN_KEYS[leaf]
        return f"is a key of {system}; use {instead}"
    siblings = [name for name, paths in elsewhere.items() if any(p.rpartition(".")[0] == section for p in paths)]
    if leaf in elsewhere:
        similar = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.7) if section else []
        hint = f"; did you mean {similar[0]}?" if similar else ""
        return f"is a key of {_sections(elsewhere[leaf])}, not of {section or 'the top level'}{hint}"
    inner = {
        p[len(section) :].lstrip(".").partition(".")[0] for p in known if p.startswith(f"{section}.") or not section
    }
    for names in (sorted({*siblings, *inner}), list(elsewhere)):
        near = difflib.get_close_matches(leaf, names, n=1, cutoff=0.7)
        if near and near[0] in inner:
            return f"is not a key; did you mean {near[0]}?"
        if near:
            return f"is not a key; did you mean {near[0]}, a key of {_sections(elsewhere[near[0]])}?"
    return "is not a key; `limbeck config --schema` lists them all"


def _near_section(section: str, known: Mapping[str, FieldInfo]) -> str | None:
    """The name of a section beside ``section`` that is like its own; None if ``section`` exists or none is alike."""
    parent, _, name = section.rpartition(".")
    inner = [path.removeprefix(f"{parent}.") for path in known if not parent or path.startswith(f"{parent}.")]
    beside = {path.partition(".")[0] for path in inner if "." in path}
    near = [] if name in beside else difflib.get_close_matches(name, beside, n=1, cutoff=0.7)
    return near[0] if near else None


def _sections(paths: list[str]) -> str:
    names = [path.rpartition(".")[0] or "the top level" for path in paths]
    return " and of ".join(names)


def _invalid_value(details: ErrorDetails, annotation: Any) -> str:
    kind, value = details["type"], format_value(details["input"])
    if kind == "value_error":
        return f"= {value} {details['ctx']['error']}"
    if kind in _BOUNDS:
        phrase, bound = _BOUNDS[kind]
        return f"= {value} {phrase} {details['ctx'][bound]:g}"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "finite_number":
        return f"= {value} must be a finite number"
    if annotation is None:
        return f"= {value} is not a section; write its keys below it as `key: value` lines"
    sentence = f"= {value} is not {describe_type(annotation)}"
    if kind == "literal_error":
        allowed = [choice for choice in _choices(annotation) if isinstance(choice, str)]
        near = difflib.get_close_matches(str(details["input"]), allowed, n=1, cutoff=0.6)
        sentence += f"; did you mean {near[0]}?" if near else ""
    if kind == "string_type" and isinstance(details["input"], bool):
        sentence += "; put it in quotes"
    return sentence


def describe_type(annotation: Any) -> str:
    """The values that a type allows, in words, such as "a whole number"."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        members = [describe_type(member) for member in get_args(annotation) if member is not type(None)]
        return " or ".join(dict.fromkeys(members))
    if origin is Literal:
        choices = [format_value(choice) for choice in get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin is list:
        (item,) = get_args(annotation)
        return f"a list of {_PLURALS[item]}" if item in _PLURALS else f"a list of values, each {describe_type(item)}"
    if origin is dict:
        return "a section of `key: value` lines"
    if get_origin(annotation) is not None and get_args(annotation):
        return describe_type(get_args(annotation)[0])
    return _TYPES[annotation]


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for member in get_args(annotation) for choice in _choices(member)]


def format_value(value: object) -> str:
    """A value as YAML writes it, at most 80 characters long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
