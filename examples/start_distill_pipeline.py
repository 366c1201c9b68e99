"""Start a distillation with the arguments of ROLL's launcher: a folder, a file name, and overrides.

    python examples/start_distill_pipeline.py --config_path examples/tiny --config_name distill max_steps=10

`limbeck train FOLDER/NAME.yaml [key=value ...]` does the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from limbeck.errors import LimbeckError
from limbeck.launch.start import train_from_config


def find_folder(config_path: str) -> Path:
    """`config_path` relative to the working directory or, as in ROLL, to the folder of this script."""
    here = Path(__file__).resolve().parent
    for folder in (Path(config_path), here / config_path, here.parent / config_path):
        if folder.is_dir():
            return folder
    raise LimbeckError(
        f"--config_path {config_path} is not a folder in {Path.cwd()} or {here}; give the folder of the configuration."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Distil a student as a YAML file describes.")
    parser.add_argument("--config_path", required=True, help="folder of the configuration")
    parser.add_argument("--config_name", required=True, help="its file name, with or without .yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")
    arguments = parser.parse_args()
    name = arguments.config_name.removesuffix(".yaml")
    try:
        return train_from_config(find_folder(arguments.config_path) / f"{name}.yaml", arguments.overrides)
    except LimbeckError as error:
        print(f"limbeck: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
