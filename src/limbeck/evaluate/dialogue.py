"""``limbeck chat`` and ``limbeck generate``: answers that are printed while they are written."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from limbeck.data.rows import Message
from limbeck.errors import LimbeckError
from limbeck.evaluate.text_model import TextModel
from limbeck.rollout.generator import SamplingParams

_HELP = "Write a message and press Enter; /reset begins again, and /exit or Ctrl-D ends."


def generate(models: Sequence[TextModel], prompts: Iterable[str], sampling: SamplingParams, *, raw: bool) -> None:
    """Print the answer of each model to each prompt; with several models, each answer after the name of its model.

    raw: continue the prompt itself, without a chat template.
    """
    for number, prompt in enumerate(prompts):
        for model in models:
            text = prompt if raw else model.prompt([{"role": "user", "content": prompt}])
            torch.manual_seed(sampling.seed + number)
            if len(models) > 1:
                print(f"{model.name}: ", end="", flush=True)
            model.stream(text, sampling)


def chat(models: Sequence[TextModel], sampling: SamplingParams, system: str | None = None) -> None:
    """Read messages from standard input, and print the answers. Each model has a conversation of its own."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  input() then edits lines and remembers them

        print(_HELP)
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    conversations = [list(start) for _ in models]
    turn = 0
    while (line := _read("you: " if interactive else "")) is not None and line != "/exit":
        if line == "/reset":
            conversations = [list(start) for _ in models]
        elif line:
            for model, messages in zip(models, conversations, strict=True):
                print(f"{model.name}: ", end="", flush=True)
                _answer(model, messages, line, replace(sampling, seed=sampling.seed + turn))
            turn += 1


def _read(prompt: str) -> str | None:
    try:
        return input(prompt).strip()
    except EOFError:
        return None


def _answer(model: TextModel, messages: list[Message], line: str, sampling: SamplingParams) -> None:
    """Append the user's line and the model's answer to ``messages``, unless there is no room for it."""
    turns: list[Message] = [*messages, {"role": "user", "content": line}]
    torch.manual_seed(sampling.seed)
    try:
        answer = model.stream(model.prompt(turns), sampling)
    except LimbeckError as error:
        print(f"({error})")
        return
    messages[:] = [*turns, {"role": "assistant", "content": answer}]
