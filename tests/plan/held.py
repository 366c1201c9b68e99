"""One rank of real runs, which tells what each held in its second step: bytes by name, and the fullest moment's sum."""

import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from limbeck.config import load_config
from limbeck.plan.simulate import gradients, held, optimizer_state
from limbeck.plan.tracker import Tracker
from limbeck.strategies.world import start_world
from limbeck.teachers import RemoteTeacher
from limbeck.teachers.remote import Route, TeacherResponse
from limbeck.train.build.models import resolve_parallelism
from limbeck.train.loop import _Run


class Wire:
    """Answers from nowhere, of the sizes that a teacher's have."""

    def ask(self, question):
        count, wanted = len(question.supervised), question.wanted
        if wanted.kind == "logits":
            return lambda: TeacherResponse((torch.zeros(count, wanted.vocab_size),), 0.0)
        k = wanted.topk
        tokens = torch.arange(k, dtype=torch.int32).expand(count, k).clone()
        return lambda: TeacherResponse((torch.full((count, k), -math.log(2 * k)), tokens), 0.0)


def measure(file, ranks):
    config = load_config(file).config
    world = resolve_parallelism(config, ranks, teacher_here=not config.needs_worker_groups)
    apart = RemoteTeacher([Wire()], Route((0,)), 320, 0) if config.needs_worker_groups else None
    run = _Run(config, world, None if apart is None else lambda *_: apart, None)
    tracker, student, engine = Tracker(), run.student, run.engine
    step = engine.step

    def count_gradients():
        tracker.add(gradients(student, engine), "gradients")
        return step()

    engine.step = count_gradients
    with tracker:
        tracker.add(held(student), "parameters")
        if apart is None:
            tracker.add([*held(run.teacher.body), run.teacher.head.weight], "teacher")
        run._train_step()  # makes the optimizer's state, which later steps begin with
        tracker.add(optimizer_state(engine), "optimizer")
        tracker.reset()
        run._train_step()
    run.data.stream.close()
    names = ("parameters", "gradients", "optimizer", "teacher")
    return {name: tracker.most[name] for name in names} | {"peak": sum(tracker.peak.values())}


with start_world() as ranks:
    told = [None] * ranks.size
    dist.all_gather_object(told, [measure(Path(file), ranks) for file in sys.argv[1:]])
    if ranks.rank == 0:  # alone, or lines of several ranks run into each other
        print("@" + json.dumps(told), flush=True)
