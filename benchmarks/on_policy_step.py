"""Compares on-policy steps with those of TRL's GKDTrainer with lmbda=1, on the same models and prompts.

    python benchmarks/on_policy_step.py
    OMP_NUM_THREADS=1 python benchmarks/on_policy_step.py --rounds 8

A step has 64 prompts of 8 to 64 tokens. The student writes up to 128 tokens for each at temperature 1, and the reverse KL
divergence is trained on them. 1 token in 64 is an end token, so that completions have different lengths: 55 tokens on average.
TRL's side writes with ``model.generate`` and trains in padded micro-batches of 8; Limbeck packs samples. Each side runs in
its own process, TRL in a separate environment that is created on first use (benchmarks/.venv-trl); the sides alternate step by
step, so that other load on the machine affects both. "student" is the forward and backward pass, the loss and the optimizer.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from side import TRL, Side, python_of, save_models

VOCAB, ENDS, PROMPTS, LONGEST = 8192, list(range(1, 129)), 64, 64
MODEL = {"vocab_size": VOCAB, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": ENDS, "pad_token_id": 0,
         "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False}  # fmt: skip
TEACHER = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 2048, **MODEL}
STUDENT = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 1024, **MODEL}
PARTS = ("writing", "weight sync", "teacher", "student")


def prepare(folder: Path, steps: int) -> None:
    """Write both models with random weights, a tokenizer with one token per word, and the prompts of all steps."""
    words = {f"w{i}": i for i in range(VOCAB)}
    save_models(folder, {"teacher": TEACHER, "student": STUDENT}, words, pad_token="w0", eos_token="w1")
    rng = random.Random(0)
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(PROMPTS * steps):
            prompt = [f"w{rng.randrange(len(ENDS) + 1, VOCAB)}" for _ in range(rng.randint(8, LONGEST))]
            file.write(json.dumps({"question": " ".join(prompt), "answer": prompt[0]}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    args = parser.parse_args()
    steps = args.rounds + args.warmup
    script = "on_policy_step_sides.py"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, steps)
        sides = (
            Side("limbeck", sys.executable, folder, "fp32", steps, script),
            Side("trl", python_of("trl", TRL), folder, "fp32", steps, script),
        )
        found: dict[str, dict[str, list[float]]] = {side.name: defaultdict(list) for side in sides}
        for step in range(steps):
            for side in sides:
                result = side.request()
                if step >= args.warmup:
                    for name, value in result.items():
                        found[side.name][name].append(value)
    middle = {
        side: {name: statistics.median(values) for name, values in all_of.items()} for side, all_of in found.items()
    }
    print(
        f"\n{PROMPTS} prompts of 8 to {LONGEST} tokens per step, up to 128 new ones, median of {args.rounds} interleaved steps"
    )
    for side, values in middle.items():
        parts = ", ".join(f"{part} {values[part] * 1e3:.0f}" for part in PARTS)
        print(f"  {side:8} {values['seconds'] * 1e3:6.0f} ms for {values['written']:.0f} written tokens: {parts} ms")
    speed = {
        side: statistics.median(
            tokens / seconds for tokens, seconds in zip(all_of["written"], all_of["seconds"], strict=True)
        )
        for side, all_of in found.items()
    }
    padding = ", ".join(f"{role} {middle['limbeck'][f'{role} padding']:.2%}" for role in ("teacher", "student"))
    print(f"  limbeck: padding of what a model computes: {padding}")
    print(f"  limbeck: {speed['limbeck'] / speed['trl']:.2f} × the written and trained tokens/s")


if __name__ == "__main__":
    main()
