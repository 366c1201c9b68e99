"""Unset, activation checkpointing is off where a step fits on the GPU without it, and on where it does not.

The same holds for writing in lockstep, which needs no copy of the student's weights.
"""

from dataclasses import replace

import pytest
import torch
from runs import rows

from limbeck import DistillPipeline
from limbeck.models import recomputes_activations
from limbeck.plan.adapt import adapt
from limbeck.plan.copied_weights import with_copy
from limbeck.plan.estimate import RESERVED, make_plan, refusal
from limbeck.plan.gpus import GPUS
from limbeck.plan.simulate import simulate
from limbeck.rollout import hf
from limbeck.rollout.kv_cache import SlotCache
from limbeck.strategies.world import World
from limbeck.train.build.student import with_recomputation

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


@pytest.mark.slow
def test_activations_are_recomputed_only_where_they_do_not_fit(configure, capsys):
    config = configure(**UNSET)
    limit = needed(with_recomputation(config, recompute=False))
    assert not recomputes_activations(adapt(config, ALONE, memory=1.01 * limit), "cuda")
    assert capsys.readouterr().err == ""
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_offloaded_copy_is_not_beside_activations(configure):
    config = configure(**WRITING, **{"rollout.offload": True})
    plain = configure(**{**WRITING, "rollout.generator_kwargs": {"copy": False}})
    gpu = GPUS["H100"]
    assert make_plan(config, 1, 1, gpu).needed == make_plan(plain, 1, 1, gpu).needed


WRITERS = {
    "student ahead": {"rollout.max_staleness": 1, "rollout.generator_kwargs": {"slots": 5}},
    "teacher": {"rollout.on_policy_fraction": 0.0, "rollout.off_policy": "teacher"},
    "validation": {
        "rollout.on_policy_fraction": 0.0,
        "rollout.environment": "exact",
        "eval_steps": 1,
        "validation.rollout.max_samples": 3,
        "validation.rollout.num_generations": 2,
    },
}


@pytest.mark.parametrize("changes", WRITERS.values(), ids=WRITERS)
def test_a_plan_counts_what_writing_holds_in_a_run(configure, monkeypatch, changes):
    several = {"rollout.num_generations": 2, "max_steps": 1, "eval_steps": 0}
    config = configure(**{**WRITING, **several, "rollout.max_new_tokens": 64, **changes})
    (step,) = simulate(config, 1, "cpu")
    caches, copies = [], set()
    monkeypatch.setattr(hf, "SlotCache", lambda *sizes: caches.append(SlotCache(*sizes)) or caches[-1])
    plain = hf.HfGenerator.update_weights

    def update_weights(generator, *args):
        plain(generator, *args)
        copies.add(sum(parameter.nbytes for parameter in generator.model.parameters()))

    monkeypatch.setattr(hf.HfGenerator, "update_weights", update_weights)
    DistillPipeline(config).run()
    assert step.most["cache"] == max(cache.nbytes for cache in caches)
    assert {step.most[tag] for tag in ("copy", "teacher copy") if tag in step.most} == copies


@pytest.mark.slow
def test_the_cache_is_beside_activations_only_if_the_student_writes_ahead(configure):
    both = {**WRITING, **rows(1, 64), "rollout.off_policy": "teacher", "rollout.on_policy_fraction": 0.5}
    plans = [
        make_plan(
            configure(**both, **changes, **{"rollout.generator_kwargs": {"copy": True, "slots": slots}}), 1, 1, small
        )
        for small, slots, changes in (
            (replace(GPUS["H100"], memory=1e5), 64, {}),
            (GPUS["H100"], 1, {"rollout.offload": True}),
            (GPUS["H100"], 1, {"rollout.max_staleness": 1}),
        )
    ]
    large, offloaded, ahead = (plan.groups[0].step for plan in plans)
    assert large.peak.keys() == {"parameters", "optimizer", "teacher", "copy", "teacher copy", "cache"}
    assert "most of it for cache" in str(refusal(plans[0])) and "rollout.generator_kwargs.slots" in str(
        refusal(plans[0])
    )
    assert not offloaded.peak.keys() & {"copy", "teacher copy", "cache"} and "activations" in offloaded.peak
    assert 64 * offloaded.most["cache"] == large.most["cache"] == large.peak["cache"]
    beside = {tag: ahead.peak[tag] for tag in ("copy", "teacher copy", "cache")}
    assert ahead.total - offloaded.total == sum(beside.values())
    assert (
        ahead.most["cache"] == beside["cache"] + offloaded.most["cache"]
    )  # the student's and the teacher's, which is larger


@pytest.mark.slow
def test_lockstep_for_the_sake_of_a_cache_names_slots(configure, capsys):
    many = {**rows(1, 256), "rollout.generator_kwargs": {"slots": 256}}
    assert copied(configure(**{**WRITING, **many}), 1.0) is False
    assert (
        "of which a cache of keys and values takes 0.0 GiB (rollout.generator_kwargs.slots)" in capsys.readouterr().err
    )


def test_a_plan_names_prompts_of_the_teachers_own(configure):
    config = configure(**{"teacher.prompt.template": "{{ question }} {{ answer }}", "teacher.prompt.max_length": 99})
    assert "its own prompts of up to 99 tokens" in " ".join(
        make_plan(config, 1, 1, GPUS["H100"], compiled=False).notices
    )
