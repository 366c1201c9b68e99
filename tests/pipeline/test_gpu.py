"""The same run on a GPU. Nothing here runs without one."""

import json
from pathlib import Path

import pytest
import torch

from limbeck import DistillPipeline, OutputHead, fused_linear_distillation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_fused_loss_on_a_gpu_equals_the_cpus():
    torch.manual_seed(0)
    h_s, w_s, h_t, w_t = (torch.randn(*shape) for shape in ((300, 64), (1000, 64), (300, 96), (1000, 96)))
    labels = torch.randint(0, 1000, (300,))
    grads = []
    for device in ("cpu", "cuda"):
        hidden, weight = (x.detach().to(device).requires_grad_() for x in (h_s, w_s))
        loss = fused_linear_distillation(
            hidden, OutputHead(weight), h_t.to(device), w_t.to(device), labels.to(device), chunk_size=128
        ).loss
        grads.append([x.cpu() for x in torch.autograd.grad(loss * 2, (hidden, weight))])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_on_a_gpu_learns_and_measures_itself(configure, dtype):
    config = configure(
        max_steps=20, distill_loss_weight=1.0, **{"student.model_args.dtype": dtype, "teacher.model_args.dtype": dtype}
    )
    DistillPipeline(config).run()
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    divergences = [line["val/kd"] for line in lines if "val/kd" in line]
    assert divergences[-1] < divergences[0]
    train = next(line for line in lines if "train/loss" in line)
    assert train["time/student"] > 0
    assert 0 < train["system/peak_memory_gb"] < 10
