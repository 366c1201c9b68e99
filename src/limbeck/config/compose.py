"""From a YAML file and overrides to a checked configuration that knows where each of its values came from.

Hydra composes (`defaults`, `${...}`, overrides), the ROLL dialect translates, the schema checks; this file holds them
together and names the file and line of every mistake. What any key means is not known here.
"""

from __future__ import annotations

import glob
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from limbeck.config import mistakes, modelopt, presets, roll
from limbeck.config.places import COMMAND_LINE, Place, leaves, not_yaml, place_of, read_places
from limbeck.config.schema import Contradiction, DistillConfig, unread_keys, walk_keys
from limbeck.errors import LimbeckError

_OVERRIDE = re.compile(r"(?P<mark>\+\+|\+|~)?(?P<key>[^=\s]+?)(?:=(?P<value>.*))?", re.DOTALL)
_REFERENCE = re.compile(r"\$\{\s*(\w+)")


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration.

    origins: for every value, by dotted path: `default`, `distill.yaml:12`, `command line`, `arguments` (from Python) or
        `derived from <key>`.
    notices: sentences about what was written and has no effect, or another one than a reader may expect.
    """

    config: DistillConfig
    origins: dict[str, str]
    notices: list[str]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read the YAML file `path` (its `.yaml` may be left out), apply `key=value` overrides, and check the result.

    `key=value` sets a key whether or not the file has it; `+key=value`, `++key=value` and `~key` mean what they mean to
    Hydra. Raises LimbeckError with one line for each mistake, each with its file and line.
    """
    file = _find(Path(path))
    read_places(file, str(file))  # YAML that cannot be read at all is told here, by line, before Hydra meets it
    composed = _compose(file, overrides)
    return _checked(composed, str(file), file.parent)


def load_mapping(values: Mapping[str, Any], source: str = "arguments") -> LoadedConfig:
    """Check a configuration that is already nested dictionaries, in our words or ROLL's; `source` names it in errors.

    Raises LimbeckError with one line for each mistake.
    """
    content = _text_keys(values)
    places = {path: Place(source, 0) for path, _ in leaves(content)}
    return _checked(_Composed(content, frozenset(), places), source)


def _checked(composed: _Composed, source: str, folder: Path | None = None) -> LoadedConfig:
    translation = roll.translate(composed.values)
    modelopt.translate(translation, composed.places)
    presets.apply(translation)
    if folder is not None:
        _find_data_beside(folder, translation.values)
    found = list(translation.contradictions)
    config: DistillConfig | None = None
    try:
        config = DistillConfig.model_validate(_without_variables(translation.values, composed.referenced))
    except ValidationError as error:
        refused = {one.path for one in found}
        found += [one for one in mistakes.contradictions(error) if one.path not in refused]
    if found or config is None:
        raise LimbeckError("\n".join(_sentence(one, composed.places, source) for one in found))
    origins = dict(_origins(config, translation, composed.places))
    return LoadedConfig(config, origins, list(_notices(config, translation, composed.places, origins)))


@dataclass(frozen=True)
class _Composed:
    """What Hydra made of the files and overrides, what their `${...}` point at, and where each key was written."""

    values: dict[str, Any]
    referenced: frozenset[str]
    places: dict[str, Place]


def _find_data_beside(folder: Path, values: dict[str, Any]) -> None:
    """Files that are named relative to the configuration's folder, and are there, get that folder in front."""

    def beside(name: Any) -> Any:
        if isinstance(name, list):
            return [beside(one) for one in name]
        if not isinstance(name, str) or name.startswith(("hub:", "~")) or Path(name).is_absolute():
            return name
        if "\0" in name:  # no file is called so; who reads it says so
            return name
        path = folder / name
        there = path.exists() or path.with_name(f"{path.name}.bin").exists() or glob.glob(str(path), recursive=True)  # noqa: PTH207
        return str(path) if there else name

    for section, keys in (
        (("student", "data_args"), ("file_name", "eval_file_name", "sources", "template", "prompt_file")),
        (("validation", "data_args"), ("file_name",)),
    ):
        found: Any = values
        for name in section:
            found = found.get(name) if isinstance(found, dict) else None
        for key in keys if isinstance(found, dict) else ():
            entries = found.get(key)
            if entries is None or (key == "template" and not str(entries).endswith(".jinja")):
                continue
            if key != "sources":
                found[key] = beside(entries)
            elif isinstance(entries, list):
                found[key] = [
                    {**one, "path": beside(one["path"])} if isinstance(one, dict) and "path" in one else one
                    for one in entries
                ]


def _find(path: Path) -> Path:
    for candidate in (path, path.with_name(f"{path.name}.yaml")) if path.name else ():
        if candidate.is_file():
            if candidate.suffix != ".yaml":
                raise LimbeckError(f"{candidate} must end in .yaml to be composed with others; rename it.")
            return candidate
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.yaml"))
        raise LimbeckError(f"{path} is a folder; name a file in it{': ' + ', '.join(files) if files else ''}.")
    raise LimbeckError(f"there is no configuration {path}; name a YAML file.")


def _compose(file: Path, overrides: Sequence[str]) -> _Composed:
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = file.resolve().parent
    parsed = [_parse_override(override, folder) for override in overrides]
    arguments = [one.hydra for one in parsed]
    try:
        with _hydra(folder):
            composed = compose(file.stem, overrides=arguments)
            loader = GlobalHydra.instance().config_loader()
            used = loader.compute_defaults_list(file.stem, arguments, RunMode.RUN).defaults
    except (HydraException, OmegaConfBaseException) as error:
        key = next((one.full_key for one in _causes(error) if isinstance(one, OmegaConfBaseException)), None)
        if key:
            wrong = Contradiction(key, f"cannot be composed: {_said(error)}")
            raise LimbeckError(_sentence(wrong, read_places(file, str(file)), str(file))) from error
        raise LimbeckError(f"{file}: {_said(error)}") from error
    except yaml.MarkedYAMLError as error:
        raise not_yaml(error, str(file)) from error
    places: dict[str, Place] = {}
    for one in used:
        source = folder / f"{one.config_path}.yaml"
        if source.is_file() and not (one.package or "").startswith("hydra"):
            shown = str(file if one.primary else os.path.relpath(file.parent / f"{one.config_path}.yaml"))
            places.update(read_places(source, shown, one.package or ""))
    for override in parsed:
        places.update(dict.fromkeys(override.paths, COMMAND_LINE))

    unresolved = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(unresolved, dict)  # the root of a composed configuration always is
    empty = [path for path, value in leaves(_text_keys(unresolved)) if value == "???"]
    if empty:
        wanted = "is ???, a value to be filled in; set it in the file or as an override"
        raise LimbeckError("\n".join(_sentence(Contradiction(path, wanted), places, str(file)) for path in empty))
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        wrong = Contradiction(str(error.full_key), f"cannot be resolved: {_said(error)}")
        raise LimbeckError(_sentence(wrong, places, str(file))) from error
    assert isinstance(values, dict)
    return _Composed(_text_keys(values), frozenset(_references(unresolved)), places)


def _text_keys(values: Mapping[Any, Any]) -> dict[str, Any]:
    """With every key as text: YAML reads a key such as `1` or `on` as a number or a switch."""
    return {str(key): _text_keys(value) if isinstance(value, dict) else value for key, value in values.items()}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _said(error: BaseException) -> str:
    """What Hydra or OmegaConf say, without the file (told in front) and the internals that they add."""
    text = " ".join(str(error).split())
    if not text:
        return _said(error.__cause__) if error.__cause__ else f"{type(error).__name__}."
    text = re.sub(r"^(In '[^']*':\s*)?(\w+ raised while [\w ]+:)?", "", text).partition(" full_key:")[0].strip()
    return text.rstrip(".") + "."


@contextmanager
def _hydra(folder: Path) -> Iterator[None]:
    """Hydra looking into `folder`; an application that is itself run by Hydra finds its own again afterwards."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base=None), warnings.catch_warnings():
            # A file's own keys win over those of its `defaults` whether or not it lists _self_, as anybody expects.
            warnings.filterwarnings("ignore", message=".*Defaults list is missing `_self_`", category=UserWarning)
            yield
    finally:
        GlobalHydra.instance().hydra = outer


@dataclass(frozen=True)
class _Override:
    """One override as Hydra is to read it, and the key paths that it sets."""

    hydra: str
    paths: tuple[str, ...]


def _parse_override(text: str, folder: Path) -> _Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    match = _OVERRIDE.fullmatch(text)
    mark, key, value = match.group("mark", "key", "value") if match else (None, "", None)
    if mark == "~":
        return _Override(text, ())
    if value is None or not re.fullmatch(r"[\w.@/:-]+", key) or key.startswith("-"):
        raise LimbeckError(f"command line: {text} is not an override; write key=value, such as seed=7.")
    if not mark and (folder / key / f"{value}.yaml").is_file():
        return _Override(text, ())  # a choice among the files of a config group
    value = "null" if value.strip() == "~" else value
    mark = mark or "++"
    try:
        parsed = OverridesParser.create().parse_override(f"{mark}{key}={value}")
        plain = not parsed.is_sweep_override()
    except HydraException:
        plain = False
    if not plain:
        # Hydra's grammar is narrower than what people type (list(range(0,8)), 0,1,2, 数据.json); quoted, all is text.
        value = _quoted(value)
        parsed = OverridesParser.create().parse_override(f"{mark}{key}={value}")
    content = parsed.value()
    paths = tuple(path for path, _ in leaves(content, f"{key}.")) if isinstance(content, Mapping) else ()
    return _Override(f"{mark}{key}={value}", (key, *paths))


def _quoted(text: str) -> str:
    escaped = re.sub(r"(\\*)'", lambda found: found.group(1) * 2 + r"\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return "'" + escaped + "\\" * trailing + "'"


def _without_variables(values: Mapping[str, Any], referenced: frozenset[str]) -> dict[str, Any]:
    """Without the top-level keys that are none of ours and exist only so that a `${...}` can point at them."""
    return {key: value for key, value in values.items() if key in DistillConfig.model_fields or key not in referenced}


def _references(value: object) -> Iterator[str]:
    """The first names of all `${name.key}` in the values of an unresolved configuration."""
    if isinstance(value, str):
        yield from _REFERENCE.findall(value)
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _references(inner)


def _sentence(found: Contradiction, places: Mapping[str, Place], source: str) -> str:
    path = found.path.partition("[")[0]
    return f"{place_of(path, places) or source}: {found.path} {found.sentence.rstrip('.?')}{_end(found.sentence)}"


def _end(sentence: str) -> str:
    return "?" if sentence.endswith("?") else "."


def _origins(
    config: DistillConfig, translation: roll.Translation, places: Mapping[str, Place]
) -> Iterator[tuple[str, str]]:
    given = dict(leaves(translation.values))
    for path, _ in leaves(config.model_dump()):
        parts = path.split(".")
        around = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        source = next((translation.derived[p] for p in around if p in translation.derived), None)
        if source is not None:
            place = place_of(source, places)
            yield path, f"derived from {source}" + (f" ({place.short})" if place else "")
        elif path in given:
            place = place_of(path, places)
            yield path, place.short if place else "default"
        elif path.endswith(".model_args.model_name_or_path") and path.split(".")[0] + "_pretrain" in given:
            yield path, f"derived from {path.split('.')[0]}_pretrain"
        else:
            yield path, "default"


def _notices(
    config: DistillConfig, translation: roll.Translation, places: Mapping[str, Place], origins: Mapping[str, str]
) -> Iterator[str]:
    if translation.ignored:
        listed = ", ".join(f"{path} ({place_of(path, places)})" for path in sorted(translation.ignored))
        yield f"These keys have no meaning here and change nothing: {listed}."
        if origins["logits_topk"] == "default" and config.distill_loss_weight > 0:
            yield "logits_topk is not set: the whole vocabulary is compared, where ROLL would take the teacher's top 64."
    yield from translation.notices
    defaults = {path: field.get_default(call_default_factory=True) for path, field in walk_keys(DistillConfig)}
    values = dict(leaves(config.model_dump()))
    for path, reason in unread_keys(config):
        if origins[path] != "default" and values[path] != defaults[path]:
            yield f"{origins[path]}: {path} has no effect: it {reason}."
    if (
        config.teacher_temperature is not None
        and config.kd_temperature != 1
        and origins["temperature_convention"] == "default"
    ):
        yield (
            f"teacher_temperature = {config.teacher_temperature:g} alone divides the teacher's logits; ROLL would "
            "multiply it by kd_temperature, as temperature_convention: roll does."
        )
