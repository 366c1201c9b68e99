"""``limbeck eval``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.commands.text_arguments import add_model_arguments, add_sampling_arguments, load_models, sampling_params
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from limbeck.evaluate.results import Result
    from limbeck.evaluate.text_model import TextModel
    from limbeck.rollout.generator import SamplingParams


def add_eval_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("eval", help="measure a trained student or another model on questions or tasks")
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="FILE",
        help="questions and answers, as in file_name; may be repeated",
    )
    parser.add_argument("--tasks", metavar="NAMES", help="tasks of lm-eval, separated by commas")
    parser.add_argument("--limit", type=int, metavar="N", help="most questions of each file or task; default: all")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="answers written together; default: 64")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: eval in the run, or in this folder")
    questions = parser.add_argument_group("questions (--data)")
    questions.add_argument(
        "--verifier", choices=("exact", "math"), default="exact", help="compares numbers and words, or expressions"
    )
    questions.add_argument("--samples", type=int, default=1, metavar="N", help="answers to each question; default: 1")
    add_sampling_arguments(questions, temperature=0.0)
    tasks = parser.add_argument_group("tasks of lm-eval (--tasks)")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples in each prompt; default: the task's")
    tasks.add_argument("--apply-chat-template", action="store_true", help="write prompts with the chat template")
    tasks.add_argument("--include-path", metavar="FOLDER", help="YAML files of further tasks")
    parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    if not args.data and not args.tasks:
        raise LimbeckError("limbeck eval has nothing to measure; give --data FILE, --tasks NAMES, or both.")
    for flag, value in (("--limit", args.limit), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise LimbeckError(f"{flag} {value} is impossible; it must be 1 or more.")
    sampling = sampling_params(args, args.samples)

    from limbeck.evaluate.results import FOLDER, save_result

    models = load_models(args)
    folder = args.output or (models[0].run or Path()) / FOLDER
    for model in models:
        for result in _results(args, model, sampling):
            path = save_result(result, folder)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
            print(f"{result.task}  {result.model}  {shown}\n  {path}", flush=True)
    return 0


def _results(args: argparse.Namespace, model: TextModel, sampling: SamplingParams) -> Iterator[Result]:
    from limbeck.evaluate.harness import run_tasks
    from limbeck.evaluate.questions import measure_accuracy

    for file in args.data:
        yield measure_accuracy(model, file, sampling, verifier=args.verifier, limit=args.limit, slots=args.batch_size)
    if args.tasks:
        yield from run_tasks(
            model,
            [name for name in args.tasks.split(",") if name],
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            batch_size=args.batch_size,
            chat_template=args.apply_chat_template,
            include_path=args.include_path,
        )
