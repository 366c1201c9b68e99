"""The command that converts checkpoints between Hugging Face's format and Megatron-LM's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from limbeck.errors import LimbeckError
from limbeck.folders import is_megatron_checkpoint, run_weights


def add_convert_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``limbeck convert``."""
    convert = commands.add_parser(
        "convert", help="convert a checkpoint of Megatron-LM to Hugging Face's format, or back"
    )
    convert.add_argument("source", metavar="SOURCE", help="folder of a checkpoint or of a run, or Hugging Face id")
    convert.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write")
    convert.add_argument("--tokenizer", help="folder or Hugging Face id; default: SOURCE, unless it is of Megatron-LM")
    convert.add_argument(
        "--iteration",
        type=int,
        help="of the checkpoint of Megatron-LM that is written, default 0, or read, default the newest",
    )
    convert.add_argument(
        "--format",
        choices=("torch_dist", "torch"),
        help="of the checkpoint of Megatron-LM that is written: torch_dist (default), which it loads in any layout, or the "
        "legacy torch, for a single rank",
    )
    convert.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        help="with --format torch: the same argument of the Megatron-LM that will load it; default: transformer_engine",
    )
    convert.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from limbeck.models import ModelSource, load_model, load_tokenizer
    from limbeck.models.load import checkpoint_dtype
    from limbeck.models.logs import configure_logging
    from limbeck.models.megatron_checkpoint import loading_flags, write_checkpoint

    if args.output.exists():
        raise LimbeckError(f"{args.output} exists; name a new folder for the converted checkpoint.")
    if (args.iteration or 0) < 0:
        raise LimbeckError(f"--iteration = {args.iteration} must be at least 0.")
    configure_logging()
    from_megatron = is_megatron_checkpoint(args.source)
    if args.transformer_impl is not None and args.format != "torch" and not from_megatron:
        raise LimbeckError(
            "--transformer-impl selects the names of --format torch, and torch_dist has names that both kinds of layers "
            "load; add --format torch, or remove it."
        )
    weights = None if from_megatron or (Path(args.source) / "config.json").is_file() else run_weights(Path(args.source))
    args.source = str(weights or args.source)
    if from_megatron:
        args.source = _iteration_to_read(args)
    arguments = {"tokenizer_model": args.tokenizer} if from_megatron and args.tokenizer else {}
    source = ModelSource(args.source, megatron_arguments=arguments)
    model = load_model(source, checkpoint_dtype(source))
    if not from_megatron:
        form: Literal["torch_dist", "torch"] = args.format or "torch_dist"
        layers: Literal["transformer_engine", "local"] = args.transformer_impl or "transformer_engine"
        print(write_checkpoint(model, args.output, args.iteration or 0, args.tokenizer or args.source, form, layers))
        print(f"load it in Megatron-LM with {loading_flags(model.config)}")
        return 0
    model.save_pretrained(args.output)
    if args.tokenizer:
        load_tokenizer(ModelSource(args.tokenizer)).save_pretrained(args.output)
    print(args.output)
    return 0


def _iteration_to_read(args: argparse.Namespace) -> str:
    """The folder of the checkpoint of Megatron-LM that the arguments name.

    Raises:
        LimbeckError: if it is not there, or for an argument about a checkpoint that is written.
    """
    for name, value in (("--format", args.format), ("--transformer-impl", args.transformer_impl)):
        if value is not None:
            raise LimbeckError(
                f"{args.source} is a checkpoint of Megatron-LM, which is read in its own format; remove {name}."
            )
    if args.iteration is None:
        return str(args.source)
    folder = Path(args.source) / f"iter_{args.iteration:07d}"
    if not folder.is_dir():
        raise LimbeckError(f"there is no {folder}; name another --iteration, or remove it for the newest.")
    return str(folder)
