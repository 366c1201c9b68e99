"""Compares what ``limbeck plan`` predicts with real runs: real models, real loss, real gloo ranks on this machine's CPU.

    python benchmarks/plan.py                 # all cases
    python benchmarks/plan.py zero stages     # cases with one of these words in their name

Each case is a real run, started by torchrun, whose second step is measured. Printed is predicted ÷ measured of

    state      parameters + gradients + optimizer state, counted from the tensors; must be 1
    tensors    the peak of live tensors, counted by plan.tracker in the real step
    allocator  the same peak, as PyTorch's CPU allocator reports it to torch.profiler
    resident   the growth of the process's peak resident memory since before the models were loaded. glibc is set to return
               freed memory at once. Workspaces, gloo's buffers and loaded code are in it, and are no tensors

The loss is simulated with the chunk sizes of a CPU; everything else is as planned for a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VOCAB = 32_000
STATE = ("parameters", "gradients", "optimizer")
SIZES = {
    "small": {"student": (256, 4), "teacher": (512, 4), "rows": 4, "time": 256},
    "medium": {"student": (512, 8), "teacher": (768, 8), "rows": 4, "time": 256},
}
CASES = [
    ("small", 1, {}),
    ("small", 2, {}),
    ("small", 2, {"accumulate": 2, "replicate": True}),
    ("medium", 1, {}),
    ("medium", 2, {"recompute": True}),
    ("medium", 2, {"stages": 2, "accumulate": 4}),
    ("medium", 2, {"zero": 2, "accumulate": 2}),
    ("medium", 2, {"zero": 3}),
]
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def settings(
    folder: Path,
    size: str,
    recompute: bool = False,
    accumulate: int = 1,
    replicate: bool = False,
    stages: int = 1,
    zero: int = 0,
) -> dict:
    """The configuration of a case. Both models consist of a config.json only."""
    chosen = SIZES[size]

    def model(name: str) -> dict:
        hidden, layers = chosen[name]
        kwargs = {
            "model_type": "qwen2", "vocab_size": VOCAB, "hidden_size": hidden, "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 4,
            "max_position_embeddings": 512, "tie_word_embeddings": False,
        }  # fmt: skip
        path = folder / f"{size}-{name}"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(kwargs))
        return {"model_name_or_path": str(path), "from_scratch": True, "dtype": "fp32"}

    student = model("student") | {"disable_gradient_checkpointing": not recompute}
    strategies: dict[str, dict] = {
        "student": {"strategy_config": {"replicate": replicate, "pipeline_model_parallel_size": stages}},
        "teacher": {"strategy_name": "hf_infer"} if replicate else {},
    }
    if zero:
        buckets = {"reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}
        block = {"zero_optimization": {"stage": zero, "stage3_prefetch_bucket_size": 1_000_000, **buckets}}
        strategies["student"] = {"strategy_name": "deepspeed_train", "strategy_config": block}
    return {
        "output_dir": str(folder / "out"),
        "tokenizer": str(folder / "tokenizer"),
        "sequence_length": chosen["time"],
        "distill_on_prompt": True,
        "max_steps": 4,
        "eval_steps": 0,
        "track_with": "none",
        "compile_loss": False,
        "student": {
            "model_args": student,
            "training_args": {
                "per_device_train_batch_size": chosen["rows"],
                "gradient_accumulation_steps": accumulate,
            },
            "data_args": {"file_name": str(folder / f"{size}.jsonl")},
            "strategy_args": strategies["student"],
        },
        "teacher": {"model_args": model("teacher"), "strategy_args": strategies["teacher"]},
    }


def prepare(folder: Path) -> None:
    """Write a tokenizer with one token per word, and rows that fill the sequence."""
    import random

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "tokenizer")
    rng = random.Random(0)
    for size, chosen in SIZES.items():
        rows = (
            {"text": " ".join(f"w{rng.randrange(3, VOCAB)}" for _ in range(chosen["time"] + 8))} for _ in range(256)
        )
        (folder / f"{size}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(config_file: Path, how: str) -> None:
    """Run one rank of a real run and print what it held: tensors, allocated or resident bytes."""
    from torch.profiler import ProfilerActivity, profile

    from limbeck.config import load_config
    from limbeck.strategies.world import start_world
    from limbeck.train.build.run import build_run
    from limbeck.train.build.student import resolve_parallelism
    from limbeck.train.loop import train_step

    config = load_config(config_file).config
    with start_world() as ranks:
        world = resolve_parallelism(config, ranks)
        before = resident("VmRSS")
        if how == "allocator":
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                run = build_run(config, world)
                train_step(run)
                begun = time.time_ns()
                train_step(run)
            found = {"allocator": allocated(profiled, begun)}
        else:
            run = build_run(config, world)
            if how == "tensors":
                found = tensors(run)
            else:
                train_step(run)
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
                train_step(run)
                found = {"resident": resident("VmHWM") - before}
        sys.stdout.write(f"@{json.dumps([ranks.rank, found])}\n")  # one write, or the lines of two ranks mix
        run.source.close()
        ranks.barrier()


def tensors(run: Any) -> dict[str, Any]:
    """The bytes of the second step's tensors."""
    from limbeck.plan.tracker import Tracker
    from limbeck.train.loop import train_step

    tracker, engine = Tracker(), run.engine
    step = engine.step

    def count_gradients() -> Any:
        tracker.add(engine.held_tensors()["gradients"], "gradients")
        return step()

    engine.step = count_gradients
    with tracker:
        tracker.add(engine.held_tensors()["parameters"], "parameters")
        tracker.add(run.teacher.model.held_tensors(), "teacher")
        train_step(run)  # creates the optimizer's state, with which later steps begin
        tracker.add(engine.held_tensors()["optimizer"], "optimizer")
        tracker.reset()
        train_step(run)
    state = sum(tracker.most[name] for name in STATE)
    return {"state": state, "tensors": sum(tracker.peak.values()), "peak": +tracker.peak}


def allocated(profiled: Any, begun: int) -> int:
    """The peak of allocated bytes since ``begun``."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now) if event.start_ns() >= begun else 0
    return most


def resident(field: str) -> int:
    """Resident bytes of this process: VmRSS (now) or VmHWM (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def compare(words: list[str], details: bool) -> None:
    from limbeck.config import load_config
    from limbeck.plan.simulate import simulate

    print(f"{'case':46} {'state':>7} {'tensors':>8} {'allocator':>10} {'resident':>9}   predicted MiB")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        for number, (size, ranks, changes) in enumerate(CASES):
            case = f"{size}, {ranks} ranks" + "".join(f", {key}={value}" for key, value in changes.items())
            if words and not any(word in case for word in words):
                continue
            file = folder / f"{number}.yaml"
            file.write_text(json.dumps(settings(folder, size, **changes)))
            real: dict[int, dict] = {rank: {} for rank in range(ranks)}
            for how in ("tensors", "allocator", "resident"):
                for rank, found in run_ranks(file, how, ranks):
                    real[rank] |= found
            for planned in simulate(load_config(file).config, ranks, "cpu"):
                held = real[planned.rank]
                name = case + (f", rank {planned.rank}" if changes.get("stages") else "")
                state = sum(planned.most.get(name, 0) for name in STATE) / held["state"]
                tensors, allocator, grown = (
                    planned.total / held[each] for each in ("tensors", "allocator", "resident")
                )
                print(
                    f"{name:46} {state:7.4f} {tensors:8.3f} {allocator:10.3f} {grown:9.3f} {planned.total / 2**20:10.0f}",
                    flush=True,
                )
                if details:
                    print("   planned", {key: round(value / 2**20, 1) for key, value in planned.peak.items()})
                    print("   real   ", {key: round(value / 2**20, 1) for key, value in held["peak"].items()})


def run_ranks(file: Path, how: str, ranks: int) -> list[tuple[int, dict]]:
    """What each rank of a real run measured, with its number."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*(launcher if ranks > 1 else [sys.executable]), __file__, "--side", str(file), "--how", how]
    environment = {**os.environ, **(RETURN_MEMORY if how == "resident" else {})}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*", metavar="WORD", help="run cases with one of these words in their name")
    parser.add_argument("--side", type=Path, help="measure one rank of a run; used by the script itself")
    parser.add_argument("--how", default="tensors")
    parser.add_argument("--details", action="store_true", help="print the peaks by name")
    args = parser.parse_args()
    if args.side:
        measure(args.side, args.how)
    else:
        compare(args.words, args.details)
