"""megatron_train in float16: Megatron's scale of the loss, on CPUs."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import assert_same_weights, comparable, metrics, rows, training_state
from tiny import make_data, make_model
from transformers import AutoModelForCausalLM

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from limbeck.strategies.megatron.core import OptimizerTensors
from strategies.megatron_runs import layout, needs_megatron, run_ranks

HERE = Path(__file__).parent
PP, SHARDED = "pipeline_model_parallel_size", {"use_distributed_optimizer": True}
EXPERTS = {"kind": "qwen3_moe", "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def configuration(folder: Path, output: Path, student: dict | None, per_device: int = 2, **changes) -> dict:
    of_all = {
        **rows(per_device, 2),
        **({} if student is None else layout(student, {PP: 2})),
        "sequence_length": 64,
        "student.model_args.dtype": "fp16",
        "teacher.model_args.dtype": "fp16",
        "features.pairs": [["model.layers.0", "model.layers.1"], ["model.norm", "model.norm"]],
    }
    return comparable(folder, output, **{**of_all, **changes})


class Scaler:
    """Of Megatron's, what is read and written."""

    def __init__(self, scale: float, growth: int) -> None:
        self.state = {"scale": torch.tensor([scale]), "growth_tracker": growth, "hysteresis_tracker": 2}

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = dict(state)


@pytest.mark.parametrize("overflowed", [Scaler(4.0, 0), Scaler(8.0, 0)])
def test_optimizers_go_on_with_the_scale_of_the_one_that_overflowed(overflowed):
    grown, scalers = Scaler(16.0, 0) if overflowed.state["scale"] == 8 else Scaler(8.0, 3), []
    for order in ((grown, overflowed), (overflowed, grown)):
        scalers = [Scaler(0.0, 0), Scaler(0.0, 0)]
        for scaler, one in zip(scalers, order, strict=True):
            scaler.load_state_dict(one.state)
        optimizers = [SimpleNamespace(optimizer="adam", grad_scaler=scaler) for scaler in scalers]
        tensors = OptimizerTensors(SimpleNamespace(chained_optimizers=optimizers))
        tensors.join_scalers()
        assert scalers[0].state == scalers[1].state == overflowed.state
        assert tensors.read_scaler() == {**overflowed.state, "scale": overflowed.state["scale"].item()}


@needs_megatron
@pytest.mark.processes
@pytest.mark.workers
def test_float16_trains_as_with_fsdp2_and_resumes_exactly(tmp_path):
    for name, shape in {"": {}, "experts-": EXPERTS}.items():
        make_model(tmp_path / f"{name}student", **shape)
        make_model(tmp_path / f"{name}teacher", seed=1, **shape)
    make_data(tmp_path / "rows.jsonl", 64)
    expert = {f"{role}_pretrain": str(tmp_path / f"experts-{role}") for role in ("student", "teacher")}
    # Gradients that do not overflow at the first scale.
    expert |= {"features.pairs": [], "distill_loss_weight": 1.0, "kd_temperature": 4.0}
    begun = {"resume_from_checkpoint": str(tmp_path / "pp" / "checkpoint-2")}
    runs = {
        "pp": configuration(tmp_path, tmp_path / "pp", {PP: 2}),
        "again": configuration(tmp_path, tmp_path / "again", {PP: 2}, **begun),
        "ep": configuration(
            tmp_path, tmp_path / "ep", {"expert_model_parallel_size": 2, **SHARDED}, per_device=1, **expert
        ),
        # Gradients overflow from the first step on.
        "overflow": configuration(tmp_path, tmp_path / "overflow", {PP: 2}, **{"features.weight": 1e7, "max_steps": 2}),
    }
    run_ranks(2, {tmp_path / f"{name}.yaml": settings for name, settings in runs.items()})

    for name, changes in {"pp": {}, "ep": expert}.items():
        output = tmp_path / f"{name}-fsdp2"
        DistillPipeline(load_mapping(configuration(tmp_path, output, None, **changes)).config).run()
        # Rounding routes some tokens to other experts, so gradients of later steps differ even from those of float32.
        loss, norm = ((4, 1e-2), (1, 3e-2)) if name == "ep" else ((4, 1e-3), (4, 1e-2))
        compared = {"train/loss": loss, "student/grad_norm": norm}
        assert len(metrics(tmp_path / name, "student/grad_norm")) == 4, "no step overflowed"
        for key, (steps, tolerance) in compared.items():
            found, expected = (metrics(folder, key)[:steps] for folder in (tmp_path / name, output))
            assert found == pytest.approx(expected, rel=tolerance), name
    assert_same_weights(tmp_path / "pp" / "student", tmp_path / "again" / "student")  # exactly

    state = json.loads((tmp_path / "overflow" / "checkpoint-2" / "training" / "state.json").read_text())
    assert state["scaler"] == {"scale": 2.0**15, "growth_tracker": 0, "hysteresis_tracker": 0}
    started = AutoModelForCausalLM.from_pretrained(tmp_path / "student").state_dict()
    for key, master in training_state(tmp_path / "overflow" / "checkpoint-2", "masters").items():
        if key in started:
            torch.testing.assert_close(master, started[key].float(), rtol=0, atol=0)
