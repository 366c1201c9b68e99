"""Run by a launcher: the script with the given arguments, then again from its checkpoint at step 2 in the same processes.

The output folder is the last argument. A copy of the first run's is kept beside it, with the suffix ``-first``.
"""

import runpy
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from runs import forget_after

SCRIPT = str(Path(__file__).parents[2] / "examples" / "distil_logits_cli.py")


def run(*argv: str) -> None:
    sys.argv = [SCRIPT, *argv]
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise


dist.init_process_group("gloo")
arguments, output = sys.argv[1:], Path(sys.argv[-1])
run(*arguments)
dist.barrier()
if dist.get_rank() == 0:
    shutil.copytree(output, f"{output}-first", symlinks=True)
    forget_after(output, 2)
dist.barrier()
run(*arguments, "--resume_from_checkpoint", "latest")
dist.destroy_process_group()
