"""Distil a student with the flags of the HyperPod sample's script of the same name.

    python examples/distil_logits_cli.py --teacher_model ./teacher --student_model ./student --dataset_name rows.jsonl
    torchrun --nproc-per-node 8 examples/distil_logits_cli.py --config_file distil.yaml --alpha 0.3

A flag that is given overrides `--config_file`. Any key of Limbeck may follow as `key=value`. `--help` lists the flags.
"""

from __future__ import annotations

import sys

from limbeck.launch.start import train_from_arguments


def main() -> int:
    return train_from_arguments(__file__, sys.argv[1:], "hyperpod")


if __name__ == "__main__":
    sys.exit(main())
