"""Rollouts: completions that a generator writes for prompts, and environments that reward them."""

from limbeck.rollout.environments import Environment, EnvironmentStep, MathEnvironment, count_reasons, make_environment
from limbeck.rollout.generator import Completion, Generator, InPlaceGenerator, Prompt, SamplingParams

__all__ = [
    "Completion",
    "Environment",
    "EnvironmentStep",
    "Generator",
    "InPlaceGenerator",
    "MathEnvironment",
    "Prompt",
    "SamplingParams",
    "count_reasons",
    "make_environment",
]
