"""Run by torchrun on two ranks with the folder of a model: in lockstep, ranks write what they write with a copy."""

import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import contract
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from limbeck.config.schema import StrategyConfig
from limbeck.models import (
    ModelSource,
    compile_layers,
    decoder_layers,
    load_tokenizer,
    model_outline,
    recompute_activations,
)
from limbeck.models import compile as compilation
from limbeck.rollout import SamplingParams
from limbeck.rollout.hf import HfGenerator, LockstepGenerator
from limbeck.strategies.base import MicroBatches
from limbeck.strategies.fsdp2 import shard
from limbeck.strategies.torch_engine import TorchEngine
from limbeck.strategies.world import World, start_world

GREEDY = SamplingParams(8, temperature=0)
SAMPLED = SamplingParams(8, n=2, temperature=1.5, seed=3)
compiled_passes = []


class Root(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return inputs(self.model) if callable(inputs) else self.model(inputs, labels=inputs)


def make_engine(folder, world, **layout):
    model = contract.load(folder).train()
    model.set_attn_implementation("sdpa")
    recompute_activations(model)
    compile_layers(decoder_layers(model))
    root = shard(Root(model), decoder_layers(model), world, world.dims, StrategyConfig(**layout), None)
    return TorchEngine(root, torch.optim.SGD(root.parameters(), lr=0.5), world)


def train_step(engine, ids):
    (output,) = engine.forward_backward(MicroBatches(1, lambda: iter([ids])))
    return output.loss.item(), engine.step().item()


def check_written(engine, in_lockstep, with_copy, prompts):
    """Ranks have other numbers of prompts, also none, and each has its own tokens."""
    root, model = engine.root, engine.root.model
    before = root.training, model.config._attn_implementation, len(compiled_passes)
    in_lockstep.use_student(engine, 4)
    with_copy.update_weights(engine.iter_weights(), 4)
    for first, sampling in ((7, SAMPLED), (0, GREEDY), (2, SAMPLED)):
        own = prompts[:first] if dist.get_rank() == 0 else prompts[first:]
        found, expected = in_lockstep.generate(own, sampling), with_copy.generate(own, sampling)
        assert [replace(one, log_probs=None) for one in found] == [replace(one, log_probs=None) for one in expected]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(other.log_probs), atol=1e-5, rtol=0)
    assert (root.training, model.config._attn_implementation, len(compiled_passes)) == before
    assert all(isinstance(parameter, DTensor) for parameter in root.parameters())  # nothing is left gathered


def check_training(folder, world, in_lockstep, with_copy, prompts):
    """A student that writes between its steps learns what one does that only trains."""
    ids = torch.arange(5, 29).reshape(2, 12) + world.rank
    writing, training = (make_engine(folder, world) for _ in range(2))
    for _ in range(2):
        check_written(writing, in_lockstep, with_copy, prompts)
        assert train_step(writing, ids) == train_step(training, ids)
    for (name, one), (_, other) in zip(writing.iter_weights(), training.iter_weights(), strict=True):
        assert torch.equal(one, other), name


def count_passes(graph, inputs):
    def run(*values):
        compiled_passes.append(1)
        return graph(*values)

    return run


def main(folder, world):
    source = ModelSource(str(folder))
    outline, tokenizer = model_outline(source, torch.float32), load_tokenizer(source)
    generators = LockstepGenerator(outline, tokenizer, world, slots=3), HfGenerator(outline, tokenizer, slots=3)
    prompts = contract.make_prompts(outline.config.vocab_size)
    check_training(folder, world, *generators, prompts)
    assert compiled_passes
    check_written(make_engine(folder, world, reshard_after_forward=False), *generators, prompts)


with patch.object(compilation, "BACKEND", count_passes), start_world() as started:
    torch._dynamo.reset()
    main(Path(sys.argv[1]), World(started.rank, started.size, torch.device("cpu")))
torch._dynamo.reset()
