"""Start a distillation the way ROLL's launcher is started: a folder, a file name in it, and overrides.

    python examples/start_distill_pipeline.py --config_path examples/tiny --config_name distill max_steps=10

`limbeck train FOLDER/NAME.yaml [key=value ...]` is the same thing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from limbeck.cli import train_from_config
from limbeck.errors import LimbeckError


def find_folder(config_path: str) -> Path:
    """`config_path` as seen from the working directory or, as in ROLL, from the folder of this script."""
    here = Path(__file__).resolve().parent
    for folder in (Path(config_path), here / config_path, here.parent / config_path):
        if folder.is_dir():
            return folder
    raise LimbeckError(f"--config_path {config_path} is no folder, neither from {Path.cwd()} nor from {here}.")


def main() -> int:
    parser = argparse.ArgumentParser(description="Distil a student as a YAML file says.")
    parser.add_argument("--config_path", required=True, help="folder of the configuration")
    parser.add_argument("--config_name", required=True, help="its file name, with or without .yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that overrule the file")
    arguments = parser.parse_args()
    name = arguments.config_name.removesuffix(".yaml")
    try:
        return train_from_config(find_folder(arguments.config_path) / f"{name}.yaml", arguments.overrides)
    except LimbeckError as error:
        print(f"limbeck: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
