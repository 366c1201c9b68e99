"""Measures padding and packing on GSM8K: shares of padding, balance of ranks, batches and trained tokens per second.

    python benchmarks/batches.py --data path/to/gsm8k
    python benchmarks/batches.py --data path/to/gsm8k --without-trl

The tokenizer is trained on the data, so nothing is downloaded. Fixed-length padding is that of ``padding="max_length"``: every
row has ``sequence_length`` slots. TRL's packing runs in the environment of step.py. The training steps are complete (teacher
forward, student forward and backward with the loss, optimizer) of two small models. Padded and packed steps alternate in one
process, so that other load on the machine affects both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from side import TRL as TRL_VERSIONS
from side import python_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from limbeck.data import BatchStream, Examples, PrefetchedStream, StreamSettings, tokenize_rows
from limbeck.data.packing import ALGORITHMS, pack
from limbeck.models import body, enable_varlen_attention, output_head
from limbeck.objectives import Objective
from limbeck.strategies.base import FrozenModel
from limbeck.teachers import LocalTeacher
from limbeck.train.student import LossSettings, StudentWithLoss, TrainInput

LENGTH, VOCAB = 512, 8000
TEACHER = {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6}
STUDENT = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}
TRL = """
import json, sys, time
from datasets import Dataset
from trl.data_utils import pack_dataset
lengths, size = json.load(open(sys.argv[1])), int(sys.argv[2])
data = Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
begun = time.perf_counter()
packed = pack_dataset(data, size, strategy="bfd")
seconds = time.perf_counter() - begun
print("@" + json.dumps({"packs": len(packed), "tokens": sum(map(len, packed["input_ids"])), "seconds": seconds}))
"""


def examples_of(file: Path) -> Examples:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<pad>", "</s>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator((text for row in rows for text in row.values()), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    return tokenize_rows(rows, tokenizer, template="chatml", sequence_length=LENGTH)[0]


def stream_of(examples: Examples, rank: int = 0, world: int = 1, **changes) -> BatchStream:
    settings = {
        "seed": 0, "sequence_length": LENGTH, "per_device_batch_size": 8, "accumulation_steps": 1, "packing": True,
        "max_tokens_per_microbatch": 0, "length_round": 4, "pad_id": 0, **changes,
    }  # fmt: skip
    return BatchStream(examples, StreamSettings(**settings), rank, world)


def shares(examples: Examples, with_trl: bool) -> None:
    tokens, rows = len(examples.tokens), len(examples)
    print(
        f"{rows} rows of {tokens / rows:.0f} tokens on average, at most {examples.lengths.max()}, sequence_length {LENGTH}\n"
    )
    dynamic = {"packing": False, "per_device_batch_size": 64, "max_tokens_per_microbatch": 4096}
    print("share of padding over an epoch (micro-batches of 8 rows or packs, or of 4096 slots if dynamic)")
    print(f"  fixed length ({LENGTH} slots a row)       {1 - tokens / (rows * LENGTH):6.1%}")
    for name, changes in (
        ("rows by length, 8 micro-batches", {"packing": False, "accumulation_steps": 8}),
        ("dynamic, 64 rows a step", dynamic),
        ("dynamic, grouped by length", {**dynamic, "group_by_length": True}),
        ("packed", {}),
        ("packed and dynamic", {"max_tokens_per_microbatch": 4096}),
    ):
        stream = stream_of(examples, **changes)
        steps = [next(stream) for _ in range(stream.steps_per_epoch)]
        share = 1 - sum(step.num_tokens for step in steps) / sum(step.num_slots for step in steps)
        print(f"  {name:38} {share:6.2%}")
    print(f"\nshare of padding if every pack had {LENGTH} slots, and the time of the packing algorithm")
    falling = np.sort(examples.lengths)[::-1]
    for algorithm in ALGORITHMS:
        begun = time.perf_counter()
        packs = len(pack(falling, LENGTH, algorithm).starts) - 1
        print(f"  {algorithm:38} {1 - tokens / packs / LENGTH:6.2%}  {1e3 * (time.perf_counter() - begun):6.1f} ms")
    if with_trl:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(examples.lengths.tolist(), file)
            file.flush()
            done = subprocess.run(
                [python_of("trl", TRL_VERSIONS), "-c", TRL, file.name, str(LENGTH)],
                capture_output=True,
                text=True,
                check=True,
            )
        found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("@"))[1:])
        share, spent = 1 - found["tokens"] / found["packs"] / LENGTH, found["seconds"]
        print(
            f"  {'TRL pack_dataset(strategy=bfd)':38} {share:6.2%}  {1e3 * spent:6.1f} ms, including the copy of the tokens"
        )


def loads(examples: Examples) -> None:
    print("\nmost tokens of a rank / mean over the ranks: mean over an epoch, and the worst step")
    for name, rows, changes in (
        ("packed, 8 packs a rank", 8, {}),
        ("packed and dynamic, 4096 slots", 8, {"max_tokens_per_microbatch": 4096}),
        ("dynamic, 64 rows a rank, 2048 slots", 64, {"packing": False, "max_tokens_per_microbatch": 2048}),
        ("dynamic, 32 rows a rank, 4096 slots", 32, {"packing": False, "max_tokens_per_microbatch": 4096}),
        ("the same, grouped by length", 32,
         {"packing": False, "max_tokens_per_microbatch": 4096, "group_by_length": True}),
    ):  # fmt: skip
        parts = []
        for world in (2, 4, 8):
            ranks = [stream_of(examples, rank, world, per_device_batch_size=rows, **changes) for rank in range(world)]
            ratios = []
            for _ in range(ranks[0].steps_per_epoch):
                sums = [sum(batch.num_tokens for batch in next(rank).micro_batches) for rank in ranks]
                ratios.append(max(sums) * world / sum(sums))
            parts.append(f"{world} ranks {statistics.mean(ratios):.3f} {max(ratios):.3f}")
        print(f"  {name:38} " + "   ".join(parts))


def speed(examples: Examples) -> None:
    stream = stream_of(examples)
    begun, steps, tokens = time.perf_counter(), 0, 0
    while time.perf_counter() - begun < 3:
        tokens += next(stream).num_tokens
        steps += 1
    seconds = time.perf_counter() - begun
    print(
        f"\npacked stream alone: {steps / seconds:.0f} batches/s of 8 packs, {tokens / seconds / 1e6:.2f} million tokens/s"
    )


class TrainingSide:
    """Teacher, student and optimizer, initialised equally for both sides."""

    def __init__(self) -> None:
        made = []
        for seed, shape in enumerate((STUDENT, TEACHER)):
            torch.manual_seed(seed)
            config = LlamaConfig(
                vocab_size=VOCAB, max_position_embeddings=LENGTH, pad_token_id=0, bos_token_id=None, eos_token_id=1,
                tie_word_embeddings=False, **shape,
            )  # fmt: skip
            made.append(LlamaForCausalLM(config))
            enable_varlen_attention(made[-1], "the model")
        student, teacher = made
        self.root = StudentWithLoss(student, LossSettings(Objective.of("forward_kl", kd_weight=0.5), VOCAB))
        self.teacher = LocalTeacher(FrozenModel(body(teacher), output_head(teacher.requires_grad_(False)), 0))
        self.optimizer = torch.optim.AdamW(self.root.parameters(), lr=1e-4)

    def step(self, stream: PrefetchedStream) -> tuple[float, float, int, int]:
        """Take a step; returns its seconds, the seconds of waiting for data, tokens and supervised tokens."""
        begun = time.perf_counter()
        batch = next(stream)
        waited = time.perf_counter() - begun
        for micro in batch.micro_batches:
            self.root(TrainInput(micro, self.teacher.compute_signal(micro), batch.normalizer)).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - begun, waited, batch.num_tokens, batch.num_supervised


def training(examples: Examples, rounds: int, warmup: int) -> None:
    sides = {
        # length_round = sequence_length pads every row to it, as padding="max_length" does.
        "fixed length": (TrainingSide(), stream_of(examples, packing=False, length_round=LENGTH)),
        "packed": (TrainingSide(), stream_of(examples)),
    }
    ahead = {name: PrefetchedStream(stream) for name, (_, stream) in sides.items()}
    found: dict[str, list[tuple[float, float, int, int]]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, (side, _) in sides.items():
            result = side.step(ahead[name])
            if turn >= warmup:
                found[name].append(result)
    for stream in ahead.values():
        stream.close()
    print(f"\ntraining steps, float32, 8 × {LENGTH} slots, {rounds} interleaved steps")
    rates = {}
    for name, results in found.items():
        seconds, waited, tokens, supervised = (sum(column) for column in zip(*results, strict=True))
        rates[name] = supervised / seconds
        print(
            f"  {name:14} {supervised / seconds:7.0f} supervised tokens/s  {tokens / seconds:7.0f} tokens/s  "
            f"{1e3 * seconds / rounds:6.0f} ms per step, {waited / seconds:.2%} of it waiting for data"
        )
    print(f"  packing: {rates['packed'] / rates['fixed length']:.2f} × the supervised tokens/s of fixed-length padding")


def report(data: Path, with_trl: bool = True, rounds: int = 12, warmup: int = 2) -> None:
    """Print all measurements on the rows of the folder ``data``."""
    examples = examples_of(data / "train.jsonl")
    shares(examples, with_trl)
    loads(examples)
    speed(examples)
    training(examples, rounds, warmup)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with a train.jsonl of question and answer")
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args()
    report(args.data, not args.without_trl, args.rounds, args.warmup)


if __name__ == "__main__":
    main()
