"""Compares our script with the arithmetic of HyperPod's sample in plain PyTorch, and measures the saving of frozen layers.

    python benchmarks/hyperpod.py                                      # rows of the maximal length, bf16, as the sample
    python benchmarks/hyperpod.py --rows chat --dtype fp32
    python benchmarks/hyperpod.py --spectrum

Both sides train the same models on the same rows in ShareGPT's format, each in its own process, and alternate step by step,
so that other load on the machine affects both. ``full`` rows have ``--length`` tokens and all of them are trained on, so that
only the arithmetic differs. ``chat`` rows are of different length: the sample pads them and trains on the padding and the
prompts, ours on the answers. Tokens are those that are not padding. Memory is the growth of the peak of the process over its
memory before the first step, with the models in it.

``--spectrum`` compares a run that trains all layers with one that trains the upper half of them (``--layers_to_unfreeze``).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

from side import Side, numbered_words, save_models
from step import STUDENT, TEACHER

SCRIPT = "hyperpod_sides.py"
SPECTRUM = {"num_hidden_layers": 8, "vocab_size": 2_000}


def save_both(folder: Path, shape: dict[str, int]) -> None:
    """Write teacher and student of ``benchmarks/step.py`` with another ``shape``."""
    models = {"teacher": TEACHER | shape, "student": STUDENT | shape}
    save_models(folder, models, numbered_words(shape["vocab_size"]), bos_token="<s>", eos_token="</s>")


def write_rows(folder: Path, vocab: int, length: int, kind: str) -> None:
    """64 conversations of one turn. ``full`` rows are longer than ``length`` tokens, to which both sides cut them."""
    rng = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(64):
            size = length if kind == "full" else rng.randrange(length // 8, length - 8)
            words = [f"w{rng.randrange(3, vocab)}" for _ in range(size)]
            turns = [("human", words[: size // 4]), ("gpt", words[size // 4 :])]
            row = [{"from": role, "value": " ".join(part)} for role, part in turns]
            file.write(json.dumps({"conversations": row}) + "\n")


def alternate(sides: list[Side], rounds: int, warmup: int) -> dict[str, list[dict]]:
    """The answers of each side to ``rounds`` requests for a step, after ``warmup`` others."""
    for _ in range(warmup):
        for side in sides:
            side.request()
    found: dict[str, list[dict]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            found[side.name].append(side.request())
    return found


def compare(args: argparse.Namespace, folder: Path) -> None:
    shape = {"vocab_size": args.vocab, "max_position_embeddings": args.length}
    save_both(folder, shape)
    write_rows(folder, args.vocab, args.length, args.rows)
    steps, length = args.rounds + args.warmup, str(args.length)
    options = ["compile_loss=true"]  # as ``auto`` decides for a run of a few hundred such steps
    if args.rows == "full":
        options.append("distill_on_prompt=true")
    ours = Side("limbeck", sys.executable, folder, args.dtype, steps, SCRIPT, length, *options)
    theirs = Side("sample", sys.executable, folder, args.dtype, steps, SCRIPT, length)
    found = alternate([ours, theirs], args.rounds, args.warmup)
    growth = {side.name: side.request("memory")["growth_mb"] for side in (ours, theirs)}
    speed = {name: sum(one["tokens"] for one in of) / sum(one["seconds"] for one in of) for name, of in found.items()}
    print(
        f"\n{args.dtype}, {args.rows} rows, vocabulary {args.vocab:,}, max_length {args.length}, "
        f"{args.rounds} interleaved steps of 2 micro-batches of 1 row"
    )
    for name in speed:
        seconds = statistics.median(one["seconds"] for one in found[name])
        print(
            f"  {name:8} {speed[name]:7.0f} tokens/s  {seconds:6.2f} s a step  peak memory growth {growth[name]:6.0f} MB"
        )
    print(
        f"  limbeck: {speed['limbeck'] / speed['sample']:.2f} × the tokens/s with "
        f"{growth['limbeck'] / growth['sample']:.2f} × the memory growth"
    )


def compare_frozen(args: argparse.Namespace, folder: Path) -> None:
    shape = SPECTRUM | {"max_position_embeddings": args.length}
    save_both(folder, shape)
    write_rows(folder, shape["vocab_size"], args.length, "full")
    layers = [f"model.layers.{i}." for i in range(shape["num_hidden_layers"])]
    sides = []
    for name, trained in (("all", layers), ("half", layers[len(layers) // 2 :])):
        file = folder / f"{name}.yaml"
        file.write_text("unfrozen_parameters:\n" + "".join(f"- {layer}\n" for layer in trained))
        steps, options = (
            args.rounds + args.warmup,
            ["--layers_to_unfreeze", str(file), "--output_dir", str(folder / name)],
        )
        sides.append(Side(name, sys.executable, folder, args.dtype, steps, SCRIPT, str(args.length), *options))
    found = alternate(sides, args.rounds, args.warmup)
    parts = {side.name: side.request("parts") for side in sides}
    seconds = {name: statistics.median(one["seconds"] for one in of) for name, of in found.items()}
    print(f"\n{args.dtype}, trained layers: all {len(layers)}, or the upper half; {args.rounds} interleaved steps")
    for name, held in parts.items():
        print(
            f"  {name:5} optimizer {held['optimizer_mb']:6.1f} MB  gradients {held['gradients_mb']:6.1f} MB  "
            f"{seconds[name] * 1e3:6.0f} ms a step"
        )
    half, whole = parts["half"], parts["all"]
    print(
        f"  half: {half['optimizer_mb'] / whole['optimizer_mb']:.2f} × the optimizer memory, "
        f"{half['gradients_mb'] / whole['gradients_mb']:.2f} × the gradient memory, "
        f"{seconds['half'] / seconds['all']:.2f} × the time of a step"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rows", choices=("full", "chat"), default="full")
    parser.add_argument("--vocab", type=int, default=151_936, help="default: that of Qwen2")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--spectrum", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (compare_frozen if args.spectrum else compare)(args, Path(folder))


if __name__ == "__main__":
    main()
