"""Every signal over every transport gives the losses of one process.

Two student ranks and two teacher ranks are started once and run all cases.
"""

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from runs import metrics, rows

from limbeck.data.batch import Batch
from limbeck.data.masks import IGNORE
from limbeck.strategies.parallel_dims import ParallelDims
from limbeck.teachers import RemoteTeacher, SignalSpec, TeacherInfo
from limbeck.teachers.remote import Route
from limbeck.train.colocated_offload import ColocatedOffload

pytest.importorskip("ray")

pytestmark = pytest.mark.workers

KEYS = ("train/loss", "train/train_distill_loss", "train/teacher_entropy", "student/grad_norm", "val/loss", "val/kd")
SIZES = "student.strategy_args.strategy_config."
TENSOR = {**rows(8), f"{SIZES}tensor_model_parallel_size": 2}
CONTEXT = {**rows(8), f"{SIZES}context_parallel_size": 2}
STAGES = {**rows(4, 2), f"{SIZES}pipeline_model_parallel_size": 2}
TOP = {"logits_topk": 7, "logits_topk_tail": "bucket", "kd_temperature": 2.0, "kd_objective": "mixed_kl"}
SAMPLED = {"kd_objective": "k2", "distill_loss_weight": 1.0, "rollout.max_new_tokens": 6}
GLOO = {"logits_transfer_backend": "gloo"}
HIDDEN, VOCAB = 48 * 4, 299 * 4  # bytes: the teacher's width, and the tokens that both models have


@pytest.fixture(scope="module")
def groups(assets, tmp_path_factory):
    """Workers that run one configuration after another, and record the calls that the teacher receives."""
    from limbeck.cluster.environment import worker_environment
    from limbeck.cluster.groups import GroupSpec
    from limbeck.cluster.placement import place
    from limbeck.cluster.session import ray_session
    from limbeck.config import DistillConfig
    from limbeck.launch.workers import StudentWorker
    from limbeck.teachers.channels.ray_object_store import RayChannel
    from limbeck.teachers.worker import TeacherWorker

    class Student(StudentWorker):
        def train(self, values, teachers):
            self.config = DistillConfig.model_validate(values)
            self.run(teachers, False)

        def request(self, teachers, batch, spec):
            """The signal for ``batch``, which both ranks share as one tensor-parallel student does."""
            world = replace(self.world, dims=ParallelDims(tp=2))
            channels = [RayChannel(actor, f"teacher-{rank}", 60) for rank, actor in enumerate(teachers)]
            teacher = RemoteTeacher(channels, Route((0,)), TeacherInfo(0, 0), world)
            return teacher.request(batch, spec)(batch)

    class Teacher(TeacherWorker):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.seen = []

        def compute(self, request):
            self.seen.append("request")
            return super().compute(request)

        def offload(self):
            self.seen.append("offload")
            super().offload()

        def drain(self):
            seen, self.seen = self.seen, []
            return seen

    folder = tmp_path_factory.mktemp("groups")
    values = DistillConfig.model_validate(
        {
            "student_pretrain": str(assets / "student"),
            "teacher_pretrain": str(assets / "teacher"),
            "teacher": {"model_args": {"dtype": "fp32"}, "strategy_args": {"strategy_name": "hf_infer"}},
            "student": {"data_args": {"file_name": ["none"]}},
        }
    ).model_dump(mode="json")
    with ray_session(4):
        placement = place([[0, 1], [2, 3]], None)
        student, teacher = (
            GroupSpec(
                name, worker, (values,), folder, worker_environment({}, 4), concurrency=concurrency, direct=True
            ).start(placement, mapping)
            for mapping, (name, worker, concurrency) in enumerate((("student", Student, 4), ("teacher", Teacher, 1)))
        )
        try:
            teacher.connect(1, process_group=False)
            student.connect(1)
            yield student, teacher
        finally:
            student.end()
            teacher.end()
            placement.free()


@pytest.mark.parametrize(
    ("common", "changes", "bytes_per_token", "requests"),
    [
        (TOP, rows(4), 7 * 8, 2),
        (TOP, TENSOR, 7 * 8, 1),
        ({}, CONTEXT, HIDDEN, 1),
        ({}, {**TENSOR, "teacher.signal": "logits"}, VOCAB, 1),
        ({"logits_topk": 5}, {**rows(4), "teacher.signal": "logits"}, VOCAB, 2),
        (TOP, STAGES, 7 * 8, 1),
        ({}, {**rows(4), **GLOO}, HIDDEN, 2),
        (TOP, {**TENSOR, **GLOO}, 7 * 8, 1),
        (SAMPLED, rows(4), 4, 2),
    ],
    ids=[
        "top-k",
        "top-k-tp2",
        "hidden-cp2",
        "logits-tp2",
        "logits",
        "top-k-pp2",
        "hidden-gloo",
        "top-k-tp2-gloo",
        "sampled",
    ],
)
def test_signals_and_transports_give_the_losses_of_one_process(
    alone, configure, groups, tmp_path, common, changes, bytes_per_token, requests
):
    short = {"max_steps": 3, "save_steps": 0, "eval_steps": 3, **common}
    apart = {"student.device_mapping": [0, 1], "teacher.device_mapping": [2, 3], **short, **changes}
    student, teacher = groups
    student.call("train", configure(**apart).model_dump(mode="json"), teacher.actors)
    one, out = alone(**short), tmp_path / "out"
    for key in KEYS:
        sent = [] if common is SAMPLED and key == "train/teacher_entropy" else metrics(one, key)
        assert metrics(out, key) == pytest.approx(sent, rel=1e-5, abs=1e-5), key
    assert set(metrics(out, "transport/bytes_per_token")) == {float(bytes_per_token)}
    # Three steps on each share of the data, and validation in portions of 16 rows.
    micro_batches = 2 if changes is STAGES else 1
    assert sum(map(len, teacher.call("drain"))) == requests * (3 * micro_batches + 96 // 16 // requests)


def test_a_signal_of_any_number_of_tensors_reaches_every_rank(groups):
    @dataclass(frozen=True)
    class Three(SignalSpec):
        def encode(self, hidden, head, chunk=None):
            return {"hidden": hidden, "norms": hidden.norm(dim=-1).bfloat16(), "argmax": hidden.argmax(-1)}

        def decode(self, tensors, head):
            return dict(tensors)

    student, teacher = groups
    labels = torch.full((2, 6), IGNORE)
    labels.view(-1)[[1, 2, 7, 9, 10]] = 5
    batch = Batch.of(torch.arange(5, 17).view(2, 6), labels, None, num_tokens=12)
    first, second = student.call("request", teacher.actors, batch, Three("three"))
    assert sum(map(len, teacher.call("drain"))) == 1
    assert list(first) == ["hidden", "norms", "argmax"] and first["hidden"].shape == (5, 48)
    assert first["norms"].dtype == torch.bfloat16
    assert torch.equal(first["norms"], first["hidden"].norm(dim=-1).bfloat16())
    assert torch.equal(first["argmax"], first["hidden"].argmax(-1))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_colocated_teacher_computes_several_steps_before_it_is_offloaded(alone, configure, groups, tmp_path):
    short = {"max_steps": 3, "save_steps": 0, "eval_steps": 3}
    both = {"student.device_mapping": [0, 1], "teacher.device_mapping": [0, 1], "is_offload_states": True}
    config = configure(**short, **rows(4), **both, offload_interval=2)
    assert config.needs_worker_groups and config.offloads_colocated
    student, teacher = groups
    student.call("train", config.model_dump(mode="json"), teacher.actors)
    for key in KEYS:
        one, out = metrics(alone(**short), key), metrics(tmp_path / "out", key)
        assert out == pytest.approx(one, rel=1e-5, abs=1e-5), key
    # Two steps, the third, and three batches of the validation.
    calls = [*["request"] * 2, "offload", "request", "offload", *["request"] * 3, "offload"]
    assert teacher.call("drain") == [calls, calls]


def test_the_student_is_offloaded_while_the_colocated_teacher_computes():
    seen = []
    engine, teacher = (
        SimpleNamespace(**{name: partial(seen.append, f"{role} {name}") for name in ("offload", "reload")})
        for role in ("student", "teacher")
    )
    world = SimpleNamespace(barrier=partial(seen.append, "barrier"))
    with ColocatedOffload(engine, teacher, world).teacher_turn():
        seen.append("request")
    expected = ["student offload", "barrier", "teacher reload", "request", "teacher offload", "student reload"]
    assert seen == expected
