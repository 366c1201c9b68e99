"""megatron_train on GPUs: the losses of FSDP2, with local layers and with those of Transformer Engine."""

import importlib.util

import pytest
import torch
from runs import metrics, rows, train

from limbeck import DistillPipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs limbeck[megatron]"),
]
TP, PP, SP = "tensor_model_parallel_size", "pipeline_model_parallel_size", {"sequence_parallel": True}
SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
ENGINE = {"transformer_impl": "transformer_engine"}


def megatron(student: dict, teacher: dict) -> dict:
    return {
        "student.strategy_args.strategy_name": "megatron_train",
        "student.strategy_args.strategy_config": student,
        "teacher.strategy_args.strategy_name": "megatron_infer",
        "teacher.strategy_args.strategy_config": teacher,
    }


def losses(folder) -> list[float]:
    return metrics(folder, "train/loss")


@pytest.mark.parametrize(
    ("layers", "dtype", "tolerance"),
    [({}, "fp32", 1e-3), ({}, "bf16", 3e-2), ({}, "fp16", 1e-2), (ENGINE, "fp32", 1e-2), (ENGINE, "bf16", 3e-2)],
    ids=["local-fp32", "local-bf16", "local-fp16", "transformer_engine-fp32", "transformer_engine-bf16"],
)
def test_one_gpu_gives_the_losses_of_fsdp2(configure, tmp_path, layers, dtype, tolerance):
    if layers:
        pytest.importorskip("transformer_engine")
    precision = {"student.model_args.dtype": dtype, "teacher.model_args.dtype": dtype}
    found = []
    for name, strategy in (("one", {}), ("other", megatron(layers | SHARDED, layers))):
        DistillPipeline(configure(output_dir=str(tmp_path / name), **precision, **strategy)).run()
        found.append(losses(tmp_path / name))
    assert found[1] == pytest.approx(found[0], rel=tolerance)


@pytest.mark.parametrize("layers", [{}, ENGINE], ids=["local", "transformer_engine"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ({TP: 2, **SP, **SHARDED}, {PP: 2}),
        ({PP: 2}, {TP: 2, **SP}),
        (SHARDED, {TP: 2}),
        ({"context_parallel_size": 2}, {PP: 2}),
    ],
    ids=["tp", "pp", "dp", "cp"],
)
def test_two_gpus_give_the_losses_of_fsdp2_on_one(configure, settings, tmp_path, student, teacher, layers):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    if layers:
        pytest.importorskip("transformer_engine")
    DistillPipeline(configure(output_dir=str(tmp_path / "one"))).run()
    ranks = 2 if student is SHARDED else 1
    train(settings(**megatron(student | layers, teacher | layers), **rows(8 // ranks)), tmp_path, 2)
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "one"), rel=1e-2 if layers else 1e-3)
