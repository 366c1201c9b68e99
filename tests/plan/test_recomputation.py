"""Unset, activation checkpointing is off where a step fits on the GPU without it, and on where it does not."""

import pytest
import torch
from runs import rows

from limbeck import DistillPipeline
from limbeck.plan.estimate import make_plan
from limbeck.plan.gpus import GPUS
from limbeck.plan.recomputation import choose_recomputation
from limbeck.strategies.world import World
from limbeck.train.build.student import recomputes_activations

ALONE = World(0, 1, torch.device("cpu"))
UNSET = {"student.model_args.disable_gradient_checkpointing": None, **rows(8, 1), "sequence_length": 64}


def needed(config):
    gpu = GPUS["H100"]
    return make_plan(config, 1, 1, gpu).needed / (1 - 0.08)


def test_activations_are_recomputed_only_where_they_do_not_fit(configure, capsys):
    config = configure(**UNSET)
    kept = choose_recomputation(config, ALONE, memory=80e9)
    assert not recomputes_activations(kept, "cuda")
    assert capsys.readouterr().err == ""
    limit = needed(kept)
    assert not recomputes_activations(choose_recomputation(config, ALONE, memory=1.01 * limit), "cuda")
    recomputed = choose_recomputation(config, ALONE, memory=0.99 * limit)
    assert recomputes_activations(recomputed, "cuda")
    assert (
        "activations are recomputed in the backward pass, because a step that keeps them needs"
        in capsys.readouterr().err
    )
    assert needed(recomputed) < limit


@pytest.mark.parametrize("disabled", [True, False])
def test_a_choice_in_the_configuration_stays(configure, disabled):
    config = configure(**{**UNSET, "student.model_args.disable_gradient_checkpointing": disabled})
    assert choose_recomputation(config, ALONE, memory=1.0) is config


def test_nothing_is_planned_on_a_cpu_and_memory_that_is_unknown_counts_as_too_little(configure, capsys):
    config = configure(**UNSET)
    assert choose_recomputation(config, ALONE) is config
    unknown = configure(**UNSET, objective_faults=["mean_of_micro_batches"])
    assert recomputes_activations(choose_recomputation(unknown, ALONE, memory=80e9), "cuda")
    assert "the memory of a step is unknown" in capsys.readouterr().err


def test_the_choice_is_what_runs(configure, tmp_path):
    """On a CPU with the memory of a small GPU: the layers of the student are checkpointed."""
    config, seen = configure(**UNSET, max_steps=1, eval_steps=0), []

    def adapt(config, world):
        seen.append(choose_recomputation(config, world, memory=1.0))
        return seen[-1]

    DistillPipeline(config, adapt).run()
    (adapted,) = seen
    assert recomputes_activations(adapted, "cpu")
