"""Files and datasets that the configurations of other systems name."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from limbeck.config.locations import SourceLocation, leaves, read_locations
from limbeck.config.translation import Translation
from limbeck.config.yaml_values import load_yaml
from limbeck.errors import LimbeckError

_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".bin", ".idx")


def read_mapping(file: Path, key: str, locations: dict[str, SourceLocation]) -> dict[str, Any]:
    """The content of a JSON or YAML file; ``locations`` gets its keys.

    Args:
        key: the flag or key that names the file, for error messages.

    Raises:
        LimbeckError: if the file cannot be read, or holds no mapping.
    """
    if file.suffix not in (".json", ".yaml", ".yml"):
        raise LimbeckError(f"{key} {file} must end in .json, .yaml or .yml; rename it.")
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else load_yaml(text)
    except OSError as error:
        raise LimbeckError(f"{key} {file} cannot be read ({error.strerror}); check the path.") from error
    except UnicodeDecodeError as error:
        raise LimbeckError(f"{key} {file} is not UTF-8 text; save it as UTF-8.") from error
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        kind = "JSON" if file.suffix == ".json" else "YAML"
        raise LimbeckError(f"{key} {file} is not {kind}: {' '.join(str(error).split())}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise LimbeckError(f"{key} {file} holds no section of keys; write `key: value` lines.")
    if file.suffix == ".json":
        locations.update({path: SourceLocation(str(file)) for path, _ in leaves(content)})
    else:
        locations.update(read_locations(file, str(file)))
    return {str(name): value for name, value in content.items()}


def dataset_source(name: str, split: str | None) -> dict[str, Any]:
    """The entry of ``student.data_args.sources`` for a hub dataset, a local folder or a file.

    A folder that ``datasets`` has not saved has the layout of a hub dataset. A name with the suffix of a data file, or one
    that begins as a path, is local even if it does not exist.
    """
    path = Path(name).expanduser()
    if (path / "state.json").is_file():  # datasets saved one dataset, which has no splits
        return {"path": name}
    if not path.is_dir() and (name.startswith((".", "/", "~")) or path.suffix in _FILES or path.is_file()):
        return {"path": name}
    source = {"path": name} if (path / "dataset_dict.json").is_file() else {"hub": str(path) if path.is_dir() else name}
    return source if split is None else {**source, "split": split}


def use_wandb(translation: Translation, project: tuple[str, str]) -> None:
    """Log to the project (its name, and the key that set it) of Weights & Biases.

    That is the tracker if the configuration selects it, or if the package is installed and the environment configures it.
    """
    name, origin = project
    if find_spec("wandb") is not None and os.environ.keys() & {"WANDB_API_KEY", "WANDB_MODE"}:
        translation.default("track_with", "wandb", origin)
    chosen = translation.get("track_with")
    if chosen == "wandb":
        translation.default("tracker_kwargs.project", name, origin)
    elif isinstance(chosen, list) and "wandb" in chosen:
        translation.default("tracker_kwargs.wandb.project", name, origin)
