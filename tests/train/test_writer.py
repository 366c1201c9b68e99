"""The ranks of a generator's engines write the prompts."""

import torch

from limbeck.rollout import Completion, Prompt
from limbeck.strategies.world import World
from limbeck.train.writer import Writer


class Engines:
    """A generator with engines on two of three ranks, in processes that must be ended."""

    writer_ranks = (0, 2, 0)
    closed = False

    def generate(self, prompts, sampling):
        return [Completion(prompt, (1,)) for prompt in prompts]

    def offload(self):
        raise AssertionError("close ends the engines")

    def close(self):
        self.closed = True


def test_each_engine_gets_its_part_of_the_prompts(configure, monkeypatch):
    own = {}

    def gather(completions, prompts, world):
        own[world.rank] = [completion.prompt.row_id for completion in completions]
        return [Completion(prompt, (1,)) for prompt in prompts.values()]

    monkeypatch.setattr("limbeck.train.writer._gather", gather)
    config = configure(**{"distill_loss_weight": 1.0, "rollout.generator": "hf"})
    for rank in range(3):
        engines = Engines()
        writer = Writer(config, World(rank, 3, torch.device("cpu")), [], engines)
        writer.write([Prompt((5,), row) for row in range(7)], seed=0)
        writer.close()
        assert engines.closed
    assert own == {0: [0, 2, 3, 5, 6], 1: [], 2: [1, 4]}
