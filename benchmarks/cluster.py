"""Worker groups compared with their parts alone: steps, bytes, transport, and start.

    python benchmarks/cluster.py                  # all four
    python benchmarks/cluster.py steps wire       # some of them
    python benchmarks/cluster.py steps --core 0.5 # each worker has half a core to itself (Linux, as root)
    python benchmarks/cluster.py wire --quick     # a small form of the same, whose figures mean nothing

steps   step time of real workers in four modes that alternate: requests sent a step ahead, as in a run; requests sent when
        the signal is needed; the student alone, with signals that it has already; the teacher alone. One thread each.
bytes   of each signal per supervised token at Qwen2.5's sizes, of messages made as a teacher's worker makes them.
wire    hidden states of 256 MiB from one process to another, through Ray's object store and over gloo.
start   from the command to the end of the first step with two students and a teacher. Needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a worker's share of the cores

import torch
import yaml
from startup import make_run, seconds_to_first_step
from step import TEACHER, TIME, prepare

from limbeck.cluster.groups import GroupSpec, WorkerGroup
from limbeck.cluster.placement import place
from limbeck.cluster.session import load_ray, ray_session
from limbeck.cluster.tensors import pack
from limbeck.config import DistillConfig
from limbeck.launch.workers import StudentWorker
from limbeck.models.logs import configure_logging
from limbeck.objectives import OutputHead
from limbeck.strategies.host_memory import keep_freed_pages
from limbeck.teachers import Signal, SignalFuture, SignalSpec, Teacher, TeacherRequest
from limbeck.teachers.channels.ray_object_store import RayChannel
from limbeck.teachers.worker import TeacherWorker

PARTS = ("steps", "bytes", "wire", "start")
ROWS = 2  # of TIME tokens, for each student rank
ROUNDS, BLOCK = 3, 3  # rounds over the modes, and steps of a mode in a round after one that is not counted
QWEN25 = {"0.5B": (896, 151_936), "1.5B": (1536, 151_936), "7B": (3584, 152_064),
          "14B": (5120, 152_064), "32B": (5120, 152_064)}  # fmt: skip
TOPK, ROLL_BYTES = 64, 15  # ROLL sends a probability, its logarithm, an index and a flag for each of the k


class SwitchedTeacher:
    """A teacher whose requests are sent as ``mode`` says: ahead (as in a run), serial (when the signal is needed) or alone
    (not at all: every signal is the last one again).
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.info, self.metrics = teacher, teacher.info, teacher.metrics
        self.mode, self.kept = "ahead", None

    def request(self, batch: Any, spec: SignalSpec) -> SignalFuture:
        if self.mode == "alone":
            return lambda micro: self.kept
        sent = self.teacher.request(batch, spec) if self.mode == "ahead" else None

        def future(micro: Any) -> Signal:
            self.kept = (sent or self.teacher.request(batch, spec))(micro)
            return self.kept

        return future


class Student(StudentWorker):
    """A student rank that trains a few steps at a time."""

    def build(self, teachers: list[Any]) -> None:
        from limbeck.train.build import run

        connect = run.connect_teacher
        run.connect_teacher = lambda context: SwitchedTeacher(connect(context))
        configure_logging()
        keep_freed_pages()
        self.training = run.build_run(self.config, self.world, teachers)

    def steps(self, mode: str, count: int) -> float:
        """Seconds per step of ``count``, after one that is not counted, whose request was sent in the previous mode."""
        from limbeck.train.loop import train_step

        self.training.teacher.mode = mode
        train_step(self.training)
        self.world.sum(torch.zeros(()))
        begun = time.perf_counter()
        for _ in range(count):
            train_step(self.training)
        return (time.perf_counter() - begun) / count

    def metrics(self) -> dict[str, float]:
        return self.training.teacher.metrics()


def configure(folder: Path, students: int) -> DistillConfig:
    steps = (ROUNDS + 1) * 3 * (BLOCK + 1)
    return DistillConfig(
        student_pretrain=str(folder / "student"), teacher_pretrain=str(folder / "teacher"),
        output_dir=str(folder / f"run-{students}"), sequence_length=TIME, max_steps=steps + 1, save_steps=0,
        logging_steps=10**6, track_with="none", distill_on_prompt=True,
        student={
            "device_mapping": list(range(students)),
            "model_args": {"dtype": "fp32", "disable_gradient_checkpointing": True},
            "training_args": {"per_device_train_batch_size": ROWS, "learning_rate": 1e-4},
            "data_args": {"file_name": [str(folder / "data.jsonl")], "cache_path": str(folder / "cache")},
        },
        teacher={"device_mapping": [students], "model_args": {"dtype": "fp32"}},
    )  # fmt: skip


@contextmanager
def limited_cores(groups: list[WorkerGroup], share: float | None) -> Iterator[None]:
    """Limit each worker to ``share`` of a core, whatever the others do; so three fit on two cores."""
    root = Path("/sys/fs/cgroup")
    first, folders = (root / "cpu").is_dir(), []
    try:
        for process in () if share is None else [each["pid"] for group in groups for each in group.call("about")]:
            folder = (root / "cpu" if first else root) / f"limbeck-{process}"
            folder.mkdir()
            folders.append(folder)
            period = 5000  # microseconds; a step is hundreds of times longer
            if first:
                (folder / "cpu.cfs_period_us").write_text(str(period))
                (folder / "cpu.cfs_quota_us").write_text(str(int(period * share)))
            else:
                (folder / "cpu.max").write_text(f"{int(period * share)} {period}")
            (folder / "cgroup.procs").write_text(str(process))
        yield
    finally:
        for folder in folders:
            for process in (folder / "cgroup.procs").read_text().split():
                (folder.parent / "cgroup.procs").write_text(process)
            folder.rmdir()


@contextmanager
def workers(folder: Path, students: int, share: float | None) -> Iterator[tuple[WorkerGroup, WorkerGroup]]:
    """``students`` student ranks and one teacher rank, loaded."""
    config = configure(folder, students)
    placement = place([config.student.device_mapping, config.teacher.device_mapping], None)  # type: ignore[list-item]
    groups = []
    try:
        for mapping, (name, worker) in enumerate((("student", Student), ("teacher", TeacherWorker))):
            spec = GroupSpec(
                name, worker, (config.model_dump(mode="json"),), folder / f"logs-{students}", {"OMP_NUM_THREADS": "1"}
            )
            groups.append(spec.start(placement, mapping))
        for group in groups:
            group.connect(5)
        groups[1].call("load")
        groups[0].call("build", list(groups[1].actors))
        with limited_cores(groups, share):
            yield groups[0], groups[1]
    finally:
        for group in groups:
            group.end()
        placement.free()


def measure_steps(folder: Path, students: int, share: float | None, rounds: int) -> float:
    """Print one layout's figures; returns the measured bytes per supervised token."""
    # The request of one student rank in one step.
    ids = torch.randint(3, 32_000, (ROWS, TIME))
    request = TeacherRequest(ids, None, None, torch.arange(ROWS * TIME))
    seconds: dict[str, list[float]] = defaultdict(list)
    with workers(folder, students, share) as (student, teacher):
        for number in range(rounds + 1):
            found = {mode: max(student.call("steps", mode, BLOCK)) for mode in ("ahead", "serial", "alone")}
            forward = [teacher.call("respond", request)[0][1] for _ in range(BLOCK * students)]
            found["teacher"] = sum(forward) / BLOCK
            if number:  # the first only warms up
                for mode, value in found.items():
                    seconds[mode].append(value)
        wire = student.call("metrics")[0]["transport/bytes_per_token"]
    middle = {mode: statistics.median(values) for mode, values in seconds.items()}
    ahead, alone, teacher_alone = middle["ahead"], middle["alone"], middle["teacher"]
    cores = os.cpu_count() or 1 if share is None else students + 1
    print(
        f"\n{students} student rank(s) + 1 teacher rank, {ROWS} × {TIME} tokens a rank, {cores} cores, "
        f"medians of {rounds} rounds"
    )
    print(
        f"  student step alone {alone * 1e3:.0f} ms, teacher's forward passes alone {teacher_alone * 1e3:.0f} ms a step"
    )
    print(
        f"  requests sent a step ahead {ahead * 1e3:.0f} ms: {ahead / max(alone, teacher_alone):.2f} × the larger of the two"
    )
    best = (alone + teacher_alone) / max(alone, teacher_alone, (students * alone + teacher_alone) / cores)
    print(
        f"  requests sent when needed {middle['serial'] * 1e3:.0f} ms: sending ahead is {middle['serial'] / ahead:.2f} × as "
        f"fast (at best {best:.2f})"
    )
    if share is not None:
        print(f"  (each worker had {share} of a core to itself)")
    if students + 1 > cores:
        shared = (students * alone + teacher_alone) / cores
        print(
            f"  {students + 1} workers share {cores} cores, which need {shared * 1e3:.0f} ms for the work of all; "
            f"a step is {ahead / max(alone, teacher_alone, shared):.2f} × that"
        )
    return wire


def measure_bytes(measured: float | None) -> None:
    """Messages of a few positions, of which only the size counts: the numbers in them are zeros."""
    positions = 16
    print(f"\nbytes of the signal per supervised token, of messages of {positions} tokens in bf16")
    print(
        f"  {'Qwen2.5':8}{'hidden':>8}{f'top-{TOPK}':>8}{'whole logits':>14}{'hidden ÷ top-k':>16}{'logits ÷ hidden':>17}"
        f"{f'ROLL, top-{TOPK}':>16}"
    )
    for name, (width, vocab) in QWEN25.items():
        hidden, head = (
            torch.zeros(positions, width).bfloat16(),
            OutputHead(torch.zeros(vocab, width, dtype=torch.bfloat16)),
        )
        sizes = {}
        for kind in ("hidden_states", "top_k", "logits"):
            message = tuple(map(pack, SignalSpec(kind, TOPK, vocab).encode(hidden, head).values()))
            sizes[kind] = sum(part.bits.nbytes for part in message) // positions
        states, topk, logits = sizes.values()
        print(
            f"  {name:8}{states:8}{topk:8}{logits:14}{states / topk:16.1f}{logits / states:17.0f}{TOPK * ROLL_BYTES:16}"
        )
    if measured is not None:
        width = TEACHER["hidden_size"]
        print(f"  measured in the run above: {measured:.0f}, and its teacher is {width} numbers of 4 bytes wide")


class Peer:
    """What ``open_direct_channels`` reads of a worker."""

    def about(self) -> dict[str, Any]:
        return {"gpu": None}


class Producer(Peer):
    """Holds hidden states, and sends them as a teacher's worker does."""

    def __init__(self) -> None:
        self.hidden = torch.randn(32_768, 4096).bfloat16()

    def respond(self, request: None) -> tuple[Any, float]:
        return {"hidden_states": pack(self.hidden)}, time.perf_counter()

    def compute(self, request: None) -> tuple[Any, float]:
        return {"hidden_states": self.hidden.clone()}, time.perf_counter()  # a new tensor, as every response is


class Consumer(Peer):
    """Receives them, as a student's worker does."""

    def fetch(self, producer: Any, backend: str, times: int) -> list[tuple[float, float]]:
        """For each message: seconds from the producer's result to the tensor here, and those of reading all of it."""
        channel = RayChannel(producer, "producer", 60)
        if backend == "gloo":
            from limbeck.teachers.channels.ray_direct import open_direct_channels

            (channel,) = open_direct_channels(backend, [channel])
        found = []
        for _ in range(times):
            response = channel.send(None)()
            begun, arrived = response.seconds, time.perf_counter()  # one clock for all processes of a machine
            response.tensors["hidden_states"].view(torch.int64).sum()
            found.append((arrived - begun, time.perf_counter() - arrived))
            del response
        return found


def measure_wire(messages: int) -> None:
    ray = load_ray()
    import limbeck.teachers.channels.ray_direct  # noqa: F401  before the actors are made, as in a run

    remote = ray.remote(enable_tensor_transport=True, max_concurrency=4)
    size, warmup = 32_768 * 4096 * 2 / 1e9, messages * 2 // 3
    print(f"\n256 MiB of hidden states from one process to another, {messages} messages after {warmup} to warm up")
    middle = {}
    for backend, name in (("ray", "object store"), ("gloo", "gloo")):
        producer, consumer = remote(Producer).remote(), remote(Consumer).remote()
        found = ray.get(consumer.fetch.remote(producer, backend, warmup + messages))
        for actor in (producer, consumer):
            ray.kill(actor)
        rates = [size / seconds for seconds, _ in found]
        warm, read = rates[warmup:], [size / seconds for _, seconds in found[warmup:]]
        both = middle[backend] = [size / (seconds + reading) for seconds, reading in found[warmup:]]
        print(
            f"  {name}: result to tensor {statistics.median(warm):.1f} GB/s (slowest {min(warm):.1f}; the very first "
            f"{rates[0]:.1f}); reading every page there {statistics.median(read):.1f} GB/s; with it "
            f"{statistics.median(both):.1f} GB/s"
        )
    ratio = statistics.median(middle["ray"]) / statistics.median(middle["gloo"])
    print(f"  the object store is {ratio:.1f} × as fast as gloo, reading included")


def measure_start(folder: Path, runs: int) -> None:
    settings = make_run(folder)
    settings["student"]["device_mapping"], settings["teacher"] = [0, 1], {"device_mapping": [2]}
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    found = [seconds_to_first_step(config, folder / "out" / "metrics.jsonl") for _ in range(runs + 1)][1:]
    print(
        "\nlimbeck train with 2 student ranks and 1 teacher rank, Ray started for it, to the end of the first step: "
        f"{statistics.median(found):.1f} s (worst of {runs}: {max(found):.1f} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=(*PARTS, []), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--core", type=float, metavar="SHARE", help="of a core that each worker of steps has to itself")
    parser.add_argument("--quick", action="store_true", help="run each part once, to try it")
    args = parser.parse_args()
    parts = args.parts or PARTS
    os.environ.pop("RAY_ADDRESS", None)
    measured = None
    if {"steps", "wire"} & set(parts):
        with tempfile.TemporaryDirectory() as temporary, ray_session(3):
            if "steps" in parts:
                prepare(Path(temporary))
                for students in (1, 2):
                    measured = measure_steps(Path(temporary), students, args.core, 1 if args.quick else ROUNDS)
            if "wire" in parts:
                measure_wire(3 if args.quick else 30)
    if "bytes" in parts:
        measure_bytes(measured)
    if "start" in parts:
        with tempfile.TemporaryDirectory() as temporary:
            measure_start(Path(temporary), 1 if args.quick else 3)


if __name__ == "__main__":
    main()
