"""What the training loop promises to a step source: numbers of steps, current weights, its state, and an end."""

import json

import pytest
import torch
from runs import forget_after, metrics, weights

from limbeck import DistillPipeline, LimbeckError
from limbeck.registry import STEP_SOURCES
from train.recording import RecordingSource


@pytest.fixture
def record(configure, monkeypatch):
    """``record(**changes)`` → the recording source of a run; the run may end with the exception ``error``."""
    monkeypatch.setattr(STEP_SOURCES, "_registered", dict(STEP_SOURCES._registered))
    made: list[RecordingSource] = []
    options: dict = {}

    @STEP_SOURCES.register("recording")
    def make(*args):
        made.append(options["kind"](*args, fail=options["fail"]))
        return made[-1]

    def run(*, kind=RecordingSource, fail=lambda event: None, error=None, match=None, **changes) -> RecordingSource:
        options.update(kind=kind, fail=fail)
        config = configure(**{"eval_steps": 0, "save_steps": 0, "max_steps": 4, "step_source": "recording", **changes})
        if error is None:
            DistillPipeline(config).run()
        else:
            with pytest.raises(error, match=match):
                DistillPipeline(config).run()
        return made[-1]

    return run


class OnPolicy(RecordingSource):
    max_lookahead = 0


class Endless(RecordingSource):
    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.steps_per_epoch = None


def test_the_next_step_is_made_before_the_weights_change_and_none_beyond_the_last(record):
    assert record(max_steps=3).events == [
        "weights 0", "next 0", "next 1", "weights 1", "next 2", "weights 2", "weights 3", "close",
    ]  # fmt: skip


def test_without_lookahead_a_step_is_made_from_the_newest_weights(record):
    assert record(max_steps=3, kind=OnPolicy).events == [
        "weights 0", "next 0", "weights 1", "next 1", "weights 2", "next 2", "weights 3", "close",
    ]  # fmt: skip


def test_a_resumed_run_goes_on_with_the_state_and_the_number_of_its_step(record, tmp_path):
    whole = record(save_steps=2, max_steps=5)
    forget_after(tmp_path / "out", 2)
    resumed = record(save_steps=2, max_steps=5, resume_from_checkpoint=True)
    assert resumed.loaded == whole.states[2]
    assert resumed.events == [
        "load", "weights 2", "next 2", "next 3", "weights 3", "next 4", "weights 4", "weights 5", "close",
    ]  # fmt: skip
    assert {step: resumed.states[step] for step in (2, 3, 4)} == {step: whole.states[step] for step in (2, 3, 4)}
    for step in (3, 4, 5):
        for name, tensor in whole.weights[step].items():
            torch.testing.assert_close(resumed.weights[step][name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [RecordingSource, OnPolicy])
def test_a_checkpoint_has_the_state_of_the_step_that_comes_next(record, tmp_path, kind):
    source = record(save_steps=2, max_steps=5, kind=kind)
    for step in (2, 4):
        state = json.loads((tmp_path / "out" / f"checkpoint-{step}" / "training" / "state.json").read_text())
        assert state["data"] == source.states[step]


def test_weights_are_those_of_the_step_just_taken(record, tmp_path):
    source = record(save_steps=1)
    for step in range(1, 5):
        saved = weights(tmp_path / "out" / f"checkpoint-{step}")
        assert source.weights[step].keys() == saved.keys()
        for name, tensor in saved.items():
            torch.testing.assert_close(source.weights[step][name], tensor, rtol=0, atol=0)
    assert not torch.equal(source.weights[1]["lm_head.weight"], source.weights[2]["lm_head.weight"])


@pytest.mark.parametrize("event", ["next 1", "weights 2"])
def test_a_source_is_closed_once_after_an_error(record, event):
    def fail(name: str) -> None:
        if name == event:
            raise RuntimeError("the source failed")

    source = record(fail=fail, error=RuntimeError, match="the source failed")
    assert source.events[-2:] == [event, "close"]
    assert source.events.count("close") == 1


def test_a_source_is_closed_if_the_student_cannot_be_built(record):
    lora = {"student.model_args.lora_target": "no_such_layer"}
    source = record(error=LimbeckError, match="no_such_layer", **lora)
    assert source.events == ["close"]


def test_a_run_with_nothing_left_makes_no_step_and_closes_its_source(record):
    record(max_steps=2)
    assert record(max_steps=2, resume_from_checkpoint=True).events == ["load", "weights 2", "close"]


def test_the_generator_is_seeded_by_run_and_step_alone(record, tmp_path):
    first = record(save_steps=2)
    forget_after(tmp_path / "out", 2)
    resumed = record(save_steps=2, resume_from_checkpoint=True)
    other = record(seed=7, output_dir=str(tmp_path / "other"))
    for run in (first, resumed, other):
        del run.seeds[min(run.seeds)]  # before the first step
    assert len(set(first.seeds.values())) == 4
    assert resumed.seeds == {step: first.seeds[step] for step in (3, 4)}
    assert not set(first.seeds.values()) & set(other.seeds.values())


def test_lookahead_changes_no_number_of_a_dataset(record, tmp_path):
    losses = []
    for kind in (RecordingSource, OnPolicy):
        record(kind=kind, output_dir=str(tmp_path / kind.__name__))
        losses.append(metrics(tmp_path / kind.__name__, "train/loss"))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_a_source_without_epochs_needs_max_steps(record):
    assert record(kind=Endless, max_steps=2).events.count("close") == 1
    epochs = {"student.training_args.num_train_epochs": 1}
    record(
        kind=Endless, error=LimbeckError, match="step_source = recording has no epochs; set max_steps",
        resume_from_checkpoint=True, **epochs,
    )  # fmt: skip


def test_training_ends_after_the_configured_part_of_an_epoch(record):
    # 96 rows of 8 make 12 steps.
    source = record(max_steps=None, **{"student.training_args.num_train_epochs": 0.2})
    assert source.events[-2:] == ["weights 3", "close"]


def test_a_source_without_a_method_is_refused_before_training(record):
    class Incomplete:
        max_lookahead, steps_per_epoch = 0, None

        def __init__(self, *args, fail):
            pass

        def next(self, step):
            raise AssertionError("training has started")

    with pytest.raises(
        LimbeckError,
        match="recording lacks before_update, weights_changed, validated, metrics, state_dict, load_state_dict, close; define",
    ):
        record(kind=Incomplete)
