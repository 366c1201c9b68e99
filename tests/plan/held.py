"""One rank of a real run, which tells what it held: state in bytes, and the fullest moment of live tensors by name."""

import json
import sys
from pathlib import Path

from limbeck.config import load_config
from limbeck.pipeline.distill import _Run
from limbeck.pipeline.parts import arrange
from limbeck.plan.tracker import Tracker
from limbeck.strategies.world import start_world

config = load_config(Path(sys.argv[1]), sys.argv[2:]).config
with start_world() as world:
    world = arrange(config, world)
    run = _Run(config, world, None, None)
    tracker, gradients = Tracker(), []
    step = run.engine.optimizer.step

    def trained():
        return [p.grad for p in run.student.parameters() if p.grad is not None]

    def note(*_):
        tracker.add(trained(), "gradients")
        gradients.append(tracker.live["gradients"])

    run.engine.optimizer.register_step_pre_hook(note)
    with tracker:
        tracker.add([*run.student.parameters(), *run.student.buffers()], "parameters")
        tracker.add([*run.teacher.body.parameters(), *run.teacher.body.buffers(), run.teacher.head.weight], "teacher")
        run._train_step()
        states = run.engine.optimizer.state.values()
        tracker.add([each for state in states for each in state.values()], "optimizer")
        tracker.reset()
        run._train_step()
        held = {name: tracker.live[name] for name in ("parameters", "optimizer")}
    if world.is_main:
        told = {**held, "gradients": gradients[-1], "peak": tracker.peak, "sent": sum(tracker.sent.values())}
        print("@" + json.dumps(told))
    run.data.stream.close()
    world.wait()
