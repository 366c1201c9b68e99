"""On-policy steps: which samples the student writes, with which weights, and that a run of them resumes exactly."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from runs import assert_same_weights, forget_after, metrics, rows, train
from transformers import AutoModelForCausalLM

from limbeck import DistillPipeline, LimbeckError
from limbeck.config import load_mapping
from limbeck.data.examples import Examples
from limbeck.data.masks import IGNORE
from limbeck.strategies.world import World
from limbeck.train.build.data import make_data
from limbeck.train.rollout_source import RolloutSource
from limbeck.train.samples import answer_starts

PLUGIN = Path(__file__).parents[2] / "examples" / "plugins" / "generator.py"
ALONE = World(0, 1, torch.device("cpu"))
GREEDY = {
    "plugins": [str(PLUGIN)],
    "distill_loss_weight": 1.0,
    "rollout.generator": "greedy",
    "rollout.max_new_tokens": 6,
    "eval_steps": 0,
    "save_steps": 0,
}


@pytest.fixture
def source(configure):
    """``source(**changes)`` → a rollout source, its configuration and its data."""

    def build(**changes):
        config = configure(**{**GREEDY, **changes})
        data = make_data(config, ALONE)
        return RolloutSource(config, ALONE, data), config, data

    return build


def texts(batch):
    """(row, token ids, labels) of each row of a step, without padding."""
    found = []
    for micro_batch in batch.micro_batches:
        for row, ids, labels in zip(micro_batch.row_ids, micro_batch.input_ids, micro_batch.labels, strict=True):
            last = int((labels != IGNORE).nonzero().max()) + 2
            found.append((row, ids[:last].tolist(), labels[: last - 1].tolist()))
    return found


@pytest.mark.parametrize("generator", ["greedy", "hf"])
def test_the_student_continues_the_prompts_of_the_data_with_its_current_weights(source, generator):
    made, config, data = source(**{"rollout.generator": generator, "rollout.temperature": 0.0})
    model = AutoModelForCausalLM.from_pretrained(config.student.model_args.model_name_or_path)
    for step in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * step)
        made.weights_changed(lambda: iter(model.state_dict().items()), step)
        found = texts(made.next(step))
        assert len(found) == 8
        for row, ids, labels in found:
            length = int(answer_starts(data.examples)[row])
            prompt = data.examples.row(row)[0][:length].tolist()
            expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)[0].tolist()
            assert ids == expected
            assert labels == [IGNORE] * (length - 1) + expected[length:]
    line = made.metrics()
    assert line["rollout/on_policy_share"] == 1
    assert 1 <= line["rollout/mean_length"] <= 6
    assert made.metrics()["rollout/mean_length"] == 0  # counted anew


def test_the_share_is_drawn_for_each_sample_from_seed_step_and_row(source):
    made, _, data = source(**{"rollout.on_policy_fraction": 0.3, **rows(32)})
    starts, shares = answer_starts(data.examples), []
    for step in range(12):
        for row, ids, _ in texts(made.next(step)):
            answer = data.examples.row(row)[0][starts[row] :].tolist()
            shares.append(ids[starts[row] :] != answer)
    assert 0.2 < np.mean(shares) < 0.4
    again, _, _ = source(**{"rollout.on_policy_fraction": 0.3, **rows(32)})
    other, _, _ = source(**{"rollout.on_policy_fraction": 0.3, "seed": 5, **rows(32)})
    one, two, three = (
        {row: made._origin(3, row, 0) == "student" for row in range(96)} for made in (again, source()[0], other)
    )
    assert one == {row: again._origin(3, row, 0) == "student" for row in range(96)}
    assert all(two.values())
    assert one != three


def test_without_any_samples_of_the_student_a_run_is_that_of_the_dataset(configure, tmp_path):
    common = {"max_steps": 4, "eval_steps": 0, "save_steps": 0}
    plain = DistillPipeline(configure(**common, output_dir=str(tmp_path / "plain"))).run()
    changes = {k: v for k, v in GREEDY.items() if k != "distill_loss_weight"}
    given = DistillPipeline(
        configure(**{**changes, **common, "rollout.on_policy_fraction": 0.0, "output_dir": str(tmp_path / "given")})
    ).run()
    assert_same_weights(plain.student, given.student)


def test_several_samples_of_a_prompt_are_in_one_step(source):
    made, _, _ = source(**{"rollout.num_generations": 4})
    found = [row for row, _, _ in texts(made.next(0))]
    assert sorted(found) == sorted(row for row in set(found) for _ in range(4))
    assert len(found) == 8


@pytest.mark.parametrize("layout", [{}, {"student.use_sequence_packing": True}], ids=["padded", "packed"])
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(configure, tmp_path, layout):
    common = {**GREEDY, **layout, "rollout.on_policy_fraction": 0.5, **rows(4, 2), "max_steps": 6, "save_steps": 3}
    whole = DistillPipeline(configure(**common, output_dir=str(tmp_path / "whole"))).run()
    shutil.copytree(tmp_path / "whole", tmp_path / "parts", symlinks=True)
    forget_after(tmp_path / "parts", 3)
    parts = DistillPipeline(configure(**common, resume_from_checkpoint=True, output_dir=str(tmp_path / "parts"))).run()
    assert_same_weights(whole.student, parts.student)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < np.mean([line["rollout/on_policy_share"] for line in lines if "train/loss" in line]) < 1


@pytest.mark.processes
def test_two_ranks_write_the_samples_of_one(settings, tmp_path):
    losses = []
    mixture = {"rollout.on_policy_fraction": 0.5, "rollout.off_policy": "teacher", "rollout.replay.fraction": 0.5}
    mixture |= {"rollout.objectives.teacher.weight": 0.5, "distill_loss_weight": 0.7}
    for ranks, split in ((1, rows(4, 2)), (2, rows(4, 1))):
        output = tmp_path / f"out{ranks}"
        train(settings(**{**GREEDY, **mixture, **split, "max_steps": 4, "output_dir": str(output)}), tmp_path, ranks)
        losses.append(metrics(output, "train/loss"))
        assert all(
            0 < sum(metrics(output, f"rollout/{origin}_share")) < 4 for origin in ("on_policy", "teacher", "replay")
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"rollout.max_new_tokens": 60},
            r"sequence_length = 64 cannot hold the longest prompt, \d+ tokens, and an answer of rollout.max_new_tokens = 60",
        ),
        ({"rollout.num_generations": 3}, "rollout.num_generations = 3 does not divide the 8 samples of a step"),
        ({"distill_on_prompt": True}, "distill_on_prompt hides where an answer begins"),
        ({"rollout.on_policy_fraction": 1.5}, "rollout.on_policy_fraction"),
        ({"student.model_args.lora_target": "all-linear"}, "lora_target with rollout is not built yet"),
        ({"rollout.generator": "gready"}, "is not a known generator; did you mean greedy?"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_step(configure, changes, sentence):
    with pytest.raises(LimbeckError, match=sentence):
        DistillPipeline(configure(**{**GREEDY, **changes})).run()


def test_a_source_of_rollouts_needs_its_section(settings):
    with pytest.raises(LimbeckError, match="step_source = rollout needs the section rollout"):
        load_mapping(settings(step_source="rollout"))
    assert (
        load_mapping(
            yaml.safe_load(yaml.safe_dump(settings(rollout={}, distill_loss_weight=1.0)))
        ).config.effective_step_source
        == "rollout"
    )


def test_the_answer_of_a_row_is_its_last_supervised_run():
    rows_of_labels = ([-100, 5, 6, -100], [1, 2, 3], [-100, 4, -100, -100, 7, 8, -100], [-100, -100, 9])
    labels = np.concatenate([np.array(row, dtype=np.int32) for row in rows_of_labels])
    offsets = np.cumsum([0, *map(len, rows_of_labels)])
    assert answer_starts(Examples(labels, labels, offsets)).tolist() == [2, 1, 5, 3]
