"""Gradients are clipped to max_grad_norm in every engine, and the reported norm is the norm before clipping."""

import importlib.util

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from limbeck.config.schema import TrainingArgs
from limbeck.strategies.gradient_clipping import clip_gradients, gradient_norm
from limbeck.strategies.optimizer import make_optimizer
from limbeck.strategies.torch_engine import TorchEngine
from strategies.engines import (
    ALONE,
    ReferenceAdamW,
    deepspeed_alone,
    make_inputs,
    make_root,
    micro_batches,
    train_step,
)

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs limbeck[deepspeed]")
# An epsilon of this size makes AdamW depend on the scale of the gradients already in its first step.
ARGS = TrainingArgs(learning_rate=0.05, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=0.1)
NORMS = [0.0, 0.5, 1e9]


def reference(max_norm: float, factor: float = 1.0) -> ReferenceAdamW:
    return ReferenceAdamW(make_root(factor), lr=0.05, betas=(0.8, 0.95), eps=0.1, decay=0.1, max_norm=max_norm)


def make_engine(max_norm: float, factor: float = 1.0, **options) -> TorchEngine:
    root = make_root(factor)
    return TorchEngine(root, make_optimizer(root, ARGS), ALONE, max_norm=max_norm, **options)


def assert_follows(engine, expected: ReferenceAdamW, steps: int = 3) -> None:
    for inputs in make_inputs(steps):
        assert train_step(engine, inputs) == pytest.approx(expected.step(inputs), rel=1e-4)
        weights = dict(engine.iter_weights())
        for name, tensor in expected.weights().items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_norm", NORMS)
def test_an_engine_takes_adamw_steps_on_the_clipped_gradient(max_norm):
    assert_follows(make_engine(max_norm), reference(max_norm))


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("max_norm", NORMS)
def test_deepspeed_takes_adamw_steps_on_the_clipped_gradient(stage, max_norm):
    from functools import partial

    from limbeck.strategies.deepspeed.engine import ZeroEngine
    from limbeck.strategies.deepspeed.strategy import make_adamw

    block = {"zero_optimization": {"stage": stage}}
    with deepspeed_alone():
        root = make_root()
        optimizer = make_optimizer(root, ARGS, partial(make_adamw, block=block))
        assert_follows(ZeroEngine(root, optimizer, ALONE, block, max_norm=max_norm), reference(max_norm))


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_adds_the_micro_batches_of_a_step(stage):
    from functools import partial

    from limbeck.strategies.deepspeed.engine import ZeroEngine
    from limbeck.strategies.deepspeed.strategy import make_adamw

    block = {"zero_optimization": {"stage": stage}}
    with deepspeed_alone():
        root = make_root()
        optimizer = make_optimizer(root, ARGS, partial(make_adamw, block=block))
        engine, expected = ZeroEngine(root, optimizer, ALONE, block, max_norm=0.5, accumulates=True), reference(0.5)
        for inputs in make_inputs(3):
            norm = train_step(engine, inputs[:1], inputs[1:])
            assert norm == pytest.approx(expected.step(inputs), rel=1e-4)
        weights = dict(engine.iter_weights())
        for name, tensor in expected.weights().items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


def test_gradients_of_micro_batches_add_up_until_the_step_clears_them():
    (inputs,) = make_inputs(1)
    engine, whole = make_engine(0.0), make_engine(0.0)
    for _ in engine.forward_backward(micro_batches(inputs[:1], inputs[1:])):
        pass
    for _ in whole.forward_backward(micro_batches(inputs)):
        pass
    for one, other in zip(engine.root.parameters(), whole.root.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert engine.held_tensors()["gradients"]
    engine.step()
    assert all(parameter.grad is None for parameter in engine.root.parameters())
    assert not engine.held_tensors()["gradients"]


def test_partial_gradients_are_reduced_before_the_norm_is_taken():
    (inputs,) = make_inputs(1)
    plain = make_engine(0.0)
    expected = train_step(plain, inputs)

    def double() -> None:
        for parameter in engine.root.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(2)

    engine = make_engine(0.0, reduce_partial_gradients=double)
    assert train_step(engine, inputs) == pytest.approx(2 * expected)


def test_a_step_with_fp16_unscales_before_clipping():
    factor = 1e-3  # the initial scale of 65536 must not overflow
    engine, expected = make_engine(5e-3, factor, compute_dtype=torch.float16), reference(5e-3, factor)
    for inputs in make_inputs(2):
        norm = train_step(engine, inputs)
        assert norm == pytest.approx(expected.step(inputs), rel=1e-2)
        assert norm > 5e-3
    weights, before = dict(engine.iter_weights()), dict(make_root().model.named_parameters())
    for name, tensor in expected.weights().items():
        moved = (tensor - before[name]).abs().max().item()
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0.02 * moved)
    assert engine.state_dict().scaler["_growth_tracker"] == 2


def test_a_step_with_infinite_gradients_is_skipped_and_halves_the_scale():
    engine = make_engine(0.5, compute_dtype=torch.float16)
    before = {name: tensor.clone() for name, tensor in engine.iter_weights()}
    scale = engine.state_dict().scaler["scale"]
    train_step(engine, torch.full((5, 4), 3e4))
    for name, tensor in engine.iter_weights():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert engine.state_dict().scaler["scale"] == scale / 2


def parameters_with(*gradients) -> list[nn.Parameter]:
    made = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros(2) if gradient is None else torch.zeros_like(gradient))
        parameter.grad = gradient
        made.append(parameter)
    return made


def test_the_norm_is_that_of_all_gradients_and_skips_parameters_without_one():
    parameters = parameters_with(torch.tensor([3.0]), None, torch.tensor([[4.0, 12.0]]))
    assert gradient_norm(parameters).item() == 13.0


@pytest.mark.parametrize(("max_norm", "factor"), [(0.0, 1.0), (26.0, 1.0), (1.3, 0.1)])
def test_gradients_are_scaled_only_if_the_norm_exceeds_a_positive_limit(max_norm, factor):
    parameters = parameters_with(torch.tensor([3.0]), None, torch.tensor([[4.0, 12.0]]))
    clip_gradients(parameters, max_norm, torch.tensor(13.0))
    torch.testing.assert_close(parameters[0].grad, torch.tensor([3.0]) * factor)
    torch.testing.assert_close(parameters[2].grad, torch.tensor([[4.0, 12.0]]) * factor)
    assert parameters[1].grad is None


def test_gradients_on_different_meshes_have_one_norm_and_are_clipped_together():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        meshes = [DeviceMesh("cpu", torch.arange(1), mesh_dim_names=(name,)) for name in ("a", "b")]
        sharded = [
            distribute_tensor(torch.tensor(values), mesh, [Replicate()])
            for mesh, values in zip(meshes, ([3.0], [4.0]), strict=True)
        ]
        parameters = parameters_with(*sharded, torch.tensor([12.0]))
        norm = gradient_norm(parameters)
        assert norm.item() == 13.0
        clip_gradients(parameters, 1.3, norm)
        found = [parameter.grad for parameter in parameters]
        values = [g.full_tensor().item() if hasattr(g, "full_tensor") else g.item() for g in found]
        assert values == pytest.approx([0.3, 0.4, 1.2])
    finally:
        _clear_sharding_prop_cache()  # which knows the groups by their names
        dist.destroy_process_group()
