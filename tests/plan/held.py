"""One rank of real runs, which tells what each held in its second step: bytes by name, and the fullest moment's sum."""

import json
import sys
from pathlib import Path

from limbeck.config import load_config
from limbeck.pipeline.distill import _Run
from limbeck.pipeline.parts import arrange
from limbeck.plan.tracker import Tracker
from limbeck.strategies.world import start_world


def measure(file, ranks):
    config = load_config(file).config
    world = arrange(config, ranks)
    run = _Run(config, world, None, None)
    tracker, optimizer = Tracker(), run.engine.optimizer

    def state():
        return [each for entries in optimizer.state.values() for each in entries.values()]

    def count_gradients(*_):
        tracker.add([p.grad for p in run.student.parameters() if p.grad is not None], "gradients")

    optimizer.register_step_pre_hook(count_gradients)
    with tracker:
        tracker.add([*run.student.parameters(), *run.student.buffers()], "parameters")
        tracker.add([*run.teacher.body.parameters(), *run.teacher.body.buffers(), run.teacher.head.weight], "teacher")
        run._train_step()  # makes the optimizer's state, which later steps begin with
        tracker.add(state(), "optimizer")
        tracker.reset()
        run._train_step()
    run.data.stream.close()
    names = ("parameters", "gradients", "optimizer", "teacher")
    return {name: tracker.most[name] for name in names} | {"peak": sum(tracker.peak.values())}


with start_world() as ranks:
    held = [measure(Path(file), ranks) for file in sys.argv[1:]]
    if ranks.is_main:
        print("@" + json.dumps(held))
    ranks.wait()
