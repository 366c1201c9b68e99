"""Without a copy of the weights, ranks write in lockstep with the student itself."""

from pathlib import Path

import contract
import pytest
import torch
from ranks import run_on_ranks
from test_hf import KINDS
from tiny import make_model

from limbeck.config import load_mapping
from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, body, load_tokenizer, model_outline
from limbeck.models.recurrent_layers import separate_recurrent_layers
from limbeck.rollout import Prompt, SamplingParams
from limbeck.rollout.hf import HfGenerator, LockstepGenerator
from limbeck.strategies.torch_engine import TorchEngine
from limbeck.strategies.world import World

LAYOUT = "student.strategy_args.strategy_config."
ZERO = {
    "student.strategy_args.strategy_name": "deepspeed_train",
    "student.strategy_args.strategy_config": {"zero_optimization": {"stage": 3}},
}


class Root(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, compute):
        return compute(self.model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("qwen3"), kind="qwen3", head_dim=8, tie_word_embeddings=True)


@pytest.mark.processes
def test_two_ranks_write_in_lockstep_what_each_writes_with_a_copy(folder):
    run_on_ranks(2, str(Path(__file__).with_name("run_lockstep.py")), str(folder))


def test_a_hybrid_writes_alone_what_it_writes_with_a_copy(tmp_path):
    folder = make_model(tmp_path, kind="nemotron_h", **KINDS["nemotron_h"])
    model, source, world = contract.load(folder), ModelSource(str(folder)), World(0, 1, torch.device("cpu"))
    separate_recurrent_layers(body(model))  # as with packing
    engine = TorchEngine(Root(model), torch.optim.SGD(model.parameters()), world)
    outline, tokenizer = model_outline(source, torch.float32), load_tokenizer(source)
    alone, with_copy = LockstepGenerator(outline, tokenizer, world), HfGenerator(outline, tokenizer)
    alone.use_student(engine, 1)
    with_copy.update_weights(engine.iter_weights(), 1)
    prompts, ids = contract.make_prompts(model.config.vocab_size), torch.arange(5, 29).reshape(2, 12)
    before = model(ids).logits
    sampling = SamplingParams(12, n=2, temperature=1.5, seed=3)
    assert contract.tokens(alone.generate(prompts, sampling)) == contract.tokens(with_copy.generate(prompts, sampling))
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


def test_a_generator_without_a_student_is_refused(folder):
    source = ModelSource(str(folder))
    generator = LockstepGenerator(
        model_outline(source, torch.float32), load_tokenizer(source), World(0, 1, torch.device("cpu"))
    )
    with pytest.raises(LimbeckError, match="no student yet; call use_student"):
        generator.generate([Prompt((5, 6), 0)], SamplingParams(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout.max_staleness": 1}, "rollout.max_staleness = 1 writes then; set copy to true"),
        (ZERO, "strategy_name = deepspeed_train does not support; use fsdp2_train"),
        ({LAYOUT + "tensor_model_parallel_size": 2}, "tensor_model_parallel_size = 2; use 1"),
        ({LAYOUT + "pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size = 2; use 1"),
    ],
    ids=str,
)
def test_what_cannot_be_combined_with_lockstep_is_refused(configure, changes, message):
    with pytest.raises(LimbeckError, match=rf"rollout.generator_kwargs.copy = false .*{message}"):
        configure(**{"distill_loss_weight": 1.0, "rollout.generator_kwargs": {"copy": False}, **changes})


def test_a_key_that_only_a_copy_reads_causes_a_notice(settings):
    changes = {"rollout.generator_kwargs": {"copy": False}, "rollout.offload": True}
    notices = load_mapping(settings(**changes, distill_loss_weight=1.0)).notices
    assert any("rollout.offload has no effect" in notice for notice in notices)
