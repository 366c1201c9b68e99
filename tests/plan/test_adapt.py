"""Unset, activation checkpointing is off where a step fits on the GPU without it, and on where it does not.

The same holds for writing in lockstep, which needs no copy of the student's weights.
"""

from dataclasses import replace

import pytest
import torch
from runs import rows

from limbeck import DistillPipeline
from limbeck.plan.adapt import adapt
from limbeck.plan.copied_weights import with_copy
from limbeck.plan.estimate import RESERVED, make_plan
from limbeck.plan.gpus import GPUS
from limbeck.strategies.world import World
from limbeck.train.build.student import recomputes_activations, with_recomputation

ALONE = World(0, 1, torch.device("cpu"))
UNSET = {"student.model_args.disable_gradient_checkpointing": None, **rows(8, 1), "sequence_length": 64}

WRITING = {
    **rows(8, 1),
    "sequence_length": 64,
    "rollout.max_new_tokens": 4,
    "distill_loss_weight": 1.0,
    "compile_model": False,
}


def needed(config):
    gpu = GPUS["H100"]
    # Under `compile_model: auto` a run may be too short to be compiled.
    return make_plan(config, 1, 1, gpu, compiled=False).needed / (1 - 0.08)


def test_activations_are_recomputed_only_where_they_do_not_fit(configure, capsys):
    config = configure(**UNSET)
    kept = adapt(config, ALONE, memory=80e9)
    assert not recomputes_activations(kept, "cuda")
    assert capsys.readouterr().err == ""
    limit = needed(kept)
    assert not recomputes_activations(adapt(config, ALONE, memory=1.01 * limit), "cuda")
    recomputed = adapt(config, ALONE, memory=0.99 * limit)
    assert recomputes_activations(recomputed, "cuda")
    assert (
        "activations are recomputed in the backward pass, because a step that keeps them needs"
        in capsys.readouterr().err
    )
    assert needed(recomputed) < limit


@pytest.mark.parametrize("disabled", [True, False])
def test_a_choice_in_the_configuration_stays(configure, disabled):
    config = configure(**{**UNSET, "student.model_args.disable_gradient_checkpointing": disabled})
    assert adapt(config, ALONE, memory=1.0) is config


def test_nothing_is_planned_on_a_cpu_and_memory_that_is_unknown_counts_as_too_little(configure, capsys):
    config = configure(**UNSET)
    assert adapt(config, ALONE) is config
    unknown = configure(**UNSET, objective_faults=["mean_of_micro_batches"])
    assert recomputes_activations(adapt(unknown, ALONE, memory=80e9), "cuda")
    assert "needs memory of unknown size" in capsys.readouterr().err


def test_the_choice_is_what_runs(configure, tmp_path):
    """On a CPU with the memory of a small GPU: the layers of the student are checkpointed."""
    config, seen = configure(**UNSET, max_steps=1, eval_steps=0), []

    def adapt_to_small_gpus(config, world):
        seen.append(adapt(config, world, memory=1.0))
        return seen[-1]

    DistillPipeline(config, adapt_to_small_gpus).run()
    (adapted,) = seen
    assert recomputes_activations(adapted, "cpu")


def copied(config, memory: float):
    return adapt(config, ALONE, memory=memory).rollout.generator_kwargs.get("copy")


def test_the_student_writes_in_lockstep_only_where_a_copy_of_its_weights_does_not_fit(configure, capsys):
    config, on = configure(**WRITING), GPUS["H100"]
    plain = configure(**{**WRITING, "rollout.generator_kwargs": {"copy": False}})
    with_copy, without = make_plan(config, 1, 1, on), make_plan(plain, 1, 1, on)
    (group,) = with_copy.groups
    assert with_copy.needed - without.needed == group.step.peak["copy"] == 2 * group.step.parameters["student"]
    limit = with_copy.needed / (1 - RESERVED)
    assert copied(config, 1.01 * limit) is True
    assert capsys.readouterr().err == ""
    assert copied(config, 0.99 * limit) is False
    assert "writes in lockstep on all ranks, because a step beside a copy" in capsys.readouterr().err
    smaller = replace(on, memory=0.99 * limit)
    planned = make_plan(config, 1, 1, smaller)
    assert planned.needed == without.needed
    assert "so that the student writes in lockstep" in " ".join(planned.notices)


def test_recomputing_is_preferred_to_lockstep(configure):
    config = configure(**{**UNSET, **WRITING})
    limit = 1.01 * needed(with_recomputation(with_copy(config, copy=True), recompute=True))
    for memory, expected in ((limit, (True, True)), (1.0, (False, True))):
        chosen = adapt(config, ALONE, memory=memory)
        assert (chosen.rollout.generator_kwargs["copy"], recomputes_activations(chosen, "cuda")) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout.generator_kwargs": {"copy": True}},
        {"rollout.max_staleness": 1},
        {"student.strategy_args.strategy_config.tensor_model_parallel_size": 2},
        {"rollout.on_policy_fraction": 0.0},
    ],
    ids=str,
)
def test_where_lockstep_is_impossible_or_not_wanted_nothing_is_planned(configure, changes):
    config = configure(**{**WRITING, **changes})
    assert adapt(config, ALONE, memory=1.0) is config


def test_an_offloaded_copy_is_not_beside_activations(configure):
    config = configure(**WRITING, **{"rollout.offload": True})
    plain = configure(**{**WRITING, "rollout.generator_kwargs": {"copy": False}})
    gpu = GPUS["H100"]
    assert make_plan(config, 1, 1, gpu).needed == make_plan(plain, 1, 1, gpu).needed


def test_a_plan_names_prompts_of_the_teachers_own(configure):
    config = configure(**{"teacher.prompt.template": "{{ question }} {{ answer }}", "teacher.prompt.max_length": 99})
    assert "its own prompts of up to 99 tokens" in " ".join(make_plan(config, 1, 1, GPUS["H100"]).notices)
