"""A plug-in: an environment whose rewards differ between the samples of a prompt."""

from limbeck.registry import ENVIRONMENTS
from limbeck.rollout import EnvironmentStep


class Unequal:
    def reset(self, row):
        return None

    def step(self, episodes, completions):
        return [EnvironmentStep(reward=sum(map(ord, completion)) % 8 / 7) for completion in completions]


ENVIRONMENTS.register("unequal")(Unequal)
