"""Ranks with any layout write, and then train on, what one process does."""

import importlib.util

import pytest
from runs import POLICY, metrics, rows, train
from tiny import make_model

from limbeck import DistillPipeline

LAYOUT = "student.strategy_args.strategy_config."
WRITING = {
    "distill_loss_weight": 1.0,
    "rollout.max_new_tokens": 6,
    "rollout.temperature": 0.0,
    "rollout.on_policy_fraction": 0.7,
    "student.training_args.adam_epsilon": 1e-4,  # else the rounding of gradients near 0 grows to whole steps
    "teacher.strategy_args.strategy_name": "hf_infer",
    "max_steps": 2,
    "eval_steps": 0,
    "save_steps": 0,
}
LORA = {"student.model_args.lora_target": "all-linear", "student.model_args.lora_rank": 2}
ZERO = {
    "student.strategy_args.strategy_name": "deepspeed_train",
    "student.strategy_args.strategy_config": {"zero_optimization": {"stage": 3}},
}
LOCKSTEP = {"rollout.generator_kwargs": {"copy": False, "slots": 3}}
VALIDATED = {  # by writing, before the first step too
    "rollout.temperature": 1.0,
    "rollout.environment": "exact",
    "rollout.environment_kwargs": {"answer_key": "answer"},
    "eval_steps": 1,
    "validation.at_start": True,
    "validation.rollout.max_samples": 3,
}
AVERAGE = {
    "teacher_pretrain": None,
    "teacher.source": "student_average",
    "teacher.source_kwargs": {"decay": 0.6},
    "teacher.strategy_args.strategy_name": "fsdp2_infer",
}
K3 = {"kd_objective": "k3", "kd_temperature": 2.0, "rollout.temperature": 1.0, "rollout.on_policy_fraction": 1.0}
STUDENTS_TOPK = {"kd_objective": "reverse_kl", "logits_topk": 4, "topk_from": "student", "logits_topk_tail": "bucket"}
CASES = {  # what one process and two ranks have in common, and what only two ranks have
    "tensor parallel": (
        {**STUDENTS_TOPK, "rollout.max_staleness": 1},
        {**rows(8), LAYOUT + "tensor_model_parallel_size": 2},
    ),
    "context parallel": (
        {**POLICY, "student.use_sequence_packing": True},
        {**rows(8), LAYOUT + "context_parallel_size": 2},
    ),
    "pipeline parallel": (POLICY, {**rows(4, 2), LAYOUT + "pipeline_model_parallel_size": 2}),
    "FSDP2": ({**K3, "rollout.num_generations": 2}, rows(4)),
    "FSDP2 with adapters": (LORA, rows(4)),
    "FSDP2 with the student's average as the teacher": (AVERAGE, rows(4)),
    "FSDP2 in lockstep, validated": (VALIDATED, {**rows(4), **LOCKSTEP}),
    "context parallel with adapters, in lockstep": (LORA, {**rows(8), **LOCKSTEP, LAYOUT + "context_parallel_size": 2}),
    "ZeRO-3": (POLICY, {**rows(4), **ZERO}),
}


@pytest.mark.processes
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_write_and_learn_what_one_process_does(configure, settings, tmp_path, case):
    if case == "ZeRO-3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    common, changes = CASES[case]
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    both = {**WRITING, **common, "student_pretrain": str(tied)}
    one, many = tmp_path / "one", tmp_path / "many"
    DistillPipeline(configure(**both, output_dir=str(one))).run()
    train(settings(**both, **changes, output_dir=str(many)), tmp_path, 2)
    keys = ["train/loss", "rollout/mean_length", "rollout/on_policy_share", "student/grad_norm"]
    if "rollout.reward_weight" in common:
        assert 0 < min(metrics(one, "rollout/reward")) < 1
        keys += ["rollout/reward", "train/policy_loss"]
    if case == "FSDP2 in lockstep, validated":
        keys.append("val/mean_length")
    for key in keys:
        assert metrics(many, key) == pytest.approx(metrics(one, key), rel=1e-4) != [], key
    if "lockstep" in case:
        assert set(metrics(many, "time/weight_sync")) == {0.0}
    if common is AVERAGE:  # the averages of two ranks go on in one process
        for folder in (one, many):
            more = {"max_steps": 3, "resume_from_checkpoint": True, "output_dir": str(folder)}
            DistillPipeline(configure(**both | more)).run()
        assert metrics(many, "train/loss") == pytest.approx(metrics(one, "train/loss"), rel=1e-4)
