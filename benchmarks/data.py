"""Measures data preparation: tokenized rows per second compared with TRL, the cost of padding, and memory for large files.

    python benchmarks/data.py --data path/to/gsm8k              # everything; the folder with GSM8K's train.jsonl
    python benchmarks/data.py tokenize                          # one measurement, on generated rows
    python benchmarks/data.py batches --data path/to/gsm8k      # runs batches.py
    python benchmarks/data.py memory --gigabytes 2              # takes a quarter of an hour on two cores

Tokenization includes reading the rows, the chat template, the tokenizer and the loss mask. Each side runs in its own process.
TRL's side is the preparation of prompt and completion by its SFTTrainer (``_prepare_dataset``), in a separate environment that
is created on first use; its rows are read before the measurement. "One process" is one core: the threads of the tokenizer are
disabled. Memory is the growth of the peak of the process over its memory before the first row, including the page cache of
mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(folder: Path, texts: list[str]) -> None:
    """Write a byte-level tokenizer of 16,384 tokens with a chat template, trained on ``texts``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=16_384, special_tokens=special, show_progress=False)
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    ).save_pretrained(folder)


def rows_of(data: Path | None, count: int) -> list[dict[str, str]]:
    """The rows of GSM8K in the folder ``data``, or ``count`` generated word problems."""
    if data is not None:
        with (data / "train.jsonl").open() as file:
            return [json.loads(line) for line in file]
    from limbeck.demo.problems import generate

    return [{"question": one.question, "answer": one.answer} for one in generate(count, 0)]


def write_rows(path: Path, rows: list[dict[str, str]], size: int) -> int:
    """Write the rows repeatedly, with consecutive numbers, until the file has ``size`` bytes; returns the number of rows."""
    count = 0
    with path.open("w") as file:
        while file.tell() < size or not count:
            for row in rows:
                file.write(json.dumps({"question": f"{count}. {row['question']}", "answer": row["answer"]}) + "\n")
                count += 1
    return count


def ours(folder: Path, workers: int) -> dict[str, float]:
    """Tokenization by Limbeck, from the file to the arrays."""
    from transformers import AutoTokenizer

    from limbeck.data import tokenize_files

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenize_files([folder / "few.jsonl"], tokenizer, sequence_length=1024)
    begun = time.perf_counter()
    _, report = tokenize_files(
        [folder / "rows.jsonl"],
        tokenizer,
        sequence_length=1024,
        workers=workers,
        cache_dir=folder / f"cache-{os.getpid()}",
    )
    return {"seconds": time.perf_counter() - begun, "tokens": report.tokens, "supervised": report.supervised_tokens}


def trl(folder: Path, workers: int) -> dict[str, float]:
    """Tokenization by TRL's SFTTrainer, from rows in memory to its dataset."""
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def read(name: str) -> Any:
        with (folder / name).open() as file:
            rows = [json.loads(line) for line in file]
        return datasets.Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": row["question"]}],
                 "completion": [{"role": "assistant", "content": row["answer"]}]}
                for row in rows
            ]
        )  # fmt: skip

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    config = SFTConfig(
        output_dir=str(folder / "trl"), report_to="none", use_cpu=True, bf16=False, max_length=1024,
        dataset_num_proc=workers if workers > 1 else None,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=config, train_dataset=read("few.jsonl"), processing_class=tokenizer)
    rows = read("rows.jsonl")
    begun = time.perf_counter()
    done = trainer._prepare_dataset(rows, tokenizer, config, False, None, "train")
    seconds = time.perf_counter() - begun
    tokens = sum(map(len, done["input_ids"]))
    masks = done["completion_mask"] if "completion_mask" in done.column_names else done["labels"]
    return {"seconds": seconds, "tokens": tokens, "supervised": sum(sum(v > 0 for v in mask) for mask in masks)}


def memory(folder: Path, workers: int) -> dict[str, float]:
    """Peak memory growth while the file is tokenized and opened, and the peak of the largest worker process."""
    import resource

    from transformers import AutoTokenizer

    from limbeck.data import tokenize_files

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenize_files([folder / "few.jsonl"], tokenizer, sequence_length=1024)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * os.sysconf("SC_PAGE_SIZE")
    begun = time.perf_counter()
    examples, report = tokenize_files(
        [folder / "rows.jsonl"], tokenizer, sequence_length=1024, workers=workers, cache_dir=folder / "cache"
    )
    return {
        "seconds": time.perf_counter() - begun,
        "growth": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e6,
        "worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6,
        "rows": len(examples),
        "tokens": report.tokens,
    }


def run(side: str, python: str, folder: Path, workers: int) -> dict[str, float]:
    """Run one side in its own process."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [python, str(HERE / "data.py"), side, "--folder", str(folder), "--workers", str(workers)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("@"))[1:])


def prepare(folder: Path, rows: list[dict[str, str]], size: int) -> int:
    make_tokenizer(folder, [text for row in rows for text in row.values()])
    write_rows(folder / "few.jsonl", rows[:16], 0)
    return write_rows(folder / "rows.jsonl", rows, size)


def compare_tokenizing(data: Path | None, rounds: int, repeat: int) -> None:
    """Print rows per second of both sides in one process, then of Limbeck in two processes on ``repeat`` times the rows."""
    from side import TRL, python_of

    rows = rows_of(data, 8000)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        count = prepare(folder, rows, 0)
        sides = {"limbeck": (ours, sys.executable), "trl": (trl, python_of("trl", TRL))}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, (side, python) in sides.items():
                found[name].append(run(side.__name__, python, folder, 1))
        speed = {name: count / statistics.median(one["seconds"] for one in all_of) for name, all_of in found.items()}
        print(f"\ntokenization of {count:,} rows, one process, median of {rounds}")
        for name, all_of in found.items():
            print(
                f"  {name:8} {speed[name]:8,.0f} rows/s  {all_of[0]['tokens']:,} tokens, {all_of[0]['supervised']:,} supervised"
            )
        print(f"  limbeck: {speed['limbeck'] / speed['trl']:.2f} × the rows/s")
        larger = repeat * count
        with (folder / "rows.jsonl").open("w") as file:
            for i in range(larger):
                file.write(json.dumps(rows[i % len(rows)]) + "\n")
        seconds = {workers: run("ours", sys.executable, folder, workers)["seconds"] for workers in (1, 2)}
        print(f"\ntokenization of {larger:,} rows, including the start of the processes")
        for workers, taken in seconds.items():
            print(f"  {workers} process{'es' if workers > 1 else '  '} {larger / taken:8,.0f} rows/s")
        print(f"  two processes: {seconds[1] / seconds[2]:.2f} × the rows/s of one")


def measure_memory(data: Path | None, gigabytes: float, workers: int) -> None:
    """Peak memory for a file of the given size."""
    rows = rows_of(data, 8000)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, rows, int(gigabytes * 1e9))
        found = run("memory", sys.executable, folder, workers)
        print(
            f"\n{gigabytes:g} GB of JSONL, {found['rows']:,.0f} rows, {found['tokens']:,.0f} tokens, {workers} processes: "
            f"peak memory growth {found['growth']:,.0f} MB, {found['seconds']:,.0f} s"
            + (f"; peak of the largest worker {found['worker']:,.0f} MB" if workers > 1 else "")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="?", default="all", choices=("all", "tokenize", "batches", "memory", "ours", "trl")
    )
    parser.add_argument("--data", type=Path, help="folder with a train.jsonl of question and answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=16, help="repetitions of the rows for two processes")
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is not None:
        side = {"ours": ours, "trl": trl, "memory": memory}[args.what]
        print("@" + json.dumps(side(args.folder, args.workers)))
        return
    if args.what in ("all", "batches") and args.data is None:
        parser.error("batches are measured on rows of real lengths; give their folder with --data")
    if args.what in ("all", "tokenize"):
        compare_tokenizing(args.data, args.rounds, args.repeat)
    if args.what in ("all", "batches"):
        from batches import report

        print()
        report(args.data)
    if args.what in ("all", "memory"):
        measure_memory(args.data, args.gigabytes, args.workers)


if __name__ == "__main__":
    main()
