"""One rank of real runs; prints what each held in its second step: bytes by name, and the sum at the fullest moment."""

import json
import math
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from limbeck.config import load_config
from limbeck.objectives import OutputHead
from limbeck.plan.tracker import Tracker
from limbeck.registry import TEACHERS
from limbeck.strategies.world import start_world
from limbeck.teachers import TeacherResponse
from limbeck.teachers.remote import TeacherDescription, connect_channels
from limbeck.train.build.run import build_run
from limbeck.train.build.student import resolve_parallelism
from limbeck.train.loop import train_step

WIDTH = 96  # of the teacher that is simulated
NAMES = ("parameters", "gradients", "optimizer", "teacher")


class ConstantChannel:
    """A channel to no process: its responses have the sizes of a teacher's."""

    def describe(self):
        return TeacherDescription(vocab_size=320, num_parameters=0)

    def head(self):
        return OutputHead(torch.zeros(320, WIDTH))

    def check(self, longest_row, largest_token):
        pass

    def send(self, request):
        count, spec = len(request.supervised), request.spec
        if spec.kind == "logits":
            return lambda: TeacherResponse({"logits": torch.zeros(count, spec.vocab_size)}, 0.0)
        if spec.kind == "hidden_states":
            return lambda: TeacherResponse({"hidden_states": torch.zeros(count, WIDTH)}, 0.0)
        k = spec.topk
        indices = torch.arange(k, dtype=torch.int32).expand(count, k).clone()
        log_probs = torch.full((count, k), -math.log(2 * k))
        return lambda: TeacherResponse({"log_probs": log_probs, "indices": indices}, 0.0)


@TEACHERS.register("constant")
def connect_constant(context):
    return connect_channels(context, [ConstantChannel()])


def measure(file, ranks):
    config = load_config(file).config
    remote = config.needs_worker_groups
    if remote:
        teacher = config.teacher.model_copy(update={"source": "constant"})
        config = config.model_copy(update={"teacher": teacher})
    world = resolve_parallelism(config, ranks, teacher_here=not remote)
    run = build_run(config, world, ExitStack())
    tracker, engine = Tracker(), run.engine
    step = engine.step

    def count_gradients():
        tracker.add(engine.held_tensors()["gradients"], "gradients")
        return step()

    engine.step = count_gradients
    with tracker:
        tracker.add(engine.held_tensors()["parameters"], "parameters")
        head = [] if run.teacher.info.head is None else [run.teacher.info.head.weight]
        tracker.add(head if remote else run.teacher.model.held_tensors(), "teacher")
        train_step(run)  # creates the optimizer's state, with which later steps begin
        tracker.add(engine.held_tensors()["optimizer"], "optimizer")
        tracker.reset()
        train_step(run)
    run.source.close()
    return {name: tracker.most[name] for name in NAMES} | {"peak": sum(tracker.peak.values())}


with start_world() as ranks:
    measured = [None] * ranks.size
    dist.all_gather_object(measured, [measure(Path(file), ranks) for file in sys.argv[1:]])
    if ranks.rank == 0:  # alone, or lines of several ranks run into each other
        print("@" + json.dumps(measured), flush=True)
