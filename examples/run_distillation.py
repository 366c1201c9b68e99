"""Start an on-policy distillation with the arguments of NeMo-RL's script: a configuration and overrides.

    python examples/run_distillation.py --config examples/configs/distillation_math_cl.yaml distillation.lambda=0.5

`limbeck train FILE.yaml [key=value ...]` does the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from limbeck.errors import LimbeckError
from limbeck.launch.start import train_from_config

DEFAULT = Path(__file__).resolve().parent / "configs" / "distillation_math_cl.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description="Distil a student as a YAML file describes.")
    parser.add_argument("--config", type=Path, default=DEFAULT, help=f"YAML file; default: {DEFAULT.name}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")
    arguments = parser.parse_intermixed_args()
    try:
        return train_from_config(arguments.config, arguments.overrides)
    except LimbeckError as error:
        print(f"limbeck: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
