"""A generator that fails ends the run with a checkpoint of the last completed step, from which it resumes exactly."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from ranks import run_on_ranks
from runs import assert_same_weights, metrics, rows

from limbeck import DistillPipeline, LimbeckError
from limbeck.registry import GENERATORS
from limbeck.rollout.hf import make_generator

SCRIPT = Path(__file__).parents[1] / "strategies" / "run_configurations.py"
GREEDY = {
    "distill_loss_weight": 1.0,
    "rollout.max_new_tokens": 6,
    "rollout.temperature": 0.0,
    "eval_steps": 0,
    "save_steps": 0,
}


@pytest.fixture(autouse=True)
def _own_generators(_only_built_in_extensions):
    """The generators of a test end with it."""


DEATHS = [  # the layout, the method that raises, in which call, what, and the last completed step
    ({}, "_decode", 20, ZeroDivisionError, 3),
    ({"rollout.max_staleness": 1}, "_decode", 20, ZeroDivisionError, 2),
    ({}, "generate", 3, torch.OutOfMemoryError, 3),
    ({}, "update_weights", 3, ZeroDivisionError, 3),
    ({"rollout.max_staleness": 1}, "update_weights", 3, torch.OutOfMemoryError, 3),
    ({"rollout.offload": True}, "reload", 3, ZeroDivisionError, 3),
    ({"rollout.offload": True}, "offload", 3, ZeroDivisionError, 3),
]


@pytest.mark.parametrize(("layout", "method", "call", "error", "completed"), DEATHS)
@pytest.mark.slow
def test_a_run_whose_generator_dies_loses_no_completed_step(
    configure, tmp_path, layout, method, call, error, completed
):
    calls = iter(range(1000))

    def make_mortal(config, world):
        generator = make_generator(config, world)
        living = getattr(generator, method)

        def mortal(*args):
            if next(calls) == call:
                raise error("the end")
            return living(*args)

        setattr(generator, method, mortal)
        return generator

    GENERATORS.register("mortal")(make_mortal)
    common = {**GREEDY, **layout, "rollout.on_policy_fraction": 0.8, "rollout.generator": "mortal", "max_steps": 5}
    with pytest.raises(
        LimbeckError,
        match=rf"mortal .*: {error.__name__}: the end \(.*py:\d+\).* up to step {completed}, are saved",
    ):
        DistillPipeline(configure(**common)).run()
    assert (tmp_path / "out" / f"checkpoint-{completed}").is_dir()
    parts = DistillPipeline(configure(**common, resume_from_checkpoint=True)).run()
    whole = DistillPipeline(configure(**common, output_dir=str(tmp_path / "whole"))).run()
    assert_same_weights(whole.student, parts.student)


def test_a_run_whose_generator_dies_in_a_validation_repeats_it_when_it_resumes(configure, tmp_path):
    deaths = [2]  # the step whose weights are not loaded

    def make_mortal(config, world):
        generator = make_generator(config, world)
        load = generator.update_weights

        def update_weights(weights, version):
            if version in deaths:
                deaths.remove(version)
                raise ZeroDivisionError
            load(weights, version)

        generator.update_weights = update_weights
        return generator

    GENERATORS.register("mortal")(make_mortal)
    adaptive = {"shape": "adaptive", "start": 0.3, "increment": 0.3, "tolerance": -9.0}
    common = {
        **GREEDY,
        "rollout.generator": "mortal",
        "rollout.on_policy_fraction": adaptive,
        "rollout.environment": "exact",
        "validation.at_start": True,
        "validation.rollout.max_samples": 3,
        "max_steps": 4,
        "eval_steps": 2,
    }
    with pytest.raises(LimbeckError, match=r"could not load the weights of step 2: .* up to step 2, are saved"):
        DistillPipeline(configure(**common)).run()
    parts = DistillPipeline(configure(**common, resume_from_checkpoint=True)).run()
    whole = DistillPipeline(configure(**common, output_dir=str(tmp_path / "whole"))).run()
    assert_same_weights(whole.student, parts.student)
    for key in ("val/ce", "val/mean_length", "rollout/adaptive_share"):
        assert metrics(tmp_path / "out", key) == metrics(tmp_path / "whole", key) != []


MORTAL = """
from pathlib import Path
from limbeck.registry import GENERATORS
from limbeck.rollout.hf import LockstepGenerator, make_generator
from limbeck.rollout.student import student_outline

@GENERATORS.register("mortal_on_one_rank")
def make(config, world):
    method, calls = Path(config.output_dir).name, []
    in_lockstep = method == "_decode"
    generator = LockstepGenerator(*student_outline(config, world), world) if in_lockstep else make_generator(config, world)
    living = getattr(generator, method, None)

    def mortal(*args):
        calls.append(args)
        return 1 / 0 if len(calls) == (9 if in_lockstep else 3) else living(*args)

    if world.rank == 1 and living is not None and not config.resume_from_checkpoint:
        setattr(generator, method, mortal)
    return generator
"""


FAILURES = {  # the method that raises on one rank, and what the generator did; the last one writes in lockstep
    "update_weights": "could not load the weights of step 2",
    "generate": "failed while it wrote",
    "_decode": "failed while it wrote",
}


@pytest.mark.processes
def test_ranks_save_together_when_the_generator_of_one_fails(settings, tmp_path):
    plugin = tmp_path / "mortal.py"
    plugin.write_text(MORTAL)
    common = {**GREEDY, **rows(4), "plugins": [str(plugin)], "rollout.generator": "mortal_on_one_rank", "max_steps": 3}
    files = []
    for name in ("whole", *FAILURES):
        for resume in (False, True)[: 1 + (name in FAILURES)]:
            files.append(tmp_path / f"{name}-{resume}.yaml")
            changes = {"output_dir": str(tmp_path / name), "resume_from_checkpoint": resume}
            files[-1].write_text(yaml.safe_dump(settings(**common, **changes)))
    run_on_ranks(2, str(SCRIPT), *map(str, files))
    for name, what in FAILURES.items():
        error = (tmp_path / f"{name}-False.error").read_text()
        assert f"mortal_on_one_rank {what}: ZeroDivisionError: " in error
        assert re.search(r"The steps before, up to step \d, are saved", error)
        assert not (tmp_path / f"{name}-True.error").exists()
        assert_same_weights(*(tmp_path / one / "checkpoint-3" for one in ("whole", name)))
