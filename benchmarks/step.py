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
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from side import TRL, python_of

HERE = Path(__file__).resolve().parent
ROWS, TIME, VOCAB = 4, 256, 32_000
MODEL = {"num_key_value_heads": 8, "num_attention_heads": 8, "vocab_size": VOCAB, "max_position_embeddings": 512,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}  # fmt: skip
TEACHER = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 2048, **MODEL}
STUDENT = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 1024, **MODEL}


class Side:
    """The process of one side. It takes one step per request and returns the seconds. ``options`` are for its script."""

    def __init__(
        self, name: str, python: str, folder: Path, dtype: str, steps: int, script: str = "step_sides.py", *options: str
    ) -> None:
        self.name = name
        command = [python, str(HERE / script), name, str(folder), dtype, str(steps), *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.receive()

    def receive(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise SystemExit(f"{self.name} ended unexpectedly; see its output above")

    def request(self, what: str = "step") -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.receive()


def save_models(folder: Path, teacher: dict, student: dict) -> None:
    """Write both models with random weights, and a tokenizer with one token per word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, student["vocab_size"])}}
    backend = Tokenizer(models.WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        chat_template="{% for m in messages %}{{ m['content'] + (' </s>' if m['role'] == 'assistant' else ' ') }}{% endfor %}",
    )  # fmt: skip
    for name, config, seed in (("teacher", teacher, 1), ("student", student, 0)):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def prepare(folder: Path) -> None:
    """Write both models, and rows of exactly TIME tokens."""
    import random

    save_models(folder, TEACHER, STUDENT)
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
