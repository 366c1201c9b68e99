"""Signals and transport of a teacher in other processes, and offloading."""

from __future__ import annotations

import re

import pytest

from limbeck.errors import LimbeckError
from limbeck.registry import TEACHERS

APART = """
student_pretrain: a
teacher_pretrain: b
student: {data_args: {file_name: x.jsonl}, device_mapping: [0]}
teacher: {device_mapping: [1]}
"""
SAMPLED = ["rollout={}", "distill_loss_weight=1"]


@pytest.mark.parametrize(
    ("changes", "signal"),
    [
        ([], "hidden_states"),
        (["logits_topk=8"], "top_k"),
        (["logits_topk=8", "teacher.signal=hidden_states"], "hidden_states"),
        (["logits_topk=8", "objective_faults=[unshifted_mask]"], "hidden_states"),
        (["teacher.signal=logits"], "logits"),
        ([*SAMPLED, "kd_objective=k2"], "sampled_token"),
        ([*SAMPLED, "kd_objective=k3", "teacher.signal=hidden_states"], "hidden_states"),
    ],
)
def test_the_signal_of_a_teacher_in_other_processes_follows_from_the_objective(load, changes, signal):
    assert load(*changes, yaml=APART).config.teacher_signal == signal


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["teacher.signal=top_k"], "teacher.signal = top_k needs a number of tokens; set logits_topk"),
        (
            ["teacher.signal=logits", "cross_tokenizer=hybrid"],
            "teacher.signal = logits cannot be combined with cross_tokenizer, which needs hidden states; use hidden_states",
        ),
        (["teacher.signal=sampled_token"], "kd_objective = forward_kl needs a distribution; use hidden_states"),
        ([*SAMPLED, "kd_objective=k2", "logits_topk=4"], "cannot be combined with logits_topk"),
        ([*SAMPLED, "kd_objective=k1"], "kd_objective = k1 has an expected gradient of 0 as a loss; use k2"),
        (["kd_objective=k3"], "kd_objective = k3 needs tokens that the student has sampled; add rollout"),
        (["logits_transfer_backend=gloo", "teacher.service=judge"], "a teacher.service outlives runs; use ray"),
        (["logits_transfer_backend=nccl"], "logits_transfer_backend"),
    ],
)
def test_signals_that_cannot_be_sent_are_refused(load, changes, sentence):
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        load(*changes, yaml=APART)


def test_offloading_needs_devices_that_both_roles_share(load):
    assert not load("is_offload_states=true", yaml=APART).config.offloads_colocated
    both = ["is_offload_states=true", "teacher.device_mapping=[0]"]
    assert load(*both, yaml=APART).config.offloads_colocated
    stage = "teacher.strategy_args.strategy_config.deepspeed.zero_optimization.stage=3"
    assert not load(
        *both, "teacher.strategy_args.strategy_name=deepspeed_infer", stage, yaml=APART
    ).config.offloads_colocated


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["teacher.source=model"], "teacher.source = model contradicts teacher.service or teacher.device_mapping"),
        (
            ["teacher.source=ray", "teacher.device_mapping=[0]"],
            "teacher.source = ray needs a teacher in other processes",
        ),
        (["teacher.source_kwargs={url: x}"], "teacher.source_kwargs.url is not read by teacher.source = auto"),
        (["step_source_kwargs={a: 1}"], "step_source_kwargs.a is not read by step_source = dataset"),
    ],
)
def test_sources_that_contradict_the_devices_are_an_error(load, changes, sentence):
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        load(*changes, yaml=APART)


def test_the_default_teacher_source_follows_from_the_devices(load):
    assert load(yaml=APART).config.teacher_source == "ray"
    assert load("teacher.device_mapping=[0]", yaml=APART).config.teacher_source == "model"


def test_the_former_name_of_offload_interval_is_accepted(load):
    keys = ["is_offload_states=true", "teacher.device_mapping=[0]"]
    loaded = load(*keys, "steps_per_turn=3", yaml=APART)
    assert loaded.config.offload_interval == 3
    assert loaded.origins["offload_interval"] == "derived from steps_per_turn (command line)"
    assert loaded.notices == []
    with pytest.raises(LimbeckError, match="steps_per_turn = 3 contradicts offload_interval = 4"):
        load(*keys, "steps_per_turn=3", "offload_interval=4", yaml=APART)


def test_only_a_model_in_the_students_processes_ignores_the_signal(load):
    TEACHERS.register("mine")(lambda context: None)
    notices = load("teacher.signal=logits", "teacher.device_mapping=[0]", yaml=APART).notices
    assert notices == [
        "command line: teacher.signal has no effect: it is only read by a teacher in other processes; this one is in the "
        "student's processes."
    ]
    assert not load("teacher.signal=logits", yaml=APART).notices
    assert not load("teacher.signal=logits", "teacher.source=mine", "teacher.device_mapping=[0]", yaml=APART).notices
