"""Ranks with any layout write, and then train on, what one process does."""

import importlib.util
from pathlib import Path

import pytest
import yaml
from ranks import run_on_ranks
from runs import metrics, rows
from tiny import make_model

from limbeck import DistillPipeline

SCRIPT = Path(__file__).parents[1] / "strategies" / "run_configurations.py"
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
CASES = {  # what one process and two ranks have in common, and what only two ranks have
    "tensor parallel": ({"rollout.max_staleness": 1}, {**rows(8), LAYOUT + "tensor_model_parallel_size": 2}),
    "context parallel": ({"student.use_sequence_packing": True}, {**rows(8), LAYOUT + "context_parallel_size": 2}),
    "pipeline parallel": ({}, {**rows(4, 2), LAYOUT + "pipeline_model_parallel_size": 2}),
    "FSDP2": ({"rollout.num_generations": 2, "rollout.temperature": 1.0}, rows(4)),
    "FSDP2 with adapters": (LORA, rows(4)),
    "FSDP2 with the student's average as the teacher": (AVERAGE, rows(4)),
    "FSDP2 in lockstep, validated": (VALIDATED, {**rows(4), **LOCKSTEP}),
    "context parallel with adapters, in lockstep": (LORA, {**rows(8), **LOCKSTEP, LAYOUT + "context_parallel_size": 2}),
    "ZeRO-3": ({}, {**rows(4), **ZERO}),
}


@pytest.mark.processes
def test_two_ranks_write_and_learn_what_one_process_does(configure, settings, tmp_path):
    tied = str(make_model(tmp_path / "tied", tie_word_embeddings=True))
    files, outputs = [], {}
    for i, (name, (common, changes)) in enumerate(CASES.items()):
        if name == "ZeRO-3" and importlib.util.find_spec("deepspeed") is None:
            continue
        both = {**WRITING, **common, "student_pretrain": tied}
        one, many = tmp_path / f"{i}-one", tmp_path / f"{i}-many"
        DistillPipeline(configure(**both, output_dir=str(one))).run()
        files.append(tmp_path / f"{i}.yaml")
        files[-1].write_text(yaml.safe_dump(settings(**both, **changes, output_dir=str(many))))
        outputs[name] = (one, many)
    run_on_ranks(2, str(SCRIPT), *map(str, files))
    for name, (one, many) in outputs.items():
        for key in ("train/loss", "rollout/mean_length", "rollout/on_policy_share", "student/grad_norm"):
            assert metrics(many, key) == pytest.approx(metrics(one, key), rel=1e-4), (name, key)
        if "validated" in name:
            assert metrics(many, "val/mean_length") == metrics(one, "val/mean_length") != []
        if "lockstep" in name:
            assert set(metrics(many, "time/weight_sync")) == {0.0}
        if "average" in name:  # the averages of two ranks go on in one process
            for folder in (one, many):
                more = {"max_steps": 3, "resume_from_checkpoint": True, "output_dir": str(folder)}
                DistillPipeline(configure(**WRITING | common | more, student_pretrain=tied)).run()
            assert metrics(many, "train/loss") == pytest.approx(metrics(one, "train/loss"), rel=1e-4)
