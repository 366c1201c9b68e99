"""Loads a configuration: compose, translate from its dialect, check, and record where each value comes from."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from limbeck.config import validation_errors
from limbeck.config.compose import Composed, compose_file, find_file, format_error, text_keys
from limbeck.config.dialects import native
from limbeck.config.dialects.base import Dialect, Source, choose_dialect
from limbeck.config.locations import SourceLocation, find_location, leaves
from limbeck.config.plugins import load_plugin
from limbeck.config.schema import Contradiction, DistillConfig, unread_keys, walk_keys
from limbeck.config.translation import Translation
from limbeck.errors import LimbeckError


@dataclass(frozen=True)
class LauncherSetting:
    """A setting of the program that started the process.

    Attributes:
        key: Limbeck's key.
        value: its value. Another value in the configuration is an error, unless ``is_default``.
        origin: the flag of the launcher, for messages.
        is_default: the launcher was not given the flag, and the configuration takes precedence.
    """

    key: str
    value: Any
    origin: str
    is_default: bool = False


_OF_USER = ("derived from", "--")
"""Beginnings of the origins that are other keys or flags of the user."""


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration.

    Attributes:
        origins: dotted path of every value to its origin: ``default``, ``distill.yaml:12``, ``command line``, ``arguments``
            (from Python), a flag, or ``derived from <key>``.
        notices: sentences about settings that have no effect, or another effect than a reader may expect.
        dialect: name of the dialect that was used.
    """

    config: DistillConfig
    origins: dict[str, str]
    notices: list[str]
    dialect: str = native.NATIVE

    def with_origin(self, sentence: str) -> str:
        """The sentence of an error that was found later, with the user's key behind the first key that is derived from one.

        Where that is a mapping whose keys have several origins, they follow the keys of the mapping that the sentence names.
        In Megatron-LM's command line ``--load`` of the folder ``--save`` is what resumes a run.
        """
        if self.dialect == "megatron":
            folder = self.config.output_dir
            again = (
                f"--load {folder}" if self.origins["output_dir"] != "default" else f"--load {folder} --save {folder}"
            )
            sentence = re.sub(r"resume_from_checkpoint(=|: )(true|latest)", lambda _: again, sentence)
        keys = {path for path, _ in walk_keys(DistillConfig)}
        for found in re.finditer(r"[a-z]\w*(?:\.\w+)+", sentence):
            is_value = found[0] in self.origins or found[0] in keys  # and not a section
            before, after = sentence[: found.end()], sentence[found.end() :]
            inside = {
                path.removeprefix(f"{found[0]}."): origin
                for path, origin in self.origins.items()
                if path.startswith(f"{found[0]}.") and origin.startswith(_OF_USER)
            }
            if is_value and len(set(inside.values())) > 1:  # each key of a mapping may have an origin of its own
                return before + _with_origins(after, inside)
            origin = _origin_of(found[0], self.origins)
            if is_value and origin.startswith(_OF_USER):
                return f"{before} ({origin}){after}"
        return sentence


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    dialect: str | None = None,
    launcher: Sequence[LauncherSetting] = (),
) -> LoadedConfig:
    """Load a YAML file.

    Args:
        path: the file; ``.yaml`` may be left out.
        overrides: ``key=value`` sets a key, whether or not the file has it. ``+key=value``, ``++key=value`` and ``~key``
            have Hydra's meaning.
        dialect: a name in ``limbeck.registry.DIALECTS``; by default the dialect is recognised.
        launcher: settings of the program that started this process.

    Raises:
        LimbeckError: with one line per mistake, each with its file and line.
    """
    file = find_file(Path(path))
    composed = compose_file(file, overrides)
    return _load_values(composed, str(file), dialect, file.parent, launcher)


def load_mapping(values: Mapping[str, Any], source: str = "arguments", dialect: str | None = None) -> LoadedConfig:
    """Load a configuration that is already nested dictionaries.

    Args:
        source: what error messages call it.
        dialect: as in ``load_config``.

    Raises:
        LimbeckError: with one line per mistake.
    """
    content = text_keys(values)
    locations = {path: SourceLocation(source) for path, _ in leaves(content)}
    return _load_values(Composed(content, frozenset(), locations), source, dialect)


def load_arguments(
    argv: Sequence[str],
    dialect: str | None = None,
    plugins: Sequence[str] = (),
    launcher: Sequence[LauncherSetting] = (),
) -> LoadedConfig:
    """Load the command-line arguments of another system.

    Args:
        argv: the arguments, without the name of the program.
        dialect: as in ``load_config``; there is no default dialect for arguments.
        plugins: files that register dialects, as the key ``plugins``.
        launcher: as in ``load_config``.

    Raises:
        LimbeckError: with one line per mistake, each with its flag.
    """
    for plugin in plugins:
        load_plugin(plugin)
    arguments = list(argv)
    # `--flag=value` and `--flag value` are both found under `--flag`.
    flags = [word.partition("=")[0] for word in arguments if word.startswith("-")]
    locations = {flag: SourceLocation(flag) for flag in flags}
    chosen = choose_dialect(arguments, "arguments", dialect)
    translation = _translate(chosen, arguments, locations, list(plugins), launcher)
    return _check(translation, chosen, Composed({}, frozenset(), locations), "arguments")


def _load_values(
    composed: Composed,
    source: str,
    dialect: str | None,
    folder: Path | None = None,
    launcher: Sequence[LauncherSetting] = (),
) -> LoadedConfig:
    plugins = _run_plugins(composed, source)
    chosen = choose_dialect(composed.values, source, dialect)
    translation = _translate(chosen, composed.values, composed.locations, plugins, launcher)
    if folder is not None:
        _find_data_files(folder, translation.values)
    return _check(translation, chosen, composed, source)


def _run_plugins(composed: Composed, source: str) -> list[str]:
    """Run the files under ``plugins``: they may register the dialect. The schema refuses a value of another type."""
    given = composed.values.get("plugins")
    files = [given] if isinstance(given, str) else given
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        return []
    for file in files:
        try:
            load_plugin(file)
        except LimbeckError as error:
            location = find_location("plugins", composed.locations) or source
            raise LimbeckError(f"{location}: plugins: {error}") from error
    return files


def _translate(
    dialect: Dialect,
    source: Source,
    locations: dict[str, SourceLocation],
    plugins: list[str],
    launcher: Sequence[LauncherSetting],
) -> Translation:
    translation = dialect.translate(source, locations)
    if launcher:
        native.normalise(translation)  # so that another spelling of the same value is no contradiction
        for setting in launcher:
            locations[setting.origin] = SourceLocation(setting.origin)
            put = translation.default if setting.is_default else translation.set
            put(setting.key, setting.value, setting.origin)
    if plugins:
        translation.values["plugins"] = plugins
    native.expand(translation, locations)
    return translation


def _check(translation: Translation, dialect: Dialect, composed: Composed, source: str) -> LoadedConfig:
    found = list(dict.fromkeys(translation.contradictions))
    config: DistillConfig | None = None
    try:
        config = DistillConfig.model_validate(_without_variables(translation.values, composed.variables))
    except ValidationError as error:
        refused = {one.path for one in found}
        found += [one for one in validation_errors.explain(error) if one.path not in refused]
    locations = composed.locations
    if found or config is None:
        found = _in_order_of_lines(found, translation, locations)
        raise LimbeckError("\n".join(_error(one, translation, locations, source) for one in found))
    origins = dict(_origins(config, translation, locations))
    notices = list(_notices(config, translation, dialect, locations, origins))
    return LoadedConfig(config, origins, notices, dialect.name)


def _without_variables(values: Mapping[str, Any], variables: frozenset[str]) -> dict[str, Any]:
    """``values`` without unknown top-level keys that a ``${...}`` refers to."""
    return {key: value for key, value in values.items() if key in DistillConfig.model_fields or key not in variables}


def _in_order_of_lines(
    found: list[Contradiction], translation: Translation, locations: Mapping[str, SourceLocation]
) -> list[Contradiction]:
    """The errors of each file in the order of their lines. Errors without a location come last."""
    places = {one: _written_at(one, translation, locations)[0] for one in found}
    files = [place.file for place in places.values() if place is not None]

    def position(one: Contradiction) -> tuple[int, int]:
        place = places[one]
        return (len(files), 0) if place is None else (files.index(place.file), place.line)

    return sorted(found, key=position)


def _error(found: Contradiction, translation: Translation, locations: Mapping[str, SourceLocation], source: str) -> str:
    """An error message; for a derived key, the location includes the key or flag that it was derived from.

    A key that was only moved to a section below, such as ``strategy_config.megatron``, has the name that the file gives it.
    """
    place, origin = _written_at(found, translation, locations)
    location = str(place or source)
    path, bracket, index = found.path.partition("[")
    section, _, key = (origin or "").rpartition(".")
    if section and path.startswith(f"{section}.") and path.endswith(f".{key}"):
        return format_error(replace(found, path=f"{origin}{bracket}{index}"), location)
    return format_error(found, location if origin in (None, location) else f"{location}: {origin}")


def _written_at(
    found: Contradiction, translation: Translation, locations: Mapping[str, SourceLocation]
) -> tuple[SourceLocation | None, str | None]:
    """Where the key of an error is written, and the key or flag that it was derived from, if it was."""
    path = found.path.partition("[")[0]
    origin = None if path in locations else _derived_from(path, translation)
    return find_location(path if origin is None else origin.partition(" + ")[0], locations), origin


def _derived_from(path: str, translation: Translation) -> str | None:
    """The key or flag from which ``path`` or a section around it was derived."""
    while path:
        if path in translation.derived:
            return translation.derived[path]
        path = path.rpartition(".")[0]
    return None


def _origins(
    config: DistillConfig, translation: Translation, locations: Mapping[str, SourceLocation]
) -> Iterator[tuple[str, str]]:
    given = dict(leaves(translation.values))
    for path, _ in leaves(config.model_dump()):
        source = _derived_from(path, translation)
        if source is not None:
            location = find_location(source, locations)
            if location is not None and str(location) == source:  # a flag
                yield path, source
            else:
                yield path, f"derived from {source}" + (f" ({location.short})" if location else "")
        elif path in given:
            location = find_location(path, locations)
            yield path, location.short if location else "default"
        elif path.endswith(".model_args.model_name_or_path") and path.split(".")[0] + "_pretrain" in given:
            yield path, f"derived from {path.split('.')[0]}_pretrain"
        else:
            yield path, "default"


def _with_origins(text: str, origins: Mapping[str, str]) -> str:
    """``text`` with the origin behind each key of ``origins`` in it."""
    names = "|".join(map(re.escape, origins))
    return re.sub(rf"\b({names})\b", lambda name: f"{name[0]} ({origins[name[0]]})", text)


def _origin_of(path: str, origins: Mapping[str, str]) -> str:
    """The origin of a value, or of the first one in a mapping."""
    inside = (origin for inner, origin in origins.items() if inner.startswith(f"{path}."))
    return origins[path] if path in origins else next(inside, "default")


def _notices(
    config: DistillConfig,
    translation: Translation,
    dialect: Dialect,
    locations: Mapping[str, SourceLocation],
    origins: Mapping[str, str],
) -> Iterator[str]:
    if translation.ignored:
        written = sorted(translation.derived.get(path, path) for path in translation.ignored)
        listed = ", ".join(
            f"{path} ({location.short})"
            if (location := find_location(path, locations)) and str(location) != path
            else path
            for path in written
        )
        yield f"These settings of {dialect.system} have no effect in Limbeck: {listed}."
    yield from translation.notices
    defaults = {path: field.get_default(call_default_factory=True) for path, field in walk_keys(DistillConfig)}
    values = dict(leaves(config.model_dump()))
    for path, reason in unread_keys(config):
        origin = _origin_of(path, origins)
        if origin != "default" and (path not in values or values[path] != defaults[path]):
            yield f"{origin}: {path} has no effect: it {reason}."


def _find_data_files(folder: Path, values: dict[str, Any]) -> None:
    """Prefix relative data files with ``folder``, the folder of the configuration, if they exist there."""

    def resolve(name: Any) -> Any:
        if isinstance(name, list):
            return [resolve(one) for one in name]
        if not isinstance(name, str) or name.startswith(("hub:", "~")) or Path(name).is_absolute():
            return name
        if "\0" in name:  # not a file name; the reader reports it
            return name
        path = folder / name
        try:
            exists = path.exists() or path.with_name(f"{path.name}.bin").exists()
        except OSError:  # the name is too long, or no folder may be read; the reader reports it
            return name
        return str(path) if exists or glob.glob(str(path), recursive=True) else name  # noqa: PTH207

    for section, keys in (
        (("student", "data_args"), ("file_name", "eval_file_name", "sources", "template", "prompt_file")),
        (("validation", "data_args"), ("file_name", "sources")),
    ):
        found: Any = values
        for name in section:
            found = found.get(name) if isinstance(found, dict) else None
        for key in keys if isinstance(found, dict) else ():
            entries = found.get(key)
            if entries is None or (key == "template" and not str(entries).endswith(".jinja")):
                continue
            if key != "sources":
                found[key] = resolve(entries)
            elif isinstance(entries, list):
                found[key] = [
                    {**one, "path": resolve(one["path"])} if isinstance(one, dict) and "path" in one else one
                    for one in entries
                ]
