"""Answers that the student writes: one completion, or several with replies of the environment between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from limbeck.config import DistillConfig
from limbeck.data.examples import Examples
from limbeck.data.masks import IGNORE
from limbeck.rollout import Completion, Prompt
from limbeck.train.replies import ReplyRenderer
from limbeck.train.samples import Sample
from limbeck.train.scoring import Scorer
from limbeck.train.writer import Writer

NO_ROOM = "no room for another turn"
MAX_TURNS = "max_turns reached"


@dataclass(frozen=True)
class NumberedPrompt:
    """What is answered: the tokens of the prompt, the row of the data, and the number of the answer among those of the
    row. weight: factor of the loss of each token of the answer.
    """

    tokens: tuple[int, ...]
    row: int
    number: int
    weight: float = 1.0


class AnswerWriter:
    """Writes answers with the generator of a run, and scores them if there is an environment.

    Args:
        config: of the run.
        writer: its generator.
        scorer: its environment, or None.
        tokenizer: of the run; replies are rendered with it.
    """

    def __init__(self, config: DistillConfig, writer: Writer, scorer: Scorer | None, tokenizer: Any) -> None:
        assert config.rollout is not None
        self._writer, self._scorer = writer, scorer
        self._max_turns, self._room = config.rollout.max_turns, config.sequence_length
        self._max_tokens = config.rollout.max_new_tokens
        self._renderer = ReplyRenderer(config, tokenizer) if self._max_turns > 1 else None

    def write(
        self, prompts: Sequence[NumberedPrompt], examples: Examples, origin: str, seed: int, **changes: Any
    ) -> list[Sample]:
        """An answer to each prompt, in order. Collective.

        Args:
            prompts: to answer.
            examples: whose rows they are of, with their columns if there is an environment.
            origin: of the samples.
            seed: of all randomness.
            changes: replace fields of the run's ``SamplingParams``.
        """
        return self.begin(prompts, examples, origin, seed, **changes)()

    def begin(
        self, prompts: Sequence[NumberedPrompt], examples: Examples, origin: str, seed: int, **changes: Any
    ) -> Callable[[], list[Sample]]:
        """The same, in two parts: the function that is returned waits for the first turn, scores it and writes the others."""
        finish = self._writer.begin([Prompt(one.tokens, one.row) for one in prompts], seed, **changes)
        return lambda: self._finish(prompts, finish(), examples, origin, seed, **changes)

    def _finish(
        self,
        prompts: Sequence[NumberedPrompt],
        completions: Sequence[Completion],
        examples: Examples,
        origin: str,
        seed: int,
        **changes: Any,
    ) -> list[Sample]:
        samples = [_first_turn(one, origin, completion) for one, completion in zip(prompts, completions, strict=True)]
        if self._scorer is None:
            return samples
        episodes = self._scorer.begin(examples, [one.row for one in prompts])
        max_tokens = int(changes.get("max_tokens", self._max_tokens))
        last = dict(enumerate(completions))
        for turn in range(1, self._max_turns + 1):
            steps = episodes.step({number: one.token_ids for number, one in last.items()})
            going: dict[int, Sample] = {}
            for number, step in sorted(steps.items()):
                sample = _rewarded(samples[number], step.reward, step.reason)
                if step.reply is not None and sample.finished:
                    more = self._with_reply(sample, last[number], step.reply, max_tokens, turn)
                    if isinstance(more, str):
                        sample = replace(sample, reason=sample.reason or more)
                    else:
                        going[number] = sample = more
                samples[number] = sample
            if not going:
                break
            # Each has a prompt of its own now, so the number in this list takes the place of the row.
            continued = [Prompt(tuple(one.tokens.tolist()), number) for number, one in going.items()]
            of_turn = int(np.random.default_rng((seed, turn)).integers(2**62))
            last = dict(zip(going, self._writer.write(continued, of_turn, **changes), strict=True))
            for number, completion in last.items():
                samples[number] = _next_turn(samples[number], completion)
        return samples

    def _with_reply(
        self, sample: Sample, completion: Completion, reply: str, max_tokens: int, turn: int
    ) -> Sample | str:
        """The sample with the reply and the beginning of the next turn, or why there is no next turn."""
        if self._renderer is None or turn == self._max_turns:
            return MAX_TURNS
        tokens = self._renderer.tokens(completion.token_ids, reply)
        if len(sample.tokens) + len(tokens) + max_tokens > self._room:
            return NO_ROOM
        return _extended(sample, tokens, None)


def _first_turn(prompt: NumberedPrompt, origin: str, completion: Completion) -> Sample:
    return Sample.written(
        prompt.row,
        prompt.number,
        origin,
        prompt.tokens,
        completion.token_ids,
        completion.log_probs,
        completion.finished,
        prompt.weight,
    )


def _next_turn(sample: Sample, completion: Completion) -> Sample:
    sample = _extended(sample, completion.token_ids, completion.log_probs or (), supervised=True)
    return replace(sample, finished=completion.finished)


def _extended(
    sample: Sample, tokens: Sequence[int], log_probs: Sequence[float] | None, supervised: bool = False
) -> Sample:
    """The sample with more tokens at its end."""
    before = len(sample.tokens)
    more = np.array(tokens, dtype=np.int32)
    labels = np.concatenate([sample.labels, np.full(len(more), IGNORE, dtype=np.int32)])
    of_labels = sample.log_probs
    if of_labels is not None:
        of_labels = np.concatenate([of_labels, np.full(len(more), np.nan, dtype=np.float32)])
    if supervised:
        labels[before - 1 : -1] = more
        if of_labels is not None and log_probs:
            of_labels[before - 1 : -1] = log_probs
    weights = sample.weights
    if weights is not None:  # all supervised tokens have the same
        weights = np.where(labels == IGNORE, 0, weights.max()).astype(np.float32)
    tokens_so_far = np.concatenate([sample.tokens, more])
    return replace(sample, tokens=tokens_so_far, labels=labels, log_probs=of_labels, weights=weights)


def _rewarded(sample: Sample, reward: float | None, reason: str) -> Sample:
    """Rewards of several turns are added."""
    total = sample.reward if reward is None else reward + (sample.reward or 0.0)
    return replace(sample, reward=total, reason=reason)
