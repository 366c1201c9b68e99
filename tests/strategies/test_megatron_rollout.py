"""A student of Megatron writes, and then trains on, what one process does with FSDP2."""

import pytest
from runs import POLICY, metrics, rows

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from strategies.megatron_runs import PP, SP, TP, configuration, layout, needs_megatron, run_ranks

WRITING = {
    **POLICY,
    "features.pairs": [],
    "max_steps": 2,
    "save_steps": 0,
    "eval_steps": 0,
    "rollout.max_new_tokens": 6,
    "rollout.on_policy_fraction": 0.7,
    "student.training_args.weight_decay": 0.0,
    "teacher.strategy_args.strategy_name": "hf_infer",
}
REWARDED = {"kd_objective": "reverse_kl", "rollout.max_staleness": 1}  # the policy gradient has the rewards only
CASES = {
    "tensor parallel": ({}, {TP: 2, **SP}, rows(8)),
    "pipeline parallel": (REWARDED, {PP: 2}, rows(2, 4)),
}


@needs_megatron
@pytest.mark.processes
@pytest.mark.workers
def test_ranks_of_megatron_write_and_learn_what_one_process_does(folder, tmp_path):
    outputs, files = {}, {}
    for name, (objective, sizes, batch) in CASES.items():
        outputs[name] = one, many = tmp_path / f"{name} one", tmp_path / f"{name} many"
        common = {**WRITING, **objective}
        DistillPipeline(load_mapping(configuration(folder, one, "qwen3", **common, **rows(8))).config).run()
        megatron = layout(sizes)
        megatron["plugins"] = megatron["plugins"] + POLICY["plugins"]
        files[tmp_path / f"{name}.yaml"] = configuration(folder, many, "qwen3", **common | batch | megatron)
    run_ranks(2, files)
    assert [path.read_text() for path in tmp_path.glob("*.error")] == []
    wrong = []
    for name, (one, many) in outputs.items():
        assert 0 < min(metrics(one, "rollout/reward")) < 1
        for key in ("train/loss", "train/policy_loss", "rollout/reward", "rollout/mean_length", "student/grad_norm"):
            if metrics(many, key) != pytest.approx(metrics(one, key), rel=1e-4):
                wrong.append((name, key, metrics(one, key), metrics(many, key)))
    assert wrong == []
