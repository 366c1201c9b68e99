"""The protocol of generators: engines that write completions for prompts with the student's current weights.

Implementations are registered in ``limbeck.registry.GENERATORS`` and used by step sources; the loss is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from limbeck.errors import LimbeckError

if TYPE_CHECKING:  # the worker processes of verifiers import this package, but not torch
    from torch import Tensor

    from limbeck.strategies.base import Engine


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue. row_id: number of the dataset row, from which, with seed and step, all randomness is
    derived.
    """

    token_ids: tuple[int, ...]
    row_id: int


@dataclass(frozen=True)
class SamplingParams:
    """How completions are sampled.

    max_tokens: of a completion. n: completions per prompt. temperature: divides the logits; 0 is greedy. top_k: 0
    samples from the whole vocabulary. seed: of this step. stop_strings, stop_token_ids: end a completion, beside the
    model's own end tokens.
    """

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


def most_new_tokens(prompt: Prompt, sampling: SamplingParams, max_length: int | None) -> int:
    """The most tokens of a completion of ``prompt``, together with which it has at most ``max_length``, if that is not None.

    Raises:
        LimbeckError: if the prompt is empty or leaves no position for a token.
    """
    length = len(prompt.token_ids)
    if length == 0:
        raise LimbeckError(f"the prompt of row {prompt.row_id} has no tokens; leave the row out.")
    if max_length is None:
        return sampling.max_tokens
    if length >= max_length:
        raise LimbeckError(
            f"the prompt of row {prompt.row_id} has {length} tokens, which leaves no room to write: a prompt and its answer "
            f"have at most {max_length} tokens, by sequence_length, the model's positions or rollout.generator_kwargs; leave "
            "out longer prompts, raise sequence_length, or set student.model_args.model_config_kwargs.max_position_embeddings "
            "if the model supports more."
        )
    return min(sampling.max_tokens, max_length - length)


@dataclass(frozen=True)
class Completion:
    """What was written for a prompt.

    token_ids: without the prompt's. They include the token that ended the completion: an end token, or the token that
    completed a stop string. log_probs: of each token under the sampling distribution, or None. That is the distribution
    after temperature, top_k and top_p (``processed_logprobs`` in vLLM); with temperature 0, that of the unchanged logits.
    finished: an end token or a stop string was written; False where max_tokens or the model's positions ran out.
    version: of the weights that wrote it.
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] | None = None
    finished: bool = True
    version: int = 0


class Generator(Protocol):
    """Writes completions. Every rank calls every method in the same order.

    A generator with processes of its own has two further members: ``close`` ends them, and ``writer_ranks`` has the rank of
    each engine, to which prompts are given in turn; other ranks get none.
    """

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        """``sampling.n`` completions for each prompt, in order. A rank may have no prompts.

        With ``rollout.max_staleness`` it runs in a thread beside a training step. It must then use no collectives of the
        student's process groups and no random state that is shared with the training.
        """

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the student's weights: Hugging Face names and full tensors, one at a time, with a tied head under its
        own name too.
        """

    def offload(self) -> None:
        """Free the device between rollouts."""

    def reload(self) -> None:
        """The inverse of ``offload``."""


@runtime_checkable
class InPlaceGenerator(Generator, Protocol):
    """A generator that writes with the student that is trained and has no weights of its own."""

    def use_student(self, engine: Engine, version: int) -> None:
        """Write with the student of ``engine`` from now on, whose weights change with training. Called in place of
        ``update_weights``.
        """
