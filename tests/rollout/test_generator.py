"""A generator, built in or from a plug-in file, writes the rows of a run that trains."""

from pathlib import Path

import pytest
import torch
from runs import weights

from limbeck import DistillPipeline, registry
from limbeck.data.batch import Batch, StepBatch
from limbeck.data.masks import IGNORE
from limbeck.models import ModelSource, load_model
from limbeck.rollout import Prompt, SamplingParams

PLUGIN = Path(__file__).parents[2] / "examples" / "plugins" / "generator.py"


def checkpoint(config):
    return load_model(ModelSource.from_args(config.student.model_args, "student"), torch.float32)


class WrittenRows:
    """A step source: the student writes the rows of every step."""

    max_lookahead, steps_per_epoch = 0, None

    def __init__(self, name, config, world, data):
        self.generator = registry.GENERATORS.get(name)(config, world)
        self.generator.update_weights(checkpoint(config).state_dict().items(), 0)
        self.examples, self.versions = data.examples, []

    def next(self, step):
        assert self.generator.version == step  # the weights of the step before
        self.versions.append(step)
        prompts = [Prompt(tuple(self.examples.row(row)[0][:6].tolist()), row) for row in range(step, step + 4)]
        rows = []
        for completion in self.generator.generate(prompts, SamplingParams(max_tokens=4, temperature=0)):
            ids = torch.tensor([[*completion.prompt.token_ids, *completion.token_ids]])
            labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORE)
            labels[:, : len(completion.prompt.token_ids) - 1] = IGNORE
            rows.append(Batch.of(ids, labels, None, ids.numel()))
        return StepBatch.of(rows)

    def before_update(self):
        """Nothing is written beside a training step."""

    def weights_changed(self, weights, step):
        self.generator.update_weights(weights(), step)

    def validated(self, metrics):
        """A step does not depend on it."""

    def metrics(self):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        """A step is a function of its number and the weights."""

    def close(self):
        """There is no background work."""


@pytest.mark.parametrize("name", ["greedy", "hf"])
def test_a_generator_writes_with_the_weights_of_the_last_step(name, configure, monkeypatch):
    sources = []

    def make(config, world, data):
        sources.append(WrittenRows(name, config, world, data))
        return sources[-1]

    monkeypatch.setitem(registry.STEP_SOURCES._registered, "written", make)
    config = configure(
        plugins=[str(PLUGIN)], step_source="written", distill_loss_weight=1.0, max_steps=4,
        save_steps=0,
    )  # fmt: skip
    result = DistillPipeline(config).run()
    assert sources[0].versions == [0, 1, 2, 3]
    saved = weights(result.student)
    written = dict(sources[0].generator.model.state_dict())
    for name, tensor in saved.items():
        torch.testing.assert_close(written[name], tensor)
    start = checkpoint(config).state_dict()
    assert any(not torch.equal(start[name], tensor) for name, tensor in saved.items())
