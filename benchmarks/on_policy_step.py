"""Compares on-policy steps with those of TRL's GKDTrainer with lmbda=1, on the same models and prompts.

    python benchmarks/on_policy_step.py                # on a GPU where there is one, in bf16
    OMP_NUM_THREADS=1 python benchmarks/on_policy_step.py --device cpu --rounds 8
    python benchmarks/on_policy_step.py --quick --json on_policy.json      # two rounds; a part of make gpu

A step has 64 prompts of 8 to 64 tokens. The student writes up to 128 tokens for each at temperature 1, and the reverse KL
divergence is trained on them. 1 token in 64 is an end token, so that completions have different lengths: 55 tokens on average.
TRL's side writes with ``model.generate`` and trains in padded micro-batches of 8; Limbeck packs samples. Each side runs in
its own process, TRL in a separate environment that is created on first use (benchmarks/.venv-trl), or with ``--quick`` in this
Python if TRL is installed there, and else not at all. The sides alternate step by step, so that other load on the machine
affects both. "student" is the forward and backward pass, the loss and the optimizer.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from side import TRL, Side, python_of, save_models, write_json

VOCAB, ENDS, LONGEST = 8192, list(range(1, 129)), 64
MODEL = {"vocab_size": VOCAB, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": ENDS, "pad_token_id": 0,
         "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False}  # fmt: skip
TEACHER = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 2048, **MODEL}
STUDENT = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 1024, **MODEL}
PARTS = ("writing", "weight sync", "teacher", "student")


def prepare(folder: Path, prompts: int) -> None:
    """Write both models with random weights, a tokenizer with one token per word, and the prompts of all steps."""
    words = {f"w{i}": i for i in range(VOCAB)}
    save_models(folder, {"teacher": TEACHER, "student": STUDENT}, words, pad_token="w0", eos_token="w1")
    rng = random.Random(0)
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(prompts):
            prompt = [f"w{rng.randrange(len(ENDS) + 1, VOCAB)}" for _ in range(rng.randint(8, LONGEST))]
            file.write(json.dumps({"question": " ".join(prompt), "answer": prompt[0]}) + "\n")


def summary(steps: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Medians of what each side measured in its ``steps``. The first is compared with the others."""
    results: list[dict[str, Any]] = []
    for side, measured in steps.items():
        if measured:
            found = {name: statistics.median(step[name] for step in measured) for name in measured[0]}
            speed = statistics.median(step["written"] / step["seconds"] for step in measured)
            results.append({"side": side, **found, "tokens_per_second": speed})
    for result in results:
        result["times_as_fast_is_limbeck"] = results[0]["tokens_per_second"] / result["tokens_per_second"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two rounds; TRL only if this Python has it")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda where there is one")
    parser.add_argument("--prompts", type=int, default=64, help="of a step; a multiple of 8")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the results to this file, after every round")
    args = parser.parse_args()
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype, rounds = "bf16" if device == "cuda" else "fp32", 2 if args.quick else args.rounds
    pythons = {"limbeck": sys.executable}
    if not args.quick:
        pythons["trl"] = python_of("trl", TRL)
    elif find_spec("trl") and find_spec("datasets"):
        pythons["trl"] = sys.executable
    count = rounds + args.warmup
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    print(
        f"{args.prompts} prompts of 8 to {LONGEST} tokens per step, up to {args.max_tokens} new ones, {dtype}, {device}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, args.prompts * count)
        options = ("on_policy_step_sides.py", device, str(args.prompts), str(args.max_tokens))
        sides = [Side(name, python, folder, dtype, count, *options) for name, python in pythons.items()]
        for step in range(count):
            for side in sides:
                result = side.request()
                if step >= args.warmup:
                    found[side.name].append(result)
            if args.json:
                values = {"device": device, "dtype": dtype, "results": summary(found)}
                write_json(args.json, values)
    print(f"median of {rounds} interleaved steps")
    for result in summary(found):
        parts = ", ".join(f"{part} {result[part] * 1e3:.0f}" for part in PARTS)
        print(
            f"  {result['side']:8} {result['seconds'] * 1e3:6.0f} ms for {result['written']:.0f} written tokens: {parts} ms"
        )
        if result["side"] == "limbeck":
            padding = ", ".join(f"{role} {result[f'{role} padding']:.2%}" for role in ("teacher", "student"))
            print(f"  limbeck: padding of what a model computes: {padding}")
        else:
            print(f"  limbeck: {result['times_as_fast_is_limbeck']:.2f} × the written and trained tokens/s")
    if len(sides) == 1:
        print("  trl is not installed, so that only limbeck was measured")


if __name__ == "__main__":
    main()
