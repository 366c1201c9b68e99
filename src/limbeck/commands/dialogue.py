"""``limbeck chat`` and ``limbeck generate``."""

from __future__ import annotations

import argparse
import sys

from limbeck.commands.text_arguments import add_model_arguments, add_sampling_arguments, load_models, sampling_params
from limbeck.errors import LimbeckError


def add_dialogue_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the parser."""
    chat = commands.add_parser("chat", help="talk with a trained student or another model")
    add_model_arguments(chat)
    chat.add_argument("--system", metavar="TEXT", help="system message; default: that of the run")
    add_sampling_arguments(chat, temperature=0.7)
    chat.set_defaults(run=_chat)

    generate = commands.add_parser(
        "generate", help="print the answers of a trained student or another model to prompts"
    )
    add_model_arguments(generate)
    generate.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated; default: lines of standard input"
    )
    generate.add_argument("--raw", action="store_true", help="continue the text itself, without a chat template")
    add_sampling_arguments(generate, temperature=0.0)
    generate.set_defaults(run=_generate)


def _chat(args: argparse.Namespace) -> int:
    sampling = sampling_params(args)

    from limbeck.evaluate.dialogue import chat

    chat(load_models(args), sampling, args.system)
    return 0


def _generate(args: argparse.Namespace) -> int:
    sampling = sampling_params(args)

    from limbeck.evaluate.dialogue import generate

    if not args.prompt and sys.stdin.isatty():
        raise LimbeckError(
            "limbeck generate has no prompt; give --prompt TEXT, or one prompt a line on standard input."
        )
    prompts = args.prompt or (line.rstrip("\n") for line in sys.stdin if line.strip())
    generate(load_models(args), prompts, sampling, raw=args.raw)
    return 0
