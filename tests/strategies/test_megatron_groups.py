"""Megatron in groups of workers: the student and the teacher in layouts of their own, on ranks of their own."""

import pytest
from runs import assert_same_weights, launch, metrics

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from strategies.megatron_runs import PP, TP, VPP_KEY, configuration, layout, needs_megatron


@needs_megatron
@pytest.mark.processes
@pytest.mark.workers
def test_a_teacher_on_ranks_of_its_own_gives_the_student_of_one_process(folder, tmp_path):
    pytest.importorskip("ray")
    changes = {"features.pairs": [], "max_steps": 3, "save_steps": 0, "eval_steps": 3}
    groups = {"student.device_mapping": [0, 1], "teacher.device_mapping": [2, 3]}
    interleaved = layout({PP: 2, VPP_KEY: 2}, {TP: 2})
    one, many = tmp_path / "one", tmp_path / "groups"
    printed = launch(configuration(folder, many, "llama", **changes, **groups, **interleaved), tmp_path, 1)
    assert "2 × student, 2 × teacher" in printed
    DistillPipeline(load_mapping(configuration(folder, one, "llama", **changes)).config).run()
    for key in ("train/loss", "train/train_distill_loss", "student/grad_norm", "val/loss"):
        assert metrics(many, key) == pytest.approx(metrics(one, key), rel=1e-5, abs=1e-5), key
    assert_same_weights(one / "student", many / "student", tolerance=1e-5)
