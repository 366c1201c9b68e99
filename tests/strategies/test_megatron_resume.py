"""A run of Megatron that is killed while it writes a checkpoint resumes from the one before."""

import shutil
from pathlib import Path

import pytest
from runs import assert_same_weights, metric_by_step, rows

from strategies.megatron_runs import EP, LAYER, PP, SHARDED, SP, TP, configuration, layout, needs_megatron, run_ranks

EXPERTS = {EP: 2, **SHARDED}
PAIRS = {"features.pairs": [[f"{LAYER}0.mlp", f"{LAYER}3.mlp", "mse"], [f"{LAYER}3", f"{LAYER}1.mlp"]]}


@needs_megatron
@pytest.mark.processes
@pytest.mark.workers
def test_a_run_killed_inside_a_save_resumes_exactly_and_close_with_other_sizes(folder, tmp_path):
    def settings(name: str, sizes: dict, micro_batches: int, **changes) -> dict:
        changes |= {"save_steps": 2, "eval_steps": 0, **PAIRS, **rows(2, micro_batches), **layout(sizes)}
        return configuration(folder, tmp_path / name, "qwen3_moe", **changes)

    killed = settings("killed", EXPERTS, 2)
    killed["plugins"].append(str(Path(__file__).with_name("kill_in_save.py")))
    whole = {tmp_path / "whole.yaml": settings("whole", EXPERTS, 2), tmp_path / "killed.yaml": killed}
    run_ranks(2, whole, killed=True)
    assert (tmp_path / "whole" / "checkpoint-8").exists()
    # Each of the ranks writes about half of the state.
    for kind in ("masters", "optimizer"):
        files = list((tmp_path / "whole" / "checkpoint-8" / "training").glob(f"{kind}-*.safetensors"))
        small, large = sorted(path.stat().st_size for path in files)
        assert small > 0.7 * large, kind
    assert {path.name for path in (tmp_path / "killed").glob("*checkpoint-*")} == {
        "checkpoint-2", "checkpoint-4", ".checkpoint-6.writing",
    }  # fmt: skip
    layouts = {"killed": (EXPERTS, 2), "sliced": ({TP: 2, **SP}, 4), "staged": ({PP: 2}, 4)}
    for name in ("sliced", "staged"):
        shutil.copytree(tmp_path / "killed", tmp_path / name, symlinks=True)
    resumed = {
        tmp_path / f"{name}-resumed.yaml": settings(name, *layout, resume_from_checkpoint=True)
        for name, layout in layouts.items()
    }
    assert run_ranks(2, resumed).count("checkpoint-4") >= 3
    assert_same_weights(tmp_path / "whole" / "student", tmp_path / "killed" / "student")  # exactly
    for name in layouts:
        assert not (tmp_path / name / ".checkpoint-6.writing").exists()
        for key in ("train/loss", "train/features/total", "student/grad_norm"):
            losses = metric_by_step(tmp_path / name, key)
            assert losses == pytest.approx(metric_by_step(tmp_path / "whole", key), rel=1e-5, abs=1e-5), (
                f"{name}: {key}"
            )
        assert_same_weights(tmp_path / "whole" / "student", tmp_path / name / "student", tolerance=1e-5)
