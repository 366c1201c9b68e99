"""What ``limbeck plan`` predicts beside what a run holds: real models, real loss, real gloo ranks on this machine's CPU.

    python benchmarks/plan.py

Each case is a real run, started by torchrun, whose second step is measured on rank 0 by a tracker in the same
process. Three figures are printed:

    state     parameters + gradients + optimizer state: predicted ÷ the tensors' own bytes; must be 1
    tensors   the fullest moment of live tensors: predicted ÷ counted by plan.tracker in the real step
    resident  the same prediction ÷ growth of the process's peak resident memory over what it held before the models; the
              process also holds what no tensor shows (workspaces, gloo, what loading whole models left to the allocator)

The simulation has the CPU's chunk sizes of the loss here; everything else is what is planned for a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

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
]


def settings(folder: Path, size: str, recompute: bool = False, accumulate: int = 1, replicate: bool = False) -> dict:
    """The configuration of a case; both models are made from a config.json alone."""
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
            "strategy_args": {"strategy_config": {"replicate": replicate}},
        },
        "teacher": {
            "model_args": model("teacher"),
            "strategy_args": {"strategy_name": "hf_infer"} if replicate else {},
        },
    }


def prepare(folder: Path) -> None:
    """A tokenizer of one word per token, and rows that fill the sequence."""
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


def measure(config_file: Path) -> None:
    """One rank of a real run; rank 0 prints what it held."""
    from limbeck.config import load_config
    from limbeck.pipeline.distill import _Run
    from limbeck.plan.tracker import Tracker
    from limbeck.strategies.world import start_world

    config = load_config(config_file).config
    with start_world() as world:
        before = resident("VmRSS")
        run = _Run(config, world, None, None)
        tracker, optimizer = Tracker(), run.engine.optimizer
        optimizer.register_step_pre_hook(
            lambda *_: tracker.add([p.grad for p in run.student.parameters() if p.grad is not None], "gradients")
        )
        with tracker:
            tracker.add([*run.student.parameters(), *run.student.buffers()], "parameters")
            kept = [*run.teacher.body.parameters(), *run.teacher.body.buffers(), run.teacher.head.weight]
            tracker.add(kept, "teacher")
            run._train_step()  # makes the optimizer's state, which later steps begin with
            tracker.add([each for entries in optimizer.state.values() for each in entries.values()], "optimizer")
            tracker.reset()
            Path("/proc/self/clear_refs").write_text("5")  # the resident peak begins anew
            run._train_step()
        grown = resident("VmHWM") - before
        if world.is_main:
            state = sum(tracker.most[name] for name in STATE)
            found = {"state": state, "tensors": sum(tracker.peak.values()), "resident": grown, "peak": +tracker.peak}
            print("@" + json.dumps(found))
        run.data.stream.close()
        world.wait()


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def compare(details: bool) -> None:
    from limbeck.config import load_config
    from limbeck.plan.simulate import simulate

    print(f"{'case':42} {'state':>7} {'tensors':>8} {'resident':>9}   predicted MiB")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        for number, (size, ranks, changes) in enumerate(CASES):
            file = folder / f"{number}.yaml"
            file.write_text(json.dumps(settings(folder, size, **changes)))
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command = [*(launcher if ranks > 1 else [sys.executable]), __file__, "--side", str(file)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            real = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("@"))[1:])
            (planned,) = simulate(load_config(file).config, ranks, "cpu").values()
            name = f"{size}, {ranks} ranks" + "".join(f", {key}={value}" for key, value in changes.items())
            state = sum(planned.most[name] for name in STATE) / real["state"]
            tensors, grown = (planned.total / real[each] for each in ("tensors", "resident"))
            print(f"{name:42} {state:7.4f} {tensors:8.3f} {grown:9.3f} {planned.total / 2**20:10.0f}", flush=True)
            if details:
                print("   planned", {key: round(value / 2**20, 1) for key, value in planned.peak.items()})
                print("   real   ", {key: round(value / 2**20, 1) for key, value in real["peak"].items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", type=Path, help="measure one run; used by the script itself")
    parser.add_argument("--details", action="store_true", help="print what the peaks are made of")
    args = parser.parse_args()
    if args.side:
        measure(args.side)
    else:
        compare(args.details)
