"""The protocol of environments: what replies to the student's completions and rewards them.

Implementations are registered in ``limbeck.registry.ENVIRONMENTS``. They see text only; tokens and the loss are not known
here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from limbeck.errors import LimbeckError
from limbeck.registry import ENVIRONMENTS, check_members
from limbeck.rollout.verifiers import NO_ANSWER, ExactVerifier, MathVerifier, Verifier


@dataclass(frozen=True)
class EnvironmentStep:
    """The result of one completion.

    reply: the next turn of the conversation, after which the student writes again; None ends the episode. Replies are not
    trained, as prompts are not. reward: of this completion, or None if it has none or it is not known. reason: why the
    reward is not known or the answer was not found.
    """

    reply: str | None = None
    reward: float | None = None
    reason: str = ""

    @property
    def done(self) -> bool:
        """Whether the episode has ended."""
        return self.reply is None


class Environment(Protocol):
    """Replies to completions and rewards them.

    An episode starts with a dataset row and has one or more completions. A row may have several episodes at a time. An
    environment that holds processes or files may also have ``close()``, which is called at the end.
    """

    def reset(self, row: Mapping[str, Any]) -> Any:
        """The state of a new episode of ``row``, as any object that ``step`` understands."""

    def step(self, episodes: Sequence[Any], completions: Sequence[str]) -> list[EnvironmentStep]:
        """One step for each completion, in order; many are given at a time so that they can be checked in parallel.

        Args:
            episodes: the state of each completion's episode, which ``step`` may change.
            completions: what the student wrote, without end tokens.
        """


class MathEnvironment:
    """One completion, with the reward 1 for a right answer and 0 for a wrong answer or none.

    Args:
        verifier: compares the answers.
        answer_key: column of the reference answer.
    """

    def __init__(self, verifier: Verifier, answer_key: str = "answer") -> None:
        self.verifier = verifier
        self.answer_key = answer_key

    def reset(self, row: Mapping[str, Any]) -> str:
        """The reference answer. Raises LimbeckError if the row has none."""
        answer = row.get(self.answer_key)
        if answer is None:
            raise LimbeckError(
                f"a row has no reference answer in the column {self.answer_key}; its columns are {', '.join(row)}; name the "
                "right one as answer_key."
            )
        return str(answer)

    def step(self, episodes: Sequence[str], completions: Sequence[str]) -> list[EnvironmentStep]:
        steps = []
        for score in self.verifier.scores(completions, episodes):
            value = 0 if score.reason == NO_ANSWER else score.value
            steps.append(EnvironmentStep(reward=None if value is None else float(value), reason=score.reason))
        return steps

    def close(self) -> None:
        self.verifier.close()


def make_math(answer_key: str = "answer", workers: int = 2, seconds: float = 10.0) -> MathEnvironment:
    """The environment ``math``: expressions, compared by ``MathVerifier``."""
    return MathEnvironment(MathVerifier(workers, seconds), answer_key)


def make_exact(answer_key: str = "answer") -> MathEnvironment:
    """The environment ``exact``: numbers and strings, compared by ``ExactVerifier``."""
    return MathEnvironment(ExactVerifier(), answer_key)


def make_environment(name: str, **arguments: Any) -> Environment:
    """The environment that is registered under ``name``.

    Raises:
        LimbeckError: if there is none, or it is incomplete.
    """
    environment: Environment = ENVIRONMENTS.get(name)(**arguments)
    check_members(f"the environment {name}", environment, ("reset", "step"))
    return environment


def count_reasons(steps: Iterable[EnvironmentStep]) -> dict[str, int]:
    """How many rewards are not known or answers not found, by reason: ``timeout``, ``no answer found`` or ``error``."""
    return dict(Counter(step.reason.partition(":")[0] for step in steps if step.reason))
