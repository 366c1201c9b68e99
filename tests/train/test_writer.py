"""The ranks of a generator's engines write the prompts, and what a generator returns is checked."""

import sys

import pytest
import torch

from limbeck import LimbeckError
from limbeck.registry import GENERATORS
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
    monkeypatch.setattr("limbeck.train.gather.gather_json", lambda value, world: [value])
    config = configure(**{"distill_loss_weight": 1.0, "rollout.generator": "hf"})
    for rank in range(3):
        engines = Engines()
        writer = Writer(config, World(rank, 3, torch.device("cpu")), [], engines)
        writer.write([Prompt((5,), row) for row in range(7)], seed=0)
        writer.close()
        assert engines.closed
    assert own == {0: [0, 2, 3, 5, 6], 1: [], 2: [1, 4]}


WRITTEN = [
    (lambda prompts, n: [Completion(one, (1,)) for one in prompts], "1 completions of the prompt of row 0 in place of 2"),
    (lambda prompts, n: [Completion(one, (1,)) for one in prompts * 3], "3 completions of the prompt of row 0"),
    (lambda prompts, n: [Completion(one, (1, 2, 3, 4)) for one in prompts * n], "4 tokens .*, more than max_tokens = 3"),
    (lambda prompts, n: [Completion(one, (1, 10**6)) for one in prompts * n], "the token id 1000000 for the prompt of row 0"),
    (lambda prompts, n: [Completion(one, (-1,)) for one in prompts * n], "the token id -1 for the prompt of row 0"),
    (lambda prompts, n: [Completion(Prompt((6,), 0), (1,))] * n, r"a prompt that it was not given \(row 0\)"),
    (lambda prompts, n: [Completion(Prompt((5,), 7), (1,))] * n, r"a prompt that it was not given \(row 7\)"),
    (lambda prompts, n: [Completion(one, (1,), (0.5, 0.5)) for one in prompts * n], "2 log-probabilities of 1 tokens"),
    (lambda prompts, n: None, "a NoneType in place of a list of limbeck.rollout.Completion"),
    (lambda prompts, n: [(1,)], "a tuple in place of a limbeck.rollout.Completion"),
    (lambda prompts, n: {}[3], r"failed while it wrote: KeyError: 3 \(.*test_writer\.py:\d+\)"),
    (lambda prompts, n: sys.exit(3), r"failed while it wrote: SystemExit: 3 \("),
]  # fmt: skip


@pytest.mark.parametrize(("write", "sentence"), WRITTEN)
def test_what_a_faulty_generator_returned_is_named(configure, write, sentence, _only_built_in_extensions):
    class Faulty:
        def __init__(self, config, world):
            pass

        def generate(self, prompts, sampling):
            return write(prompts, sampling.n)

        def offload(self):
            pass

    GENERATORS.register("faulty")(Faulty)
    config = configure(**{"distill_loss_weight": 1.0, "rollout.generator": "faulty", "rollout.max_new_tokens": 3})
    writer = Writer(config, World(0, 1, torch.device("cpu")), [])
    with pytest.raises(LimbeckError, match=f"rollout.generator = faulty .*{sentence}"):
        writer.write([Prompt((5,), 0)] * 2, seed=0)
    writer.close()
