"""What a teacher elsewhere sends, how, and when it has the devices: what the keys decide and what they refuse."""

from __future__ import annotations

import re

import pytest

from limbeck.errors import LimbeckError

APART = """
student_pretrain: a
teacher_pretrain: b
student: {data_args: {file_name: x.jsonl}, device_mapping: [0]}
teacher: {device_mapping: [1]}
"""


@pytest.mark.parametrize(
    ("changes", "signal"),
    [
        ([], "hidden_states"),
        (["logits_topk=8"], "top_k"),
        (["logits_topk=8", "teacher.signal=hidden_states"], "hidden_states"),
        (["logits_topk=8", "objective_faults=[unshifted_mask]"], "hidden_states"),
        (["teacher.signal=logits"], "logits"),
    ],
)
def test_what_a_teacher_elsewhere_sends_follows_from_the_objective(load, changes, signal):
    assert load(*changes, yaml=APART).config.teacher_signal == signal


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["teacher.signal=top_k"], "teacher.signal = top_k needs the number of tokens; set logits_topk"),
        (
            ["teacher.signal=logits", "cross_tokenizer=hybrid"],
            "teacher.signal = logits does not go with cross_tokenizer, which needs hidden states; use hidden_states",
        ),
        (["logits_transfer_backend=gloo", "teacher.service=judge"], "a teacher.service outlives runs; use ray"),
        (["logits_transfer_backend=nccl"], "logits_transfer_backend"),
    ],
)
def test_signals_that_cannot_be_sent_are_refused(load, changes, sentence):
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        load(*changes, yaml=APART)


def test_turns_need_devices_that_both_roles_have(load):
    assert not load("is_offload_states=true", yaml=APART).config.offloads_colocated
    both = ["is_offload_states=true", "teacher.device_mapping=[0]"]
    assert load(*both, yaml=APART).config.offloads_colocated
    stage = "teacher.strategy_args.strategy_config.deepspeed.zero_optimization.stage=3"
    assert not load(
        *both, "teacher.strategy_args.strategy_name=deepspeed_infer", stage, yaml=APART
    ).config.offloads_colocated
