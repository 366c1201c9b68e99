"""Who writes the samples of on-policy steps: the student, the data, the teacher, or the student earlier."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from runs import assert_same_weights, forget_after, metrics, rows
from transformers import AutoModelForCausalLM

from limbeck import DistillPipeline, LimbeckError
from limbeck.config import load_mapping
from limbeck.config.schema.schedules import AdaptiveSchedule, FractionSchedule
from limbeck.strategies.world import World
from limbeck.train import rollout_source
from limbeck.train.adaptive_share import AdaptiveShare
from limbeck.train.build.data import make_data
from limbeck.train.replay import ReplayBuffer
from limbeck.train.rollout_source import RolloutSource
from limbeck.train.samples import REPLAY, Sample

ALONE = World(0, 1, torch.device("cpu"))
SHORT = {"distill_loss_weight": 1.0, "rollout.max_new_tokens": 6, "eval_steps": 0, "save_steps": 0}
REPLAYING = {"rollout.on_policy_fraction": 0.5, "rollout.replay.fraction": 0.6, "rollout.replay.capacity": 5}


@pytest.fixture
def source(configure, assets, monkeypatch):
    """``source(**changes)`` → a rollout source with the student's weights, and the samples of each step it makes."""

    def build(**changes):
        config = configure(**{**SHORT, **changes})
        made = RolloutSource(config, ALONE, make_data(config, ALONE))
        model = AutoModelForCausalLM.from_pretrained(config.student.model_args.model_name_or_path)
        made.weights_changed(lambda: iter(model.state_dict().items()), 0)
        steps = []
        to_examples = rollout_source.to_examples

        def record(samples, *more):
            steps.append(list(samples))
            return to_examples(samples, *more)

        monkeypatch.setattr(rollout_source, "to_examples", record)
        return made, steps

    return build


def contents(samples):
    return [(one.origin, one.row, one.number, one.tokens.tolist(), one.labels.tolist()) for one in samples]


@pytest.mark.parametrize(
    ("keys", "shares"),
    [
        ({"steps": 4}, [0.2, 0.3, 0.4, 0.5, 0.6, 0.6]),
        ({"share": 0.5}, [0.2, 0.28, 0.36, 0.44, 0.52, 0.6]),
        ({"steps": 4, "shape": "cosine"}, [0.2, 0.2 + 0.2 * (1 - 0.5**0.5), 0.4, 0.4 + 0.2 * 0.5**0.5, 0.6, 0.6]),
    ],
)
def test_a_schedule_goes_from_start_to_end_and_stays(keys, shares):
    schedule = FractionSchedule(start=0.2, end=0.6, **keys)
    assert [schedule.at(step, 10) for step in range(6)] == pytest.approx(shares)


def test_the_share_that_the_student_writes_follows_its_schedule(source):
    made, steps = source(**{"rollout.on_policy_fraction": {"start": 0, "end": 1, "share": 0.5}, **rows(16)})
    for step in range(8):
        made.next(step)
    shares = [np.mean([one.origin == "student" for one in samples]) for samples in steps]
    assert shares[0] == 0 and 0 < np.mean(shares[1:6]) < 1 and shares[6:] == [1, 1]


def test_an_adaptive_share_grows_when_the_validation_is_no_better_than_at_the_last_increase():
    schedule = AdaptiveSchedule(shape="adaptive", start=0.2, end=0.5, increment=0.2, tolerance=0.1, metric="val/ce")
    share, found = AdaptiveShare(schedule), []
    for loss in (2.0, 1.5, 2.05, 2.1, 2.15, 2.3, 9.0):
        share.validated({"val/ce": loss, "val/loss": 0.0})
        found.append(share.at(0, 1))
    share.validated({})
    assert found == pytest.approx([0.2, 0.2, 0.2, 0.4, 0.4, 0.5, 0.5])
    other = AdaptiveShare(schedule)
    other.load(json.loads(json.dumps(share.state())))
    assert other.state() == share.state() == {"share": 0.5, "reference": 9.0}


@pytest.mark.slow
def test_a_resumed_run_with_an_adaptive_share_and_decreasing_writing_is_that_of_one_that_went_through(
    configure, tmp_path
):
    common = {
        **SHORT,
        **rows(4, 2),
        "rollout.on_policy_fraction": {"shape": "adaptive", "start": 0.4, "increment": 0.3, "tolerance": -9.0},
        "rollout.replay": {"fraction": {"start": 0, "end": 1, "share": 1}, "replaces": "student", "capacity": 4},
        "validation.at_start": True,
        "max_steps": 8,
        "eval_steps": 2,
        "save_steps": 4,
    }
    whole = DistillPipeline(configure(**common, output_dir=str(tmp_path / "whole"))).run()
    assert metrics(tmp_path / "whole", "rollout/adaptive_share") == pytest.approx([0.4, 0.4, 0.7, 0.7, 1, 1, 1, 1])
    written, replayed = (metrics(tmp_path / "whole", f"rollout/{name}_share") for name in ("on_policy", "replay"))
    assert [one + other for one, other in zip(written[4:], replayed[4:], strict=True)] == [1] * 4
    assert replayed[0] == 0 and replayed[7] > written[7] > 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts", symlinks=True)
    forget_after(tmp_path / "parts", 4)
    parts = DistillPipeline(configure(**common, resume_from_checkpoint=True, output_dir=str(tmp_path / "parts"))).run()
    assert_same_weights(whole.student, parts.student)
    shares = {key: metrics(tmp_path / "parts", key)[-4:] for key in ("rollout/adaptive_share", "rollout/replay_share")}
    assert shares == {key: metrics(tmp_path / "whole", key)[4:] for key in shares}


def test_replay_draws_from_the_newest_samples_of_the_student(source):
    made, steps = source(**REPLAYING, max_steps=40)
    written, replayed, others = [], 0, 0
    for step in range(20):
        made.next(step)
        made.before_update()
        newest = [contents([one])[0][1:] for one in written[-5:]]
        for one in steps[-1]:
            replayed += one.origin == "replay"
            others += one.origin == "dataset"
            assert one.origin != "replay" or contents([one])[0][1:] in newest
        written += [one for one in steps[-1] if one.origin == "student"]
    assert 0.45 < replayed / (replayed + others) < 0.75  # 0.6, but nothing is replayed in the first step
    line = made.metrics()
    assert line["rollout/replay_share"] == replayed / (20 * 8)
    assert line["rollout/on_policy_share"] == len(written) / (20 * 8)
    assert "rollout/teacher_share" not in line


def test_a_buffer_is_the_same_after_its_state_was_written_and_read():
    random = np.random.default_rng(0)
    buffer = ReplayBuffer(3)
    for row in range(5):
        answer = random.integers(0, 1 << 20, row + 1).tolist()
        log_probs = random.normal(size=row + 1).tolist() if row != 3 else None
        buffer.add([Sample.written(row, 1, "student", [1, 2], answer, log_probs, row != 2, weight=1.0 + row % 2)])
    other = ReplayBuffer(3)
    other.load(json.loads(json.dumps(buffer.state())))
    assert (len(other), other.state()) == (3, buffer.state())
    for draw in (0.0, 0.5, 0.99):
        one, two = buffer.pick(draw), other.pick(draw)
        assert contents([one]) == contents([two])
        assert (one.origin, one.finished) == (REPLAY, two.finished)
        for name in ("log_probs", "weights"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_a_resumed_run_replays_the_same_samples(configure, tmp_path):
    common = {**SHORT, **REPLAYING, **rows(4, 2), "distill_loss_weight": 0.7, "max_steps": 6, "save_steps": 3}
    whole = DistillPipeline(configure(**common, output_dir=str(tmp_path / "whole"))).run()
    assert sum(metrics(tmp_path / "whole", "rollout/replay_share")[3:]) > 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts", symlinks=True)
    forget_after(tmp_path / "parts", 3)
    parts = DistillPipeline(configure(**common, resume_from_checkpoint=True, output_dir=str(tmp_path / "parts"))).run()
    assert_same_weights(whole.student, parts.student)


def test_the_teacher_writes_the_answers_once(source, assets, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(assets / "teacher")
    few = (assets / "rows.jsonl").read_text().splitlines()[:8]
    (tmp_path / "few.jsonl").write_text("\n".join(few))
    files = {"student.data_args.file_name": [str(tmp_path / "few.jsonl")], "rollout.num_generations": 2}
    changes = {"rollout.on_policy_fraction": 0.0, "rollout.off_policy": "teacher", "rollout.temperature": 0.0}
    made, steps = source(**changes, **files)
    for step in range(4):  # two epochs
        made.next(step)
        made.before_update()
    for one in steps[0]:
        prompt = torch.tensor(one.tokens[None, : -one.num_answer_tokens].astype(np.int64))
        assert one.tokens.tolist() == teacher.generate(prompt, do_sample=False, max_new_tokens=6)[0].tolist()
    assert Counter(one.origin for samples in steps for one in samples) == {"teacher": 4 * 8}
    assert made._teacher._writer.counts.completions == 8 * 2
    assert made.metrics()["rollout/teacher_share"] == 1


@pytest.mark.parametrize("writer", ["student", "teacher"])
def test_each_occurrence_of_a_row_in_a_step_is_a_sample_of_its_own(source, assets, tmp_path, writer):
    (tmp_path / "two.jsonl").write_text("\n".join((assets / "rows.jsonl").read_text().splitlines()[:2]))
    paths = [str(assets / "rows.jsonl"), str(tmp_path / "two.jsonl")]
    changes = {"student.data_args.file_name": None, "rollout.num_generations": 2, **rows(32)}
    changes["student.data_args.sources"] = [{"path": path, "weight": 0.5} for path in paths]
    changes |= {"rollout.on_policy_fraction": 0.5, "rollout.off_policy": "teacher"}
    made, steps = source(**changes)
    made.next(0)
    (samples,) = steps
    assert len(samples) == 32
    numbers: dict[int, list[int]] = {}
    for one in samples:
        numbers.setdefault(one.row, []).append(one.number)
    assert all(of_row == list(range(len(of_row))) for of_row in numbers.values())
    repeated = max(numbers, key=lambda row: len(numbers[row]))
    assert len(numbers[repeated]) > 4
    theirs = [one.tokens.tobytes() for one in samples if (one.row, one.origin) == (repeated, writer)]
    assert 1 < len(set(theirs)) == len(theirs) < len(numbers[repeated])


def test_an_answer_of_the_teacher_depends_on_row_and_number_only(source):
    changes = {"rollout.on_policy_fraction": 0.4, "rollout.off_policy": "teacher", "rollout.num_generations": 2}
    found = []
    for first in (0, 3):  # the answers written before are others
        made, steps = source(**changes, max_steps=20)
        for step in range(first, first + 8):
            made.next(step)
        theirs = [one for samples in steps for one in samples if one.origin == "teacher"]
        found.append({(one.row, one.number): one.tokens.tolist() for one in theirs})
    common = found[0].keys() & found[1].keys()
    assert len(common) > 5
    assert all(found[0][key] == found[1][key] for key in common)
    assert any(found[0].get((row, 1), tokens) != tokens for (row, _), tokens in found[0].items())  # the numbers differ


def test_weights_of_the_data_hold_for_what_replaces_its_answers(settings, tmp_path):
    lines = [{"question": f"What is {i}?", "answer": f"It is {i}.", "weight": 1 + i % 3} for i in range(16)]
    (tmp_path / "weighted.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = {**SHORT, "rollout.on_policy_fraction": 0.5, "rollout.objectives.dataset.weight": 0.5}
    config = load_mapping(
        settings(**changes, **{"student.data_args.file_name": [str(tmp_path / "weighted.jsonl")]})
    ).config
    made = RolloutSource(config, ALONE, make_data(config, ALONE))
    model = AutoModelForCausalLM.from_pretrained(config.student.model_args.model_name_or_path)
    made.weights_changed(lambda: iter(model.state_dict().items()), 0)
    factors = Counter()
    for step in range(2):
        for batch in made.next(step).micro_batches:
            at = 0
            for row, labels in zip(batch.row_ids, batch.labels, strict=True):
                count = int((labels >= 0).sum())
                values = set(batch.weights[at : at + count].tolist())
                (value,) = values
                factors[made._origin(step, row, 0), value / (1 + row % 3)] += 1
                at += count
    assert factors.keys() == {("student", 1.0), ("dataset", 0.5)}


PROMPTS = [
    {"question": "What is 7?", "answer": ""},
    {"question": "What is 8?"},
    {"question": "What is 9?", "answer": "It is 9."},
] * 4


@pytest.mark.parametrize("changes", [{}, {"rollout.on_policy_fraction": 0.5, "rollout.off_policy": "teacher"}])
def test_rows_without_an_answer_are_prompts_where_nobody_reads_answers(settings, tmp_path, changes):
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    files = {"student.data_args.file_name": [str(tmp_path / "prompts.jsonl")]}
    result = DistillPipeline(load_mapping(settings(**{**SHORT, **files, **changes, "max_steps": 2})).config).run()
    assert result.step == 2


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (PROMPTS, r'prompts.jsonl:1: "answer" is empty'),
        ([{"prompt": "Why?"}], r"prompts.jsonl:1 is a prompt without an answer .*rollout.on_policy_fraction: 1"),
    ],
)
def test_a_row_without_an_answer_is_refused_where_the_data_answers(settings, tmp_path, lines, sentence):
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = {"student.data_args.file_name": [str(tmp_path / "prompts.jsonl")]}
    with pytest.raises(LimbeckError, match=sentence):
        DistillPipeline(load_mapping(settings(**{**SHORT, **files, "rollout.on_policy_fraction": 0.9})).config).run()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"rollout.on_policy_fraction": {"start": 0, "end": 2, "steps": 3}},
            r"on_policy_fraction = .* must be a number .*\(end: ",
        ),
        ({"rollout.on_policy_fraction": {"start": 0, "end": 1}}, "needs either steps or share"),
        (
            {"rollout.on_policy_fraction": {"start": 0, "end": 1, "step": 3}},
            r"on_policy_fraction = .* must be .*\(step: Extra",
        ),
        ({"rollout.on_policy_fraction": "half"}, "rollout.on_policy_fraction"),
        ({"rollout.off_policy": "teacher", "cross_tokenizer": "uld"}, "cannot be combined with cross_tokenizer"),
        ({"rollout.replay.fraction": 1.5}, "rollout.replay.fraction"),
        ({"rollout.replay.fraction": {"shape": "adaptive"}}, "with the shape linear or cosine"),
        ({"rollout.on_policy_fraction": {"shape": "adaptive"}}, "which follows the validation; set"),
        ({"rollout.on_policy_fraction": {"shape": "adaptive", "start": 0.5, "end": 0}}, "end must not be below start"),
        (
            {"rollout.on_policy_fraction": {"shape": "adaptive"}, "eval_steps": 4, "rollout.max_staleness": 1},
            "set it to 0",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(configure, changes, sentence):
    with pytest.raises(LimbeckError, match=sentence):
        configure(**{**SHORT, **changes})


def test_replay_without_other_samples_has_a_notice(settings):
    loaded = load_mapping(settings(**{**SHORT, "rollout.replay.fraction": 0.5, "rollout.off_policy": "teacher"}))
    notices = "\n".join(loaded.notices)
    assert "rollout.replay.fraction has no effect: it replaces samples that the student does not write" in notices
    assert "rollout.off_policy has no effect" in notices
