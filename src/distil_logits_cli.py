"""The script of the image, under the name and the flags of the HyperPod sample; the same as examples/distil_logits_cli.py."""

from __future__ import annotations

import sys

from limbeck.launch.start import train_from_arguments


def main() -> int:
    return train_from_arguments(__file__, sys.argv[1:], "hyperpod")


if __name__ == "__main__":
    sys.exit(main())
