"""Rollouts: completions that a generator writes for prompts."""

from limbeck.rollout.generator import Completion, Generator, Prompt, SamplingParams

__all__ = ["Completion", "Generator", "Prompt", "SamplingParams"]
