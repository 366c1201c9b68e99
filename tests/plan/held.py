"""One rank of a real run, which tells what it held: state in bytes, and the fullest moment of live tensors."""

import json
import sys
from pathlib import Path

from limbeck.config import load_config
from limbeck.pipeline.distill import _Run
from limbeck.plan.tracker import Tracker
from limbeck.strategies.world import start_world


def here(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


with start_world() as world:
    run = _Run(load_config(Path(sys.argv[1])).config, world)
    tracker, gradients = Tracker(), []
    tracker.add([*run.student.parameters(), *run.student.buffers()], "parameters")
    tracker.add([*run.teacher.body.parameters(), *run.teacher.body.buffers(), run.teacher.head.weight], "teacher")
    trained = [p for p in run.student.parameters() if p.requires_grad]
    run.optimizer.register_step_pre_hook(lambda *_: gradients.append(sum(here(p.grad).nbytes for p in trained)))
    with tracker:
        run._train_step()
        tracker.reset_peak()
        run._train_step()
    states = [each for state in run.optimizer.state.values() for each in state.values()]
    held = {
        "parameters": sum(here(p).nbytes for p in (*run.student.parameters(), *run.student.buffers())),
        "gradients": gradients[-1],
        "optimizer": sum(here(each).nbytes for each in states),
        "peak": sum(tracker.peak.values()),
    }
    if world.is_main:
        print("@" + json.dumps(held))
    run.data.stream.close()
    world.wait()
