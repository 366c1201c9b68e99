"""Every kind of extension, from a file that ``plugins`` names, in a run that trains."""

import csv
from pathlib import Path

import pytest
import torch
import yaml
from runs import metrics, weights

from limbeck import DistillPipeline, registry
from limbeck.config import load_arguments, load_config
from limbeck.data.batch import Batch, StepBatch
from limbeck.data.masks import IGNORE
from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, load_model
from limbeck.plan.estimate import make_plan
from limbeck.plan.gpus import find_gpu
from limbeck.rollout import Prompt, SamplingParams

PLUGINS = Path(__file__).parent.parent / "examples" / "plugins"


@pytest.fixture
def trains(configure):
    """Run a configuration with a plug-in and check that the student came closer to the teacher."""

    def run(plugin: str, **changes):
        config = configure(plugins=[str(PLUGINS / f"{plugin}.py")], max_steps=12, eval_steps=6, **changes)
        DistillPipeline(config).run()
        losses = metrics(Path(config.output_dir), "val/loss")
        assert losses[-1] < losses[0]
        return config

    return run


@pytest.mark.parametrize("path", sorted(PLUGINS.glob("*.py")), ids=lambda path: path.stem)
def test_a_plugin_example_is_at_most_forty_lines(path):
    code = [line for line in path.read_text().splitlines() if line.strip()]
    assert len(code) <= 40


def test_a_divergence(trains):
    trains("divergence", kd_objective="squared_hellinger", distill_loss_weight=1.0)


def test_a_strategy(trains):
    name = "student.strategy_args.strategy_name"
    trains("strategy", **{name: "sgd_train", "student.training_args.learning_rate": 0.05})


def test_a_strategy_without_simulate_cannot_be_planned(configure):
    name = "student.strategy_args.strategy_name"
    config = configure(plugins=[str(PLUGINS / "strategy.py")], **{name: "sgd_train"})
    with pytest.raises(LimbeckError, match="sgd_train has no method simulate"):
        make_plan(config, 1, 1, find_gpu("H100"))


def test_a_teacher_gives_the_losses_of_the_one_that_it_wraps(trains, configure, tmp_path):
    whole = {"student.training_args.per_device_train_batch_size": 96}  # every step has the same rows
    config = trains("teacher", **{"teacher.source": "memory_cache"}, **whole)
    plain = configure(max_steps=12, eval_steps=6, output_dir=str(tmp_path / "plain"), **whole)
    DistillPipeline(plain).run()
    key = "train/train_distill_loss"
    assert metrics(Path(config.output_dir), key) == metrics(Path(plain.output_dir), key)
    assert metrics(Path(config.output_dir), "teacher/cache_hits")[-1] > 0


def test_a_step_source(trains):
    config = trains("step_source", step_source="shortest_first")
    tokens = metrics(Path(config.output_dir), "train/tokens")
    assert len(tokens) == 12 and tokens == sorted(tokens)  # one epoch of 96 rows in 12 steps


def test_a_tracker(trains):
    config = trains("tracker", track_with="csv", tracker_kwargs={"file": "numbers.csv"})
    rows = list(csv.reader((config.log_dir / "numbers.csv").open()))
    assert [float(value) for _, name, value in rows if name == "train/loss"] == metrics(
        Path(config.output_dir), "train/loss"
    )


def test_a_dialect_from_a_file_and_from_flags(assets, tmp_path):
    given = {"big": str(assets / "teacher"), "small": str(assets / "student"), "rows": str(assets / "rows.jsonl")}
    given |= {"heat": 2.0, "steps": 2, "out": str(tmp_path / "out")}
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump({**given, "plugins": [str(PLUGINS / "dialect.py")]}))
    loaded = load_config(file)
    assert loaded.dialect == "toykd" and loaded.origins["kd_temperature"].startswith("derived from heat")
    flags = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    assert load_arguments(flags).config.kd_temperature == 2.0
    assert DistillPipeline(loaded.config).run().step == 2


class WrittenRows:
    """A step source for the test of a generator: the student writes the rows of every step."""

    max_lookahead, steps_per_epoch = 0, None

    def __init__(self, config, world, data):
        self.generator = registry.GENERATORS.get("greedy")(config, world)
        self.examples, self.versions = data.examples, []

    def next(self, step):
        assert self.generator.version == step  # the weights of the step before
        self.versions.append(step)
        prompts = [Prompt(tuple(self.examples.row(row)[0][:6].tolist()), row) for row in range(step, step + 4)]
        rows = []
        for completion in self.generator.generate(prompts, SamplingParams(max_tokens=4)):
            ids = torch.tensor([[*completion.prompt.token_ids, *completion.token_ids]])
            labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORE)
            labels[:, : len(completion.prompt.token_ids) - 1] = IGNORE
            rows.append(Batch.of(ids, labels, None, ids.numel()))
        return StepBatch.of(rows)

    def weights_changed(self, weights, step):
        self.generator.update_weights(weights(), step)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        """A step is a function of its number and the weights."""

    def close(self):
        """There is no background work."""


def test_a_generator_writes_with_the_weights_of_the_last_step(configure, monkeypatch):
    sources = []

    def make(config, world, data):
        sources.append(WrittenRows(config, world, data))
        return sources[-1]

    monkeypatch.setitem(registry.STEP_SOURCES._registered, "written", make)
    config = configure(
        plugins=[str(PLUGINS / "generator.py")], step_source="written", distill_loss_weight=1.0, max_steps=4,
        save_steps=0,
    )  # fmt: skip
    result = DistillPipeline(config).run()
    assert sources[0].versions == [0, 1, 2, 3]
    saved = weights(result.student)
    written = dict(sources[0].generator.model.state_dict())
    for name, tensor in saved.items():
        torch.testing.assert_close(written[name], tensor)
    start = load_model(ModelSource.from_args(config.student.model_args, "student"), torch.float32).state_dict()
    assert any(not torch.equal(start[name], tensor) for name, tensor in saved.items())
