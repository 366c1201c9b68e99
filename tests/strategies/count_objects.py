"""A plug-in for tests: trains without Python's garbage collector, and counts what every hundredth step leaves behind."""

import gc
import json
import os
from pathlib import Path

from limbeck.train import loop

train_step = loop.train_step


def counted(run):
    train_step(run)
    if run.step == 1:
        gc.collect()
        gc.disable()
    if run.step % 100 == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        line = {"step": run.step, "objects": len(gc.get_objects()), "resident_mb": resident}
        with (run.config.checkpoint_dir / f"objects-{run.world.rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


loop.train_step = counted
