"""The arguments that ``chat``, ``generate`` and ``eval`` share: which models, and how they write."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from limbeck.evaluate.text_model import TextModel
    from limbeck.rollout.generator import SamplingParams


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that ``load_models`` reads."""
    parser.add_argument(
        "model",
        metavar="RUN|MODEL",
        help="output folder of a run, a checkpoint, or a model's folder or Hugging Face id",
    )
    parser.add_argument("--checkpoint", metavar="NAME", help="of the run, such as best; default: the newest")
    parser.add_argument("--beside", metavar="TEACHER", help="a second model, which does the same")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: the GPU if there is one")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")


def add_sampling_arguments(parser: argparse._ActionsContainer, temperature: float) -> None:
    """Add the arguments that ``sampling_params`` reads."""
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="most tokens of an answer; default: 512"
    )
    parser.add_argument(
        "--temperature", type=float, default=temperature, metavar="T", help=f"0 is greedy; default: {temperature:g}"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="probability mass to sample from; default: 1"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="tokens to sample from; default: 0, all of them"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples; default: 0")


def load_models(args: argparse.Namespace) -> list[TextModel]:
    """The model, and the one of ``--beside``."""
    from limbeck.evaluate.text_model import TextModel
    from limbeck.models.logs import configure_logging

    configure_logging()
    options = {"device": args.device, "trust_remote_code": args.trust_remote_code}
    models = [TextModel.load(args.model, args.checkpoint, **options)]
    return [*models, TextModel.load(args.beside, **options)] if args.beside else models


def sampling_params(args: argparse.Namespace, samples: int = 1) -> SamplingParams:
    """How an answer is sampled. Raises LimbeckError for an impossible value."""
    from limbeck.rollout.generator import SamplingParams

    for flag, value, possible, meaning in (
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "1 or more"),
        ("--temperature", args.temperature, args.temperature >= 0, "0 or more"),
        ("--top-p", args.top_p, 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("--top-k", args.top_k, args.top_k >= 0, "0 or more"),
        ("--seed", args.seed, args.seed >= 0, "0 or more"),
        ("--samples", samples, samples >= 1, "1 or more"),
    ):
        if not possible:
            raise LimbeckError(f"{flag} {value} is impossible; it must be {meaning}.")
    return SamplingParams(args.max_new_tokens, samples, args.temperature, args.top_p, args.top_k, args.seed)
