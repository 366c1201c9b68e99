"""Scores what the student writes with the environment of the run. Each rank scores a part, and every rank gets all."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from limbeck.config import DistillConfig
from limbeck.config.schema.rollout import ENVIRONMENT_KWARGS
from limbeck.data.examples import Examples
from limbeck.errors import LimbeckError
from limbeck.rollout import EnvironmentStep, count_reasons, make_environment
from limbeck.rollout.verifiers import TIMEOUT
from limbeck.strategies.world import World
from limbeck.train.gather import agree, gather_json
from limbeck.train.timed_calls import LateCallError, TimedCalls

logger = logging.getLogger(__name__)


class Scorer:
    """The environment of a run.

    Args:
        config: of the run; ``config.rollout.environment`` names the environment.
        world: the processes of the student.
        tokenizer: turns completions into text.
    """

    def __init__(self, config: DistillConfig, world: World, tokenizer: Any) -> None:
        assert config.rollout is not None and config.rollout.environment is not None
        self._name, self._tokenizer = config.rollout.environment, tokenizer
        self.world = world
        arguments = dict(config.rollout.environment_kwargs)
        is_built_in = self._name in ENVIRONMENT_KWARGS  # which limit their own time
        self._calls = TimedCalls(None if is_built_in else config.rollout.environment_seconds, world.device)
        if is_built_in:
            arguments.setdefault("answer_key", config.answer_key)
        try:
            self._environment = make_environment(self._name, **arguments)
        except LimbeckError:
            raise
        except (Exception, SystemExit) as error:  # an environment is a plug-in and may raise anything
            raise LimbeckError(
                f"rollout.environment = {self._name} could not be made: {type(error).__name__}: {error}. Its arguments are "
                "rollout.environment_kwargs."
            ) from error
        self._warned = self._warned_of_time = False

    def check(self, examples: Examples, what: str) -> None:
        """Start an episode of the first row of every source of ``examples``.

        Raises:
            LimbeckError: if the environment cannot use a row, which mostly lacks a column.
        """
        groups = np.zeros(len(examples), dtype=np.int32) if examples.groups is None else examples.groups
        for row in np.unique(groups, return_index=True)[1]:
            try:
                self._calls.call(self._environment.reset, examples.columns_of(int(row)))
            except LateCallError as error:
                raise LimbeckError(
                    f"rollout.environment = {self._name} cannot use the {what}: its method reset gave {error}, which is "
                    "rollout.environment_seconds; increase this limit, or correct the method."
                ) from error
            except (Exception, SystemExit) as error:  # an environment is a plug-in and may raise anything
                reason = str(error) if isinstance(error, LimbeckError) else f"{type(error).__name__}: {error}."
                raise LimbeckError(
                    f"rollout.environment = {self._name} cannot use the {what}: {reason} Its arguments are "
                    "rollout.environment_kwargs."
                ) from error

    def begin(self, examples: Examples, rows: Sequence[int]) -> Episodes:
        """New episodes of ``rows`` of ``examples``, which must have their columns."""
        return Episodes(self, examples, rows)

    def step(self, states: Sequence[Any], completions: Sequence[Sequence[int]]) -> list[EnvironmentStep]:
        """One step of some episodes of this rank. If the environment raises or takes too long, no reward of them is known."""
        texts = [self._tokenizer.decode(list(tokens), skip_special_tokens=True) for tokens in completions]
        try:
            steps = self._calls.call(self._environment.step, states, texts)
        except (Exception, SystemExit) as error:  # an environment is a plug-in and may raise anything
            return [self._unknown(error)] * len(texts)
        if not isinstance(steps, Sequence) or len(steps) != len(texts):
            found = f"{len(steps)} steps" if isinstance(steps, Sequence) else f"a {type(steps).__name__}"
            raise LimbeckError(
                f"The environment {self._name} returned {found} for {len(texts)} completions; return a list with one "
                "EnvironmentStep for each."
            )
        return [self._checked(step) for step in steps]

    def reset(self, examples: Examples, rows: Sequence[int]) -> list[Any]:
        """The state of a new episode of each row, or the step that ends it because the environment raised or took too long."""
        try:
            begun: list[Any] = self._calls.call(lambda: [self._reset(examples.columns_of(row)) for row in rows])
        except LateCallError as error:
            return [self._unknown(error)] * len(rows)
        return begun

    def _reset(self, row: Mapping[str, Any]) -> Any:
        try:
            return self._environment.reset(row)
        except (Exception, SystemExit) as error:
            return self._unknown(error)

    def close(self) -> None:
        """End the processes of the environment, if it has a method for that. What was trained stays if that fails."""
        try:
            self._calls.call(getattr(self._environment, "close", lambda: None))
        except (Exception, SystemExit) as error:  # an environment is a plug-in and may raise anything
            reason = str(error) if isinstance(error, LateCallError) else f"{type(error).__name__}: {error}"
            logger.warning("The environment %s could not be closed (%s); the run ends without it.", self._name, reason)
        self._calls.close()

    def _checked(self, step: Any) -> EnvironmentStep:
        """The step; a reward that is not finite is not known."""
        if not isinstance(step, EnvironmentStep):
            raise LimbeckError(
                f"The environment {self._name} returned {step!r} for a completion, which is not an EnvironmentStep; return "
                "limbeck.rollout.EnvironmentStep(reward=...)."
            )
        if step.reply is not None and not isinstance(step.reply, str):
            raise LimbeckError(f"The environment {self._name} returned the reply {step.reply!r}, which is not text.")
        try:
            known = step.reward is None or math.isfinite(step.reward)
        except (TypeError, ValueError):
            raise LimbeckError(
                f"The environment {self._name} returned the reward {step.reward!r}, which is not a number."
            ) from None
        return step if known else replace(step, reward=None, reason=f"error: the reward is {step.reward}")

    def _unknown(self, error: BaseException) -> EnvironmentStep:
        if isinstance(error, LateCallError):
            if not self._warned_of_time:
                self._warned_of_time = True
                logger.warning(
                    "The environment %s took longer than rollout.environment_seconds, so the rewards of this call are not "
                    "known; further ones are only counted.",
                    self._name,
                )
            return EnvironmentStep(reason=TIMEOUT)
        if not self._warned:
            self._warned = True
            logger.warning(
                "The environment %s raised an error, so the reward of an answer is not known; further ones are only counted.",
                self._name,
                exc_info=error,
            )
        return EnvironmentStep(reason=f"error: {type(error).__name__}: {error}"[:200])


class Episodes:
    """Episodes that are stepped together. The state of each is on one rank only.

    Args:
        scorer: whose environment they are of.
        examples: with the columns of their rows.
        rows: of each episode.
    """

    def __init__(self, scorer: Scorer, examples: Examples, rows: Sequence[int]) -> None:
        self._scorer, self._world = scorer, scorer.world
        mine = range(self._world.rank, len(rows), self._world.size)
        self._states = dict(zip(mine, scorer.reset(examples, [rows[number] for number in mine]), strict=True))

    def step(self, completions: Mapping[int, Sequence[int]]) -> dict[int, EnvironmentStep]:
        """The results of the completions (token ids) of some episodes, by the episode's number. Collective.

        Raises:
            WritingError: if the environment returned something else than steps; on every rank.
        """
        mine = [number for number in completions if number in self._states]
        failed = {number: self._states[number] for number in mine if isinstance(self._states[number], EnvironmentStep)}
        alive = [number for number in mine if number not in failed]
        states, texts = [self._states[number] for number in alive], [completions[number] for number in alive]
        stepped = agree(lambda: self._scorer.step(states, texts), self._world)
        found = failed | dict(zip(alive, stepped, strict=True))
        own = [
            [number, one.reply, None if one.reward is None else float(one.reward), one.reason]
            for number, one in found.items()
        ]
        return {
            number: EnvironmentStep(reply, reward, reason)
            for of_rank in gather_json(own, self._world)
            for number, reply, reward, reason in of_rank
        }


@dataclass
class RewardCounts:
    """Rewards since the counts were last reset. reasons: why a reward is not known, or why no answer was found."""

    known: list[float] = field(default_factory=list)
    total: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, reward: float | None, reason: str) -> None:
        """Add the reward of one answer."""
        self.total += 1
        if reward is not None:
            self.known.append(reward)
        self.reasons.update(count_reasons([EnvironmentStep(reward=reward, reason=reason)]))

    def metrics(self) -> dict[str, float]:
        """The metrics of the rewards. The mean is NaN where no reward is known."""
        return {
            "rollout/reward": float(np.mean(self.known)) if self.known else float("nan"),
            "rollout/reward_unknown_share": 1 - len(self.known) / self.total if self.total else 0.0,
            **{f"rollout/reward_reasons/{name.replace(' ', '_')}": float(n) for name, n in self.reasons.items()},
        }
