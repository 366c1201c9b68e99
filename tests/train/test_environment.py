"""Rewards of what the student writes, validation by writing, and the files of samples."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import metric_by_step, rows, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck import DistillPipeline, LimbeckError
from limbeck.config import load_mapping
from limbeck.data import tokenize_files
from limbeck.data.masks import IGNORE
from limbeck.registry import ENVIRONMENTS
from limbeck.rollout import EnvironmentStep
from limbeck.strategies.world import World
from limbeck.train.answers import NumberedPrompt
from limbeck.train.build.data import make_data
from limbeck.train.rollout_source import RolloutSource

ALONE = World(0, 1, torch.device("cpu"))
SHORT = {
    "distill_loss_weight": 1.0,
    "rollout.max_new_tokens": 6,
    "rollout.environment": "lengths",
    "eval_steps": 0,
    "save_steps": 0,
}


class Lengths:
    """Rewards with the number of characters; raises for one row, and does not know the reward of another."""

    def reset(self, row):
        if row["question"].startswith("What is 3 "):
            raise ValueError("no threes")
        return row["question"]

    def step(self, episodes, completions):
        return [
            EnvironmentStep(reason="timeout")
            if "is 4 " in episode
            else EnvironmentStep(reward=float(len(text)), reason="" if text else "no answer found")
            for episode, text in zip(episodes, completions, strict=True)
        ]

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def _lengths(_only_built_in_extensions):
    ENVIRONMENTS.register("lengths")(Lengths)


@pytest.fixture
def source(configure):
    def build(**changes):
        config = configure(**{**SHORT, **changes})
        data = make_data(config, ALONE)
        made = RolloutSource(config, ALONE, data)
        return made, config, data

    return build


def saved(folder, name):
    return [json.loads(line) for line in (folder / "rollouts" / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("overlong", ["drop", "split"])
def test_the_columns_of_a_row_stay_with_it_when_rows_are_dropped_split_and_cached(assets, tmp_path, overlong):
    given = [{"question": f"q{i}", "answer": "a " * (1 + 60 * (i % 3 == 1)), "id": i, "名": "é"} for i in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    tokenizer = AutoTokenizer.from_pretrained(assets / "student")
    for _ in range(2):  # the second reads the cache
        examples, _ = tokenize_files(
            [path], tokenizer, cache_dir=tmp_path / "c", sequence_length=32, overlong=overlong, keep_columns=True
        )
        found = [examples.columns_of(i) for i in range(len(examples))]
        assert len(found) == 13 if overlong == "drop" else len(found) > 20
        for i, columns in enumerate(found):
            assert columns == given[columns["id"]]
            text = tokenizer.decode(examples.row(i)[0])
            assert overlong == "split" or f"q{columns['id']}<" in text
    plain, _ = tokenize_files([path], tokenizer, cache_dir=tmp_path / "c", sequence_length=32, overlong=overlong)
    assert plain.columns is None


def test_written_samples_are_rewarded_saved_and_counted(configure, tmp_path):
    config = configure(
        **{**SHORT, "max_steps": 3, "rollout.save_samples": True, "rollout.on_policy_fraction": 0.6, **rows(32)}
    )
    DistillPipeline(config).run()
    out = tmp_path / "out"
    for step in (1, 2, 3):
        lines = saved(out, f"train-{step}")
        assert len(lines) == 32
        written = [line for line in lines if line["origin"] == "student"]
        assert 0 < len(written) < 32
        assert all(line["reward"] is None for line in lines if line["origin"] == "dataset")
        known = [line["reward"] for line in written if line["reward"] is not None]
        for line in written:
            failed, late = "is 3 " in line["prompt"], "is 4 " in line["prompt"]
            assert (line["reward"] is None) == (failed or late)
            assert line["reason"].startswith("error: ValueError") == failed
        assert metric_by_step(out, "rollout/reward")[step] == pytest.approx(np.mean(known))
        unknown = metric_by_step(out, "rollout/reward_unknown_share")[step]
        assert unknown == pytest.approx(1 - len(known) / len(written))
    for reason, words in (("error", "is 3 "), ("timeout", "is 4 ")):
        counted = sum(metric_by_step(out, f"rollout/reward_reasons/{reason}").values())
        lines = [line for step in (1, 2, 3) for line in saved(out, f"train-{step}") if line["origin"] == "student"]
        assert counted == sum(words in line["prompt"] for line in lines) > 0


VALIDATED = {
    **SHORT,
    "rollout.environment": "exact",
    "rollout.on_policy_fraction": 0.0,
    "validation.rollout.max_samples": 10,
    "validation.rollout.num_generations": 2,
    "validation.rollout.print_samples": 1,
    "eval_steps": 2,
    "max_steps": 3,
    "validation.at_start": True,
    "checkpoint_config.best_metric": "val/accuracy",
    "checkpoint_config.best_mode": "max",
}


def test_validation_writes_answers_and_measures_them(configure, tmp_path, capsys):
    DistillPipeline(configure(**VALIDATED)).run()
    out = tmp_path / "out"
    accuracy = metric_by_step(out, "val/accuracy")
    assert list(accuracy) == [0, 2, 3]
    assert metric_by_step(out, "rollout/mean_length") == {}  # validation is not counted as training
    for step, value in accuracy.items():
        lines = saved(out, f"val-{step}")
        assert [(line["row"], line["number"]) for line in lines] == [(row, n) for row in range(10) for n in range(2)]
        assert value == np.mean([line["reward"] for line in lines])
        assert metric_by_step(out, "val/truncated_share")[step] == np.mean([not line["finished"] for line in lines])
        prompt = "<|user|>What is 1 plus 7?<|end|><|assistant|>"
        assert [line["prompt"] for line in lines[2:4]] == [prompt] * 2
        assert lines[2]["completion"] != lines[3]["completion"]
    printed = capsys.readouterr().out
    assert printed.count("prompt: <|user|>") == 3
    assert (out / "best").resolve().name == "checkpoint-3"
    assert json.loads((out / "checkpoint-3" / "manifest.json").read_text())["metric_name"] == "val/accuracy"


@pytest.mark.parametrize("answered", [0, 2])
def test_validation_by_writing_needs_no_answers(configure, tmp_path, capsys, answered):
    """The loss is that of the rows with answers."""
    found = [{"question": f"What is {n} plus 5?"} | ({"answer": "7"} if n < 6 + answered else {}) for n in range(6, 10)]
    for name, lines in (("some", found), ("all", found[:answered])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(name: str, **changes) -> tuple[dict, dict]:
        given = {**VALIDATED, "rollout.environment": "lengths", "max_steps": 1, "output_dir": str(tmp_path / name)}
        given |= {"checkpoint_config.best_metric": "val/loss", "checkpoint_config.best_mode": "min", **changes}
        DistillPipeline(
            configure(**given, **{"validation.data_args.file_name": [str(tmp_path / f"{name}.jsonl")]})
        ).run()
        return metric_by_step(tmp_path / name, "val/accuracy"), metric_by_step(tmp_path / name, "val/loss")

    accuracy, loss = run("some")
    assert set(accuracy) == {0, 1}
    notice = "no row has an answer, so that val/loss (checkpoint_config.best_metric) is not measured"
    assert (notice in " ".join(capsys.readouterr().out.split())) == (not answered)
    if answered:
        assert loss == pytest.approx(run("all")[1])
    else:
        assert loss == {}
        with pytest.raises(LimbeckError, match="the shape adaptive, which follows val/loss, and no validation row"):
            run("some", **{"rollout.on_policy_fraction": {"shape": "adaptive"}, "output_dir": str(tmp_path / "other")})


def test_without_validation_at_the_end_the_last_checkpoint_has_no_metric(configure, tmp_path):
    DistillPipeline(configure(**{**VALIDATED, "validation.at_end": False, "validation.at_start": False})).run()
    assert list(metric_by_step(tmp_path / "out", "val/accuracy")) == [2]
    assert not (tmp_path / "out" / "best").is_symlink()


def test_greedy_validation_gives_the_reference_to_the_environment(configure, tmp_path, monkeypatch):
    """An environment that gets the answer as column and the decoded completion: trained answers would be right."""
    seen = []

    class Spy(Lengths):
        def reset(self, row):
            return row["answer"]

        def step(self, episodes, completions):
            seen.extend(zip(episodes, completions, strict=True))
            return [EnvironmentStep(reward=float("indeed" in episode)) for episode in episodes]

    ENVIRONMENTS.register("spy")(Spy)
    changes = {
        "rollout.environment": "spy",
        "validation.at_start": False,
        "validation.rollout.temperature": 0.0,
        "validation.rollout.max_samples": None,
    }
    DistillPipeline(configure(**{**VALIDATED, **changes, "max_steps": 1})).run()
    assert metric_by_step(tmp_path / "out", "val/accuracy") == {1: 0.75}
    assert len(seen) == 192
    assert seen[::2] == seen[1::2]  # greedy
    assert all("<|" not in text for _, text in seen)


@pytest.mark.processes
def test_two_ranks_score_what_one_does(settings, tmp_path):
    found = []
    for ranks, split in ((1, rows(4, 2)), (2, rows(4, 1))):
        output = tmp_path / f"out{ranks}"
        changes = {"rollout.environment": "exact", "rollout.on_policy_fraction": 1.0, "rollout.save_samples": True}
        config = settings(**{**VALIDATED, **changes, **split, "max_steps": 2, "output_dir": str(output)})
        if ranks > 1:
            train(config, tmp_path, ranks)
        else:
            DistillPipeline(load_mapping(config).config).run()
        names = (
            "rollout/reward",
            "rollout/reward_unknown_share",
            "rollout/reward_reasons/no_answer_found",
            "val/accuracy",
        )
        found.append(
            [saved(output, "train-1"), saved(output, "val-0"), *(metric_by_step(output, name) for name in names)]
        )
    assert found[0] == found[1]
    assert any(found[0][4].values())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rollout.environment": "exakt"}, "is not a known environment; did you mean exact?"),
        (
            {"rollout.environment": "exact", "rollout.environment_kwargs.answer_key": "solution"},
            "rollout.environment = exact cannot use the training rows: a row has no reference answer in the column solution; "
            "its columns are question, answer",
        ),
        (
            {"rollout.environment": "exact", "rollout.environment_kwargs.workers": 2},
            "rollout.environment_kwargs.workers is not read by environment = exact, which reads answer_key",
        ),
        *(
            (
                {"rollout.environment": "math", f"rollout.environment_kwargs.{key}": value},
                f"{key} = {value} is not {what}",
            )
            for key, value, what in (
                ("workers", 0, "a whole number of at least 1"),
                ("workers", "two", "a whole number of at least 1"),
                ("seconds", -1, "a number greater than 0"),
                ("answer_key", 3, "the name of a column"),
            )
        ),
        (
            {"rollout.environment": None, "validation.rollout": {}},
            "validation.rollout needs a generator and an environment",
        ),
        ({"rollout.environment": None, "rollout.max_turns": 2}, "rollout.max_turns = 2 needs an environment"),
        (
            {"checkpoint_config.best_metric": "val/accuracy", "checkpoint_config.best_mode": "max"},
            "'val/accuracy' is not a metric of this run",
        ),
        (
            {"checkpoint_config.best_metric": "rollout/rewards", "checkpoint_config.best_mode": "max"},
            "did you mean rollout/reward?",
        ),
        ({"checkpoint_config.best_metric": "rollout/reward"}, "best_mode = min selects the lowest rollout/reward"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_step(configure, tmp_path, changes, sentence):
    with pytest.raises(LimbeckError, match=sentence.replace("?", r"\?")):
        DistillPipeline(configure(**{**SHORT, **changes})).run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), np.float32("-inf")])
def test_a_reward_that_is_not_finite_is_not_known(source, reward):
    class Broken(Lengths):
        def reset(self, row):
            return row["question"]

        def step(self, episodes, completions):
            return [EnvironmentStep(reward=reward if "1 plus" in one else 1.0) for one in episodes]

    ENVIRONMENTS.register("broken")(Broken)
    made, _, data = source(**{"rollout.environment": "broken"})
    found = made.scorer.begin(data.examples, range(8)).step(dict.fromkeys(range(8), (1,)))
    assert {one.reward for one in found.values()} == {None, 1.0}
    assert {one.reason for one in found.values() if one.reward is None} == {f"error: the reward is {reward}"}


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([0.5], "returned 0.5 for a completion, which is not an EnvironmentStep"),
        ([EnvironmentStep(reward="good")], "returned the reward 'good', which is not a number"),
        ([EnvironmentStep(reply=b"go on")], "returned the reply b'go on', which is not text"),
        (None, "returned a NoneType for 1 completions"),
        ([], "returned 0 steps for 1 completions"),
    ],
)
def test_a_faulty_environment_is_named(source, steps, sentence):
    class Faulty(Lengths):
        def step(self, episodes, completions):
            return steps

    ENVIRONMENTS.register("faulty")(Faulty)
    made, _, data = source(**{"rollout.environment": "faulty"})
    with pytest.raises(LimbeckError, match=f"The environment faulty {sentence}"):
        made.scorer.begin(data.examples, [0]).step({0: (1,)})


def test_a_run_whose_environment_returns_too_few_steps_loses_no_completed_step(configure, tmp_path):
    calls = iter(range(1000))

    class Short(Lengths):
        def step(self, episodes, completions):
            return super().step(episodes, completions)[next(calls) == 2 :]

    ENVIRONMENTS.register("short")(Short)
    with pytest.raises(LimbeckError, match=r"The environment short returned .* up to step 2, are saved"):
        DistillPipeline(configure(**{**SHORT, "rollout.environment": "short", "max_steps": 4})).run()
    assert (tmp_path / "out" / "checkpoint-2" / "manifest.json").is_file()


def test_an_environment_that_exits_does_not_end_the_run(source):
    class Exits(Lengths):
        def step(self, episodes, completions):
            raise SystemExit(3)

    ENVIRONMENTS.register("exits")(Exits)
    made, _, data = source(**{"rollout.environment": "exits"})
    (step,) = made.scorer.begin(data.examples, [0]).step({0: (1,)}).values()
    assert step.reward is None and step.reason == "error: SystemExit: 3"


def test_an_environment_that_hangs_does_not_hold_the_run(source, caplog):
    released, threads = threading.Event(), []

    class Hangs(Lengths):
        def reset(self, row):
            threads.append(threading.current_thread())
            if row["question"].startswith("What is 1 "):
                released.wait(60)
            return row["question"]

        def step(self, episodes, completions):
            if len(completions) > 1:
                released.wait(60)
            return [EnvironmentStep(reward=1.0)] * len(completions)

    ENVIRONMENTS.register("hangs")(Hangs)
    made, _, data = source(**{"rollout.environment": "hangs", "rollout.environment_seconds": 0.2})
    number = next(n for n in range(96) if data.examples.columns_of(n)["question"].startswith("What is 1 "))
    steps = []
    for rows_begun, stepped in (([0, number], [0, 1]), ([0, 0, 0], [0, 1]), ([0, 0, 0], [2])):
        steps += made.scorer.begin(data.examples, rows_begun).step(dict.fromkeys(stepped, (1,))).values()
    released.set()
    assert [(step.reward, step.reason) for step in steps] == [(None, "timeout")] * 4 + [(1.0, "")]
    assert caplog.text.count("took longer than rollout.environment_seconds") == 1
    assert len(set(threads)) == 3 and all(thread.daemon for thread in threads)
    made.close()
    threads[-1].join(60)


def test_an_environment_that_cannot_be_closed_is_left_behind(source, caplog):
    released = threading.Event()

    class Stays(Lengths):
        def __init__(self, hangs):
            self.hangs = hangs

        def close(self):
            if self.hangs:
                released.wait(60)
            raise ValueError("it is in use")

    ENVIRONMENTS.register("stays")(Stays)
    for hangs, reason in ((False, "ValueError: it is in use"), (True, "no result after 0.2 seconds")):
        kwargs = {"rollout.environment_kwargs": {"hangs": hangs}}
        source(**{"rollout.environment": "stays", "rollout.environment_seconds": 0.2, **kwargs})[0].close()
        assert f"The environment stays could not be closed ({reason})" in caplog.text
    released.set()


def test_an_environment_that_cannot_begin_is_named(source):
    class Faulty(Lengths):
        def reset(self, row):
            return row["solution"]

    ENVIRONMENTS.register("faulty")(Faulty)
    with pytest.raises(
        LimbeckError, match=r"rollout\.environment = faulty cannot use the training rows: KeyError: 'solution'"
    ):
        source(**{"rollout.environment": "faulty"})


def test_an_environment_that_takes_too_long_to_begin_is_named(source):
    released = threading.Event()

    class Slow(Lengths):
        def reset(self, row):
            released.wait(60)

    ENVIRONMENTS.register("slow")(Slow)
    with pytest.raises(
        LimbeckError, match=r"slow cannot use the training rows: .* 0\.1 seconds, which is rollout\.env"
    ):
        source(**{"rollout.environment": "slow", "rollout.environment_seconds": 0.1})
    released.set()


@pytest.mark.parametrize("error", [SystemExit(3), ValueError("3")])
def test_an_environment_that_cannot_be_made_is_named(source, error):
    def make():
        raise error

    ENVIRONMENTS.register("unmade")(make)
    with pytest.raises(
        LimbeckError,
        match=rf"rollout\.environment = unmade could not be made: {type(error).__name__}: 3\. Its arguments",
    ):
        source(**{"rollout.environment": "unmade"})


class Counting:
    """Replies with a number in each turn but the last."""

    turns: tuple = ()

    def reset(self, row):
        return {"turn": 0}

    def step(self, episodes, completions):
        found = []
        for episode in episodes:
            episode["turn"] += 1
            last = episode["turn"] == 3
            found.append(EnvironmentStep(None if last else f"result {episode['turn']}", reward=1.0 if last else 0.5))
        return found

    def close(self):
        pass


@pytest.mark.parametrize("max_turns", [1, 2, 4])
def test_only_the_tokens_that_the_student_wrote_are_supervised_in_all_turns(source, max_turns):
    ENVIRONMENTS.register("counting")(Counting)
    half = list(range(0, 300, 2))  # end a completion, so that most are short
    made, config, data = source(
        **{
            "rollout.environment": "counting",
            "rollout.max_turns": max_turns,
            "rollout.max_new_tokens": 40,
            "rollout.stop_token_ids": half,
            "sequence_length": 200,
        }
    )
    model = AutoModelForCausalLM.from_pretrained(config.student.model_args.model_name_or_path)
    made.weights_changed(lambda: iter(model.state_dict().items()), 0)
    questions = [NumberedPrompt(made._prompt(row), row, number) for row in (3, 1) for number in range(4)]
    turns = min(max_turns, 3)
    replies = "".join(f"<|tool|>result {turn}<|end|><|assistant|>" for turn in range(1, turns))
    lengths = set()
    for sample, question in zip(made.answers.write(questions, data.examples, "student", 0), questions, strict=True):
        assert (sample.reward, sample.reason) == (0.5 * turns + 0.5 * (turns == 3), "max_turns reached" * (turns < 3))
        written = sample.labels != IGNORE
        assert (sample.labels[written] == sample.tokens[1:][written[:-1]]).all()
        given = np.concatenate([[True], ~written[:-1]])  # which tokens the student did not write
        assert given[: len(question.tokens)].all()
        text = data.tokenizer.decode(sample.tokens[given][len(question.tokens) :])
        assert text.replace("<|end|><|tool|>", "<|tool|>") == replies
        assert (np.isfinite(sample.log_probs) == written).all()
        # The same log-probabilities as of one pass over the whole text.
        logits = model(torch.tensor(sample.tokens[None].astype(np.int64))).logits[0].log_softmax(-1)
        expected = logits[torch.tensor(written), torch.tensor(sample.labels[written].astype(np.int64))]
        torch.testing.assert_close(torch.tensor(sample.log_probs[written]), expected.detach(), rtol=0, atol=1e-4)
        lengths.add(int(written.sum()))
    assert len(lengths) > 1


def test_the_calculator_of_the_examples_trains(configure, tmp_path):
    plugin = Path(__file__).parents[2] / "examples" / "rollout" / "calculator.py"
    changes = {"rollout.environment": "calculator", "rollout.environment_kwargs.answer_key": "answer"}
    DistillPipeline(
        configure(**{**SHORT, **changes, "plugins": [str(plugin)], "rollout.max_turns": 3, "max_steps": 2})
    ).run()
    assert list(metric_by_step(tmp_path / "out", "rollout/reward")) == [1, 2]
