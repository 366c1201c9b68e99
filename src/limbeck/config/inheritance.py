"""Files that inherit from other files: ``defaults: ../base.yaml``, a path or a list of paths that end in .yaml.

NeMo-RL composes its recipes this way, Hydra does not: Hydra's ``defaults`` is a list of names without a suffix. A path is
relative to the file that names it. Mappings are merged key by key, everything else is replaced. Later files of a list win over
earlier ones, and the file itself wins over all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.config.locations import SourceLocation, read_locations
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from omegaconf import DictConfig

KEY = "defaults"
REPLACES = "_override_"
"""A top-level mapping with this key set to true replaces the inherited one instead of being merged into it."""

RESOLVERS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": max,
}
"""NeMo-RL's functions in ``${mul:2,${key}}``."""


def register_resolvers() -> None:
    """Make ``RESOLVERS`` known to OmegaConf. Functions that the application has registered are kept."""
    from omegaconf import OmegaConf

    for name, function in RESOLVERS.items():
        if not OmegaConf.has_resolver(name):
            OmegaConf.register_new_resolver(name, function)


def inherits(file: Path) -> bool:
    """Whether ``defaults`` of the file names paths. The file is valid YAML."""
    return bool(_paths(_load(file).get(KEY)))


def load_inherited(file: Path, display_name: str) -> tuple[DictConfig, dict[str, SourceLocation]]:
    """The file merged with those that it inherits from, with unresolved ``${...}``, and the location of each key.

    Raises:
        LimbeckError: if a file does not exist, is not a YAML mapping, or inherits from itself.
    """
    from omegaconf import OmegaConf

    values, locations = _inherit(file, display_name, ())
    return OmegaConf.create(values), locations


def _inherit(
    file: Path, display_name: str, heirs: tuple[Path, ...]
) -> tuple[dict[Any, Any], dict[str, SourceLocation]]:
    own_locations = read_locations(file, display_name)
    own = _load(file)
    where, given = own_locations.get(KEY), own.pop(KEY, None)
    own_locations.pop(KEY, None)
    paths = _paths(given)
    if given and not paths:
        raise LimbeckError(
            f"{where}: {KEY} must be the path of a .yaml file or a list of such paths, as in the file that inherits from "
            "this one."
        )
    values: dict[Any, Any] = {}
    locations: dict[str, SourceLocation] = {}
    for path in paths:
        parent = file.parent / path
        if not parent.is_file():
            raise LimbeckError(f"{where}: {KEY}: {path} is not a file; give its path relative to {file.parent}.")
        if parent.resolve() in (file.resolve(), *heirs):
            raise LimbeckError(f"{where}: {KEY}: {path} inherits from this file again; remove one of the two.")
        shown = os.path.normpath(os.path.join(os.path.dirname(display_name), path))  # noqa: PTH118, PTH120
        inherited, inherited_locations = _inherit(parent, shown, (*heirs, file.resolve()))
        values = _merged(values, inherited, top=True)
        locations |= inherited_locations
    return _merged(values, own, top=True), locations | own_locations


def _merged(base: dict[Any, Any], own: dict[Any, Any], top: bool = False) -> dict[Any, Any]:
    result = dict(base)
    for key, value in own.items():
        inherited = result.get(key)
        if top and isinstance(value, dict) and value.get(REPLACES):
            result[key] = {inner: one for inner, one in value.items() if inner != REPLACES}
        elif isinstance(value, dict) and isinstance(inherited, dict):
            result[key] = _merged(inherited, value)
        else:
            result[key] = value
    return result


def _paths(given: object) -> list[str]:
    """The paths of a value of ``defaults``; empty for Hydra's form."""
    paths = [given] if isinstance(given, str) else given
    if not isinstance(paths, list) or not all(
        isinstance(path, str) and path.endswith((".yaml", ".yml")) for path in paths
    ):
        return []
    return paths


def _load(file: Path) -> dict[Any, Any]:
    """The values of a file without interpolation, as OmegaConf reads YAML (1e-8 is a number)."""
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    return values if isinstance(values, dict) else {}
