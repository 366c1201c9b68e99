"""Compares training steps with those of TRL's GKDTrainer, on the same models and batches.

    python benchmarks/step.py                    # fp32 and bf16
    python benchmarks/step.py --dtype bf16 --rounds 40

Each side runs in its own process: ``DistillPipeline``, and ``GKDTrainer`` with lmbda=0 and beta=0 (forward KL on the tokens of
the dataset) in a separate environment that is created on first use (benchmarks/.venv-trl). The sides alternate step by step, so
that other load on the machine affects both. Every position is supervised, which is the worst case for a loss that skips
unsupervised positions. Memory is the growth of the peak of the process over its memory before the first step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

from side import TRL, Side, numbered_words, python_of, save_models

ROWS, TIME, VOCAB = 4, 256, 32_000
MODEL = {"num_key_value_heads": 8, "num_attention_heads": 8, "vocab_size": VOCAB, "max_position_embeddings": 512,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}  # fmt: skip
TEACHER = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 2048, **MODEL}
STUDENT = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 1024, **MODEL}


def prepare(folder: Path) -> None:
    """Write both models with random weights, a tokenizer with one token per word, and rows of exactly TIME tokens."""
    models = {"teacher": TEACHER, "student": STUDENT}
    save_models(folder, models, numbered_words(VOCAB), bos_token="<s>", eos_token="</s>")
    rng = random.Random(0)
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(64):
            ids = [f"w{rng.randrange(3, VOCAB)}" for _ in range(TIME - 1)]
            file.write(json.dumps({"question": " ".join(ids[:64]), "answer": " ".join(ids[64:])}) + "\n")


def compare(dtype: str, rounds: int, warmup: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        steps = rounds + warmup
        ours = Side("limbeck", sys.executable, folder, dtype, steps)
        theirs = Side("trl", python_of("trl", TRL), folder, dtype, steps)
        for _ in range(warmup):
            ours.request(), theirs.request()
        seconds: dict[str, list[float]] = {"limbeck": [], "trl": []}
        parts: list[float] = []
        waited: list[float] = []
        for _ in range(rounds):
            ours_now = ours.request()
            seconds["limbeck"].append(ours_now["seconds"])
            waited.append(ours_now["data"])
            seconds["trl"].append(theirs.request()["seconds"])
            parts.append(ours.request("parts")["seconds"])
        growth = {side.name: side.request("memory")["growth_mb"] for side in (ours, theirs)}
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\n{dtype}: {ROWS} × {TIME} tokens, vocabulary {VOCAB}, median of {rounds} interleaved steps")
    for name in ("limbeck", "trl"):
        print(
            f"  {name:8} {ROWS * TIME / middle[name]:7.0f} tokens/s  {middle[name] * 1e3:6.0f} ms  "
            f"peak memory growth {growth[name]:6.0f} MB"
        )
    print(
        f"  limbeck: {middle['trl'] / middle['limbeck']:.2f} × the tokens/s with "
        f"{growth['limbeck'] / growth['trl']:.2f} × the memory growth"
    )
    print(
        f"  a step takes {middle['limbeck'] / statistics.median(parts):.3f} × the time of its parts measured alone "
        "(teacher forward, student forward and backward with the fused loss, optimizer); "
        f"{sum(waited) / sum(seconds['limbeck']):.2%} of it is spent waiting for data"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=4)
    args = parser.parse_args()
    for dtype in ("fp32", "bf16") if args.dtype == "both" else (args.dtype,):
        compare(dtype, args.rounds, args.warmup)


if __name__ == "__main__":
    main()
