"""A plan counts what compiled layers keep and allocate."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from limbeck.config import load_mapping
from limbeck.plan.compiled_layers import SimulatedCompiler
from limbeck.plan.simulate import simulate
from limbeck.plan.tracker import Tracker


def saved_by(compiler) -> list[int]:
    """Bytes of the buffers that a compiled layer keeps for its backward pass, apart from its parameters."""
    config = Qwen2Config(
        hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1
    )
    config._attn_implementation = "sdpa"
    layer = Qwen2DecoderLayer(config, 0)
    hidden = torch.randn(2, 24, 64, requires_grad=True)
    positions = Qwen2RotaryEmbedding(config)(hidden, torch.arange(24)[None])
    kept, parameters = {}, {parameter.untyped_storage()._cdata for parameter in layer.parameters()}

    def keep(saved):
        storage = saved.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return saved

    with saved_tensors_hooks(keep, lambda saved: saved):
        output = compiler(Qwen2DecoderLayer.forward.__wrapped__)(layer, hidden, position_embeddings=positions)
    output.sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert all(parameter.grad is not None for parameter in layer.parameters())
    return sorted(kept.values())


@pytest.fixture
def bfloat16():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_a_layer_keeps_what_torch_compile_keeps(bfloat16):
    def torch_compile(forward):
        return torch.compile(forward, backend="aot_eager_decomp_partition", dynamic=False)

    with FakeTensorMode(allow_non_fake_inputs=True):
        simulated = saved_by(SimulatedCompiler())
        plain = saved_by(lambda forward: forward)
    assert simulated == saved_by(torch_compile)
    assert sum(simulated) < sum(plain)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(256, 256))

    def forward(self, x):
        return (x.sin().cos().exp() @ self.weight).tanh() + 1


def test_intermediate_results_of_fused_operators_take_no_memory():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        chain, x = Chain(), torch.zeros(1024, 256)
        compiled = SimulatedCompiler()(Chain.forward)
        compiled(chain, x)  # the first call traces
        with Tracker() as tracker:
            compiled(chain, x)
    assert sum(tracker.peak.values()) == 2 * x.nbytes  # the inputs and outputs of the product, one after the other
    assert tracker.flops == 2 * 1024 * 256 * 256


@pytest.mark.slow
def test_compiled_layers_keep_fewer_activations(from_config):
    def step(recompute: bool, compiled: bool):
        changes = {"student.model_args.disable_gradient_checkpointing": not recompute}
        (found,) = simulate(load_mapping(from_config(**changes)).config, 1, "cpu", compiled=compiled)
        return found

    plain, compiled, recomputed = step(False, False), step(False, True), step(True, True)
    for part in ("parameters", "gradients", "optimizer", "teacher"):
        assert recomputed.most[part] == compiled.most[part] == plain.most[part]
    assert compiled.flops == plain.flops
    assert recomputed.activations < compiled.activations / 2 < plain.activations / 2
    assert recomputed.total < compiled.total < plain.total
