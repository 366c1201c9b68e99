"""Composes a YAML file with Hydra (``defaults``, ``${...}``, overrides) and records where each key is written.

A file whose ``defaults`` are paths is composed by ``inheritance.py`` instead.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from limbeck.config.inheritance import inherits, load_inherited, register_resolvers
from limbeck.config.locations import COMMAND_LINE, SourceLocation, find_location, leaves, read_locations, yaml_error
from limbeck.config.schema import Contradiction
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_OVERRIDE = re.compile(r"(?P<mark>\+\+|\+|~)?(?P<key>[^=\s]+?)(?:=(?P<value>.*))?", re.DOTALL)
_REFERENCE = re.compile(r"\$\{\s*(\w+)")


@dataclass(frozen=True)
class Composed:
    """A composed configuration.

    Attributes:
        values: nested dictionaries, with every ``${...}`` resolved.
        variables: the top-level keys that a ``${...}`` refers to.
        locations: dotted path of every key to where it is written.
    """

    values: dict[str, Any]
    variables: frozenset[str]
    locations: dict[str, SourceLocation]


def find_file(path: Path) -> Path:
    """The YAML file that ``path`` names, with or without ``.yaml``. Raises LimbeckError if there is none."""
    for candidate in (path, path.with_name(f"{path.name}.yaml")) if path.name else ():
        if candidate.is_file():
            if candidate.suffix != ".yaml":
                raise LimbeckError(f"{candidate} must end in .yaml; rename it.")
            return candidate
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.yaml"))
        raise LimbeckError(f"{path} is a folder; name a file in it{': ' + ', '.join(files) if files else ''}.")
    raise LimbeckError(f"there is no configuration {path}; name a YAML file.")


def compose_file(file: Path, overrides: Sequence[str]) -> Composed:
    """The file with its ``defaults`` and the overrides. Raises LimbeckError with the file and line of a mistake."""
    own = read_locations(file, str(file))  # reports invalid YAML by line, which Hydra does not
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register_resolvers()
    folder = file.resolve().parent
    parsed = [_parse_override(override, folder) for override in overrides]
    try:
        compose = _compose_inherited if "defaults" in own and inherits(file) else _compose_with_hydra
        composed, locations = compose(file, parsed)
    except yaml.MarkedYAMLError as error:
        raise yaml_error(error, str(file)) from error
    for override in parsed:
        locations.update(dict.fromkeys(override.paths, COMMAND_LINE))

    unresolved = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(unresolved, dict)  # the root of a composed configuration always is
    empty = [path for path, value in leaves(text_keys(unresolved)) if value == "???"]
    if empty:
        missing = "is ???, a missing value; set it in the file or as an override"
        lines = (
            format_error(Contradiction(path, missing), find_location(path, locations) or str(file)) for path in empty
        )
        raise LimbeckError("\n".join(lines))
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        wrong = Contradiction(str(error.full_key), f"cannot be resolved: {_hydra_message(error)}")
        location = find_location(wrong.path, locations) or str(file)
        raise LimbeckError(format_error(wrong, location)) from error
    assert isinstance(values, dict)
    return Composed(text_keys(values), frozenset(_references(unresolved)), locations)


def _compose_inherited(file: Path, overrides: Sequence[_Override]) -> tuple[DictConfig, dict[str, SourceLocation]]:
    """The values, unresolved, of a file that inherits from paths, and their locations."""
    from omegaconf import OmegaConf

    config, locations = load_inherited(file, str(file))
    for override in overrides:
        parent, _, key = override.key.rpartition(".")
        section = OmegaConf.select(config, parent) if parent else config
        if not override.deletes:
            OmegaConf.update(config, override.key, override.value, merge=True, force_add=True)
        elif OmegaConf.is_dict(section) and key in section:
            del section[key]
        else:
            raise LimbeckError(
                f"command line: ~{override.key} removes a key that {file} does not have; remove this override."
            )
    return config, locations


def _compose_with_hydra(file: Path, overrides: Sequence[_Override]) -> tuple[DictConfig, dict[str, SourceLocation]]:
    """The same for a file with Hydra's ``defaults``, or none."""
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    folder = file.resolve().parent
    arguments = [one.hydra for one in overrides]
    try:
        with _hydra(folder):
            composed = compose(file.stem, overrides=arguments)
            loader = GlobalHydra.instance().config_loader()
            used = loader.compute_defaults_list(file.stem, arguments, RunMode.RUN).defaults
    except (HydraException, OmegaConfBaseException) as error:
        key = next((one.full_key for one in _causes(error) if isinstance(one, OmegaConfBaseException)), None)
        if key:
            wrong = Contradiction(key, f"cannot be composed: {_hydra_message(error)}")
            location = find_location(key, read_locations(file, str(file))) or str(file)
            raise LimbeckError(format_error(wrong, location)) from error
        raise LimbeckError(f"{file}: {_hydra_message(error)}") from error
    locations: dict[str, SourceLocation] = {}
    for one in used:
        source = folder / f"{one.config_path}.yaml"
        if source.is_file() and not (one.package or "").startswith("hydra"):
            display_name = str(file if one.primary else os.path.relpath(file.parent / f"{one.config_path}.yaml"))
            locations.update(read_locations(source, display_name, one.package or ""))
    return composed, locations


def text_keys(values: Mapping[Any, Any]) -> dict[str, Any]:
    """``values`` with every key as text: YAML reads a key such as `1` or `on` as a number or a switch."""
    return {str(key): text_keys(value) if isinstance(value, dict) else value for key, value in values.items()}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _hydra_message(error: BaseException) -> str:
    """The message of an error of Hydra or OmegaConf without the file name and the internals that they add."""
    text = " ".join(str(error).split())
    if not text:
        return _hydra_message(error.__cause__) if error.__cause__ else f"{type(error).__name__}."
    text = re.sub(r"^(In '[^']*':\s*)?(\w+ raised while [\w ]+:)?", "", text).partition(" full_key:")[0].strip()
    if found := re.match(r"Error trying to access (\S+): node `([^`]+)` is not a container", text):
        text = f"it refers to {found[1]}, and {found[2]} is missing or not a section of keys; set {found[1]}"
    return text.rstrip(".") + "."


@contextmanager
def _hydra(folder: Path) -> Iterator[None]:
    """Initialise Hydra for ``folder``; restore the state of an application that itself uses Hydra afterwards."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base=None), warnings.catch_warnings():
            # A file's own keys win over those of its `defaults` whether or not it lists _self_.
            warnings.filterwarnings("ignore", message=".*Defaults list is missing `_self_`", category=UserWarning)
            yield
    finally:
        GlobalHydra.instance().hydra = outer


@dataclass(frozen=True)
class _Override:
    """An override in Hydra's grammar: its key and value, whether it removes the key, and the key paths that it sets."""

    hydra: str
    key: str
    value: Any
    deletes: bool
    paths: tuple[str, ...]


def _parse_override(text: str, folder: Path) -> _Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    match = _OVERRIDE.fullmatch(text)
    mark, key, value = match.group("mark", "key", "value") if match else (None, "", None)
    if mark == "~":
        return _Override(text, key, None, True, ())
    if value is None or not re.fullmatch(r"[\w.@/:-]+", key) or key.startswith("-"):
        raise LimbeckError(f"command line: {text} is not an override; write key=value, such as seed=7.")
    if not mark and (folder / key / f"{value}.yaml").is_file():
        return _Override(text, key, value, False, ())  # a choice among the files of a config group
    value = "null" if value.strip() == "~" else value
    mark = mark or "++"
    try:
        parsed = OverridesParser.create().parse_override(f"{mark}{key}={value}")
        plain = not parsed.is_sweep_override()
    except HydraException:
        plain = False
    if not plain:
        # Hydra's grammar does not accept values such as list(range(0,8)), 0,1,2 or 数据.json; quoted, they are text.
        value = _quoted(value)
        parsed = OverridesParser.create().parse_override(f"{mark}{key}={value}")
    content = parsed.value()
    paths = tuple(path for path, _ in leaves(content, f"{key}.")) if isinstance(content, Mapping) else ()
    return _Override(f"{mark}{key}={value}", key, content, False, (key, *paths))


def _quoted(text: str) -> str:
    escaped = re.sub(r"(\\*)'", lambda found: found.group(1) * 2 + r"\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return "'" + escaped + "\\" * trailing + "'"


def _references(value: object) -> Iterator[str]:
    """The top-level keys of all `${key.inner}` in an unresolved configuration."""
    if isinstance(value, str):
        yield from _REFERENCE.findall(value)
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _references(inner)


def format_error(found: Contradiction, location: SourceLocation | str) -> str:
    """One line: location, key, problem. A flag is both its key and its location."""
    end = "?" if found.sentence.endswith("?") else "."
    place = "" if str(location) == found.path else f"{location}: "
    return f"{place}{found.path} {found.sentence.rstrip('.?')}{end}"
