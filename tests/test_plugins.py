"""Extensions from a file that ``plugins`` names, in a run that trains. Generators: ``rollout/test_generator.py``."""

import csv
from pathlib import Path

import pytest
import yaml
from runs import metrics

from limbeck import DistillPipeline
from limbeck.config import load_arguments, load_config
from limbeck.errors import LimbeckError
from limbeck.plan.estimate import make_plan
from limbeck.plan.gpus import find_gpu

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


@pytest.mark.slow
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
