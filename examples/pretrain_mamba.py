"""Distil a student with the arguments of Megatron-LM's script of the same name.

    torchrun --nproc-per-node 8 examples/pretrain_mamba.py --tensor-model-parallel-size 2 --load ./student \\
        --export-kd-teacher-load ./teacher --micro-batch-size 1 --global-batch-size 64 --train-iters 1000 --lr 1e-4 \\
        --seq-length 4096 --bf16 --data-path ./corpus --split 99,1,0 --save ./out

Any key of Limbeck may stand among them as `key=value`. `--help` lists the arguments and what becomes of each.
"""

from __future__ import annotations

import sys

from limbeck.launch.start import train_from_arguments


def main() -> int:
    words = sys.argv[1:]
    chosen = any(word.partition("=")[0] == "--export-model-type" for word in words)
    model = [] if chosen else ["--export-model-type", "MambaModel"]
    return train_from_arguments(__file__, [*words, *model], "megatron")


if __name__ == "__main__":
    sys.exit(main())
