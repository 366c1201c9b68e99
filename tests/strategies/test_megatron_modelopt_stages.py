"""A ModelOpt file with pairs on several stages trains: its defaults give way, and what the user sets does not."""

import pytest
from runs import assert_same_weights, metrics, rows

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from strategies.megatron_runs import LAYER, PP, VPP, configuration, layout, needs_megatron, run_ranks

FILE = {
    "intermediate_layer_pairs": [
        [f"{LAYER}{student}", f"{LAYER}{teacher}", "mse"] for student, teacher in ((0, 3), (3, 1))
    ],
    "skip_lm_loss": False,
    "kd_loss_scale": 3.0,
}


@needs_megatron
@pytest.mark.processes
@pytest.mark.workers
def test_modelopts_defaults_give_way_to_stages_and_what_is_set_does_not(folder, tmp_path):
    def settings(name: str, **changes) -> dict:
        of_all = {"max_steps": 2, "save_steps": 0, "eval_steps": 0, **rows(2, 4)}
        found = configuration(folder, tmp_path / name, "qwen3", **of_all, **changes)
        features = {key: value for key, value in found.pop("features").items() if key != "pairs"}
        return found | {"distillation_config": FILE, "features": features}

    runs = {
        "stages": settings("stages", **layout({PP: 2})),
        "interleaved": settings("interleaved", **layout(VPP)),
        "balanced": settings("balanced", loss_balance="modelopt", **layout({PP: 2})),
        "shared": settings("shared", **{"features.projection": "shared"}, **layout({PP: 2})),
    }
    output = run_ranks(2, {tmp_path / f"{name}.yaml": found for name, found in runs.items()})
    errors = {path.stem: path.read_text() for path in tmp_path.glob("*.error")}
    assert errors.keys() == {"balanced", "shared"}, errors
    assert "loss_balance = modelopt compares the size of all terms on the last" in errors["balanced"]
    assert "features.projection = shared is not built" in errors["shared"]
    # Both keys in two runs, and one key in the run that sets the other before it is refused.
    assert output.count("so weighted is used") == 3 and output.count("so per_pair is used") == 2
    chosen = {"loss_balance": "weighted", "features.projection": "per_pair"}
    config = load_mapping(settings("one", **chosen)).config
    assert (config.distill_loss_weight, config.features.weight) == (0.75, 0.75)
    DistillPipeline(config).run()
    for name in ("stages", "interleaved"):
        for key in ("train/loss", "train/features/total", "student/grad_norm"):
            expected = metrics(tmp_path / "one", key)
            assert metrics(tmp_path / name, key) == pytest.approx(expected, rel=1e-5, abs=1e-5), f"{name}: {key}"
        assert_same_weights(tmp_path / "one" / "student", tmp_path / name / "student", tolerance=1e-5)
