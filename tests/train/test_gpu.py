"""Runs on GPUs. All tests need a GPU."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import launch, metrics, rows
from strategies.engines import train_step

from limbeck import DistillPipeline, OutputHead, fused_linear_distillation
from limbeck.strategies.torch_engine import TorchEngine
from limbeck.strategies.world import World

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_fused_loss_on_a_gpu_equals_that_on_a_cpu():
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
def test_a_run_on_a_gpu_trains_and_reports_metrics(configure, dtype):
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


class Root(torch.nn.Module):
    """Large enough that the allocator's rounding does not matter; the loss is the mean square of the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 64))

    def forward(self, inputs: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.model(inputs).square().mean())


def test_offloading_and_reloading_a_student_does_not_change_its_training():
    def train(leaves: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        root = Root().cuda()
        engine = TorchEngine(root, torch.optim.AdamW(root.parameters()), World(0, 1, torch.device("cuda")))
        for _ in range(3):
            train_step(engine, torch.ones(8, 64, device="cuda"))
            if leaves:
                held = torch.cuda.memory_allocated()
                engine.offload()
                assert torch.cuda.memory_allocated() < held - 3 * sum(p.nbytes for p in root.parameters()) * 0.9
                engine.reload()
        return [p.detach().cpu() for p in root.parameters()]

    for stayed, left in zip(train(False), train(True), strict=True):
        assert torch.equal(stayed, left)


@pytest.mark.parametrize(
    ("gpus", "stage", "offload"), [(1, 2, ["optimizer"]), (1, 3, ["optimizer", "param"]), (2, 2, []), (2, 3, [])]
)
def test_deepspeed_gives_the_losses_of_fsdp2(configure, settings, tmp_path, gpus, stage, offload):
    pytest.importorskip("deepspeed")
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    optimization = {"stage": stage, **{f"offload_{what}": {"device": "cpu"} for what in offload}}
    block = {
        "student.strategy_args.strategy_name": "deepspeed_train",
        "student.strategy_args.strategy_config": {"zero_optimization": optimization},
    }
    DistillPipeline(configure(output_dir=str(tmp_path / "one"))).run()
    launch(settings(**block, **rows(8 // gpus)), tmp_path, gpus)
    for key in ("train/loss", "train/train_distill_loss", "student/grad_norm", "val/loss"):
        assert metrics(tmp_path / "out", key) == pytest.approx(metrics(tmp_path / "one", key), rel=1e-4), key


@pytest.mark.parametrize(
    ("gpus", "changes"),
    [
        (1, {"student.device_mapping": [0], "teacher.device_mapping": [0], "is_offload_states": True}),
        (2, {"student.device_mapping": [0], "teacher.device_mapping": [1]}),
        (2, {"student.device_mapping": [0], "teacher.device_mapping": [1], "logits_transfer_backend": "nccl-only"}),
        (2, {"student.device_mapping": [0], "teacher.device_mapping": [0, 1], "logits_transfer_backend": "ipc+nccl",
             "teacher.strategy_args.strategy_name": "hf_infer"}),
    ],
    ids=["turns", "object-store", "nccl", "ipc-and-nccl"],
)  # fmt: skip
def test_a_teacher_in_other_processes_gives_the_losses_of_one_process(configure, tmp_path, gpus, changes):
    pytest.importorskip("ray")
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    from limbeck.launch.on_ray import run_on_cluster

    DistillPipeline(configure(output_dir=str(tmp_path / "one"))).run()
    run_on_cluster(configure(**changes), lambda line: None)
    for key in ("train/loss", "train/train_distill_loss", "val/loss"):
        assert metrics(tmp_path / "out", key) == pytest.approx(metrics(tmp_path / "one", key), rel=1e-4), key
