"""Training steps on a GPU: Limbeck, TRL's GKDTrainer without and with Liger, and the parts of a step alone.

    python benchmarks/step_gpu.py --quick                       # Limbeck and the matrix products, two to three minutes
    python benchmarks/step_gpu.py --folder /tmp/bench --json step.json
    python benchmarks/step_gpu.py --sides limbeck products --set compile_model=false --profile
    python benchmarks/step_gpu.py --plan                        # what `limbeck plan` predicts, without a GPU
    python benchmarks/step_gpu.py --tiny --device cpu           # only checks that the script runs

Student and teacher have the shapes of Qwen2.5 models (Llama classes, random weights, heads of 151 936 rows or more, a
tokenizer of 151 665 words). A step is 16 x 1024 tokens, forward KL and cross-entropy at every position, bf16 over float32
masters, AdamW. Row kinds: ``full`` are documents of 1024 tokens in micro-batches of eight; ``packed`` are short documents
(log-normal, median 148 tokens), which Limbeck packs and TRL pads.

Sides, each in a process of its own with a time limit. The compilation caches of a side are empty for its first kind of
rows; the second finds what the first has left, as a second run does:

    products   the matrix products of both models, heads included; the largest measured rate of a square product; and the
               models' bodies alone, without head, loss and optimizer
    limbeck    ``limbeck.distill``, with the options of ``--set``
    trl        ``trl.experimental.gkd.GKDTrainer`` with lmbda=0 and beta=0 (the forward KL on the tokens of the dataset)
    liger      the same with ``use_liger_kernel``

A side that runs out of memory is tried again with micro-batches of half the rows and the same number of tokens per step. The
share of the matmul peak counts 2 operations per parameter of the teacher and token and 6 per parameter of the student and
token, without attention and recomputation. Times are medians after warm-up; the first step is measured from the start of
training, compilation included. At the end it says which of the goals in ``goals.py`` are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from goals import lines, step_goals
from side import write_json

HERE = Path(__file__).resolve().parent
SIDES = ("products", "limbeck", "trl", "liger")
NEEDED = {"trl": ("trl", "datasets"), "liger": ("trl", "datasets", "liger_kernel")}
QUICK_SECONDS = 170
QUICK_STEPS, STEPS = 9, 25  # a side that is stopped counts from its second group of steps on
MODELS: dict[str, dict[str, Any]] = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 512, "tie_word_embeddings": True},
    "tiny teacher": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "num_key_value_heads": 1, "vocab_size": 520, "tie_word_embeddings": False},
}  # fmt: skip


class Shape(NamedTuple):
    """A pair of models. ``checkpointing``: whether all sides recompute activations, which the larger pair needs. ``rows``
    of a micro-batch, by side.
    """

    student: str
    teacher: str
    checkpointing: bool
    rows: dict[str, int]


SHAPES = {
    "0.5B<-1.5B": Shape("0.5B", "1.5B", False, {"limbeck": 8, "trl": 4, "liger": 8}),
    "1.5B<-7B": Shape("1.5B", "7B", True, {"limbeck": 8, "trl": 4, "liger": 4}),
}
TINY = {"tiny": Shape("tiny", "tiny teacher", False, {"limbeck": 8, "trl": 4, "liger": 8})}


class Data(NamedTuple):
    """``words`` of the tokenizer, ``length`` of a full row, median length of a ``short`` document, rows of each file."""

    words: int
    length: int
    short: int
    full_rows: int
    short_rows: int


GPU_DATA, TINY_DATA = Data(151_665, 1024, 148, 256, 3000), Data(500, 64, 12, 32, 200)
ROWS_PER_STEP = 16


def parameters(model: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(inputs, outputs, number) of the weight matrices of a model, the head included."""
    hidden, inner, layers = model["hidden_size"], model["intermediate_size"], model["num_hidden_layers"]
    grouped = hidden // model["num_attention_heads"] * model["num_key_value_heads"]
    return [
        (hidden, hidden, 2 * layers),
        (hidden, grouped, 2 * layers),
        (hidden, inner, 2 * layers),
        (inner, hidden, layers),
        (hidden, model["vocab_size"], 1),
    ]


def operations_per_token(shape: Shape) -> int:
    """Of the matrix products: 2 for each parameter of the teacher, 6 for each of the student."""
    student, teacher = (
        sum(a * b * n for a, b, n in parameters(MODELS[name])) for name in (shape.student, shape.teacher)
    )
    return 6 * student + 2 * teacher


def prepare(folder: Path, names: set[str], data: Data, device: str) -> None:
    """Write the models with random weights, a tokenizer with one token per word, and both files of rows, unless they are
    there.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, data.words)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        chat_template="{% for m in messages %}{{ m['content'] + (' </s>' if m['role'] == 'assistant' else ' ') }}{% endfor %}",
    )  # fmt: skip
    common = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 32_768}
    for name in sorted(names):
        if (folder / name / "tokenizer.json").exists():  # which is written last
            continue
        torch.manual_seed(len(name))
        config = LlamaConfig(**MODELS[name], **common, dtype="bfloat16")
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        model.save_pretrained(folder / name)
        del model
        tokenizer.save_pretrained(folder / name)
    rng = random.Random(0)

    def row(tokens: int) -> str:
        ids = [f"w{rng.randrange(3, data.words)}" for _ in range(tokens - 1)]
        start = max(1, tokens // 4)
        return json.dumps({"question": " ".join(ids[:start]), "answer": " ".join(ids[start:])}) + "\n"

    def short() -> int:
        return min(data.length, max(8, round(data.short * rng.lognormvariate(0, 0.6))))

    if not (folder / "packed.jsonl").exists():
        (folder / "full.jsonl").write_text("".join(row(data.length) for _ in range(data.full_rows)))
        (folder / "packed.jsonl").write_text("".join(row(short()) for _ in range(data.short_rows)))
    if device == "cuda":
        torch.cuda.empty_cache()  # the sides need the memory


def run_side(job: dict[str, Any], limit: float, device: str) -> dict[str, Any]:
    """Run one side in a process of its own. Returns what it measured, and a ``status`` that is ok or says why not.

    A side that is stopped by its limit, or fails later, counts if it has taken enough steps.
    """
    missing = [name for name in NEEDED.get(job["side"], ()) if find_spec(name) is None]
    if missing:
        return {"status": f"not installed: {', '.join(missing)}"}
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    caches = {name: f"{job['cache']}/{name.lower()}" for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", **caches}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    status = "ok"
    with (out / "log.txt").open("w") as log:
        command = [sys.executable, str(HERE / "step_gpu_sides.py"), json.dumps(job)]
        try:
            code = subprocess.run(
                command, env=environment, stdout=log, stderr=log, timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code, status = 0, f"stopped after {limit:.0f} s"
    if code:
        lines = [line.strip() for line in (out / "log.txt").read_text().splitlines() if line.strip()]
        failed = [line for line in lines if "out of memory" in line.lower()]
        status = "out of memory" if failed else f"failed: {lines[-1] if lines else 'without output'}"
    found = {"status": status} if status == "ok" else {"status": status, "log": (out / "log.txt").read_text()[-3000:]}
    if job["side"] == "products":
        result = out / "result.json"
        return found | (json.loads(result.read_text()) if result.exists() else {})
    return found | summary(out / "steps.jsonl")


def summary(path: Path) -> dict[str, Any]:
    """The medians of the groups of steps after the first; empty if there are none. The first step took what the first group
    took longer than one step less would have.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    first, *warm = [json.loads(line) for line in lines if line.endswith("}")] or [None]
    if not warm:
        return {}
    seconds = statistics.median(group["seconds"] / group["count"] for group in warm)
    return {
        "seconds": seconds,
        "tokens_per_second": sum(group["tokens"] / group["count"] for group in warm) / len(warm) / seconds,
        "peak_gb": warm[-1]["peak_gb"],
        "reserved_gb": warm[-1]["reserved_gb"],
        "first_step_seconds": first["seconds"] - (first["count"] - 1) * seconds,
        "steps": sum(group["count"] for group in (first, *warm)),
    }


def compare(
    args: argparse.Namespace, name: str, shape: Shape, data: Data, folder: Path, deadline: float
) -> Iterator[dict[str, Any]]:
    """The results of all sides of one pair of models, each when it is measured."""
    bf16 = "bf16" if args.device == "cuda" else "fp32"
    student, teacher = MODELS[shape.student], MODELS[shape.teacher]
    checkpointing = shape.checkpointing if args.checkpointing is None else args.checkpointing == "on"
    common = {
        "student": str(folder / shape.student), "teacher": str(folder / shape.teacher), "length": data.length,
        "steps": args.steps, "dtype": bf16, "checkpointing": checkpointing, "profile": args.profile,
        "overrides": args.set, "bodies": not args.quick, "matrices": [parameters(student), parameters(teacher)],
        "micro_batch": shape.rows["limbeck"], "rows_per_step": ROWS_PER_STEP,
    }  # fmt: skip

    caches = Path(tempfile.mkdtemp(prefix="cache-", dir=folder))

    def run(side: str, rows: str, **more: Any) -> dict[str, Any]:
        out = Path(tempfile.mkdtemp(prefix=f"{side}-{rows}-", dir=folder))
        job = {**common, "side": side, "rows": rows, "out": str(out), "cache": str(caches / side), **more}
        limit = min(args.limit, deadline - time.monotonic())
        found = run_side(job, limit, args.device) if limit > 5 else {"status": "no time was left"}
        result = {
            "side": side,
            "shape": name,
            "rows": rows,
            "micro_batch": job["micro_batch"],
            **found,
            "out": str(out),
        }
        print(f"  {name} {rows} {side}: {result['status']}", flush=True)
        if result["status"].startswith("failed"):
            print(result["log"], flush=True)
        return result

    peak = None
    if "products" in args.sides:
        products = run("products", "full")
        peak = products.get("peak_flops")
        if peak and "seconds" in products:
            products["matmul_share"] = products["operations"] / products["seconds"] / peak
        yield products
    for rows in args.rows:
        for side in (side for side in SIDES[1:] if side in args.sides):
            # TRL pads short documents to two to three times their tokens.
            micro_batch = shape.rows[side] // (2 if rows == "packed" and side != "limbeck" else 1)
            result = run(side, rows, micro_batch=micro_batch, file=str(folder / f"{rows}.jsonl"))
            while result["status"] == "out of memory" and micro_batch > 1:
                micro_batch //= 2
                result = run(side, rows, micro_batch=micro_batch, file=str(folder / f"{rows}.jsonl"))
            if peak and "seconds" in result:
                work = operations_per_token(shape) * result["tokens_per_second"]
                result["matmul_share"] = work / peak
            yield result


def add_ratios(results: list[dict[str, Any]]) -> None:
    """Add Limbeck's tokens per second divided by those of other sides with the same models and rows."""

    def case(result: dict[str, Any], side: str) -> tuple[str, ...]:
        return result["shape"], result["rows"], side

    speeds = {case(result, result["side"]): result.get("tokens_per_second") for result in results}
    for result in results:
        for other in ("trl", "liger") if result["side"] == "limbeck" else ():
            theirs, ours = speeds.get(case(result, other)), result.get("tokens_per_second")
            if theirs and ours:
                result[f"times_{other}"] = ours / theirs


def planned(shape: Shape, data: Data, options: argparse.Namespace, folder: Path) -> str:
    """What ``limbeck plan`` predicts of Limbeck's step with full rows on one H100."""
    from limbeck.config import load_mapping
    from limbeck.plan.estimate import make_plan
    from limbeck.plan.gpus import GPUS

    models: dict[str, dict[str, Any]] = {}
    for role, name in (("student", shape.student), ("teacher", shape.teacher)):
        (folder / role).mkdir(exist_ok=True)
        outline = {**MODELS[name], "model_type": "llama", "max_position_embeddings": 32_768}
        (folder / role / "config.json").write_text(json.dumps(outline))
        model_args = {"model_name_or_path": str(folder / role), "from_scratch": True, "dtype": "bf16"}
        models[role] = {"model_args": model_args}
    recomputes = shape.checkpointing if options.checkpointing is None else options.checkpointing == "on"
    micro_batch = shape.rows["limbeck"]
    models["student"]["model_args"]["disable_gradient_checkpointing"] = not recomputes
    models["student"]["data_args"] = {"file_name": "full.jsonl"}
    models["student"]["training_args"] = {
        "per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": ROWS_PER_STEP // micro_batch,
    }  # fmt: skip
    run = {"output_dir": "out", "tokenizer": "tokenizer", "sequence_length": data.length, "distill_on_prompt": True}
    plan = make_plan(load_mapping({**run, **options.set, **models}).config, 1, 1, GPUS["H100"])
    speed = ROWS_PER_STEP * data.length / plan.expected
    return f"planned: peak {plan.needed / 1e9:.1f} GB, {plan.expected:.3f} s/step, {speed:.0f} tokens/s"


COLUMNS = [
    ("s/step", "seconds", "{:.4f}"), ("tokens/s", "tokens_per_second", "{:.0f}"), ("peak GB", "peak_gb", "{:.1f}"),
    ("reserved", "reserved_gb", "{:.1f}"), ("first step s", "first_step_seconds", "{:.1f}"),
    ("of matmul peak", "matmul_share", "{:.1%}"), ("x TRL", "times_trl", "{:.2f}"), ("x Liger", "times_liger", "{:.2f}"),
    ("micro-batch", "micro_batch", "{}"), ("steps", "steps", "{}"),
]  # fmt: skip


def show(results: list[dict[str, Any]]) -> None:
    """Print the results as a table."""
    print(f"\n{'':32}" + "".join(f"{title:>15}" for title, *_ in COLUMNS))
    for result in results:
        values = [style.format(result[key]) if result.get(key) is not None else "-" for _, key, style in COLUMNS]
        label = f"{result['shape']} {result['rows']} {result['side']}"
        print(f"{label:32}" + "".join(f"{value:>15}" for value in values))
        if result["status"] != "ok":
            print(f"{'':32}  {result['status']}")
        for key, value in result.get("parts", {}).items():
            print(f"{'':32}  {key}: {value}")


def setting(text: str) -> tuple[str, Any]:
    """``key=value``, where the value is JSON, or else a string."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"the smaller models, at most {QUICK_SECONDS} s in all")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="the sides to run; all by default")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="the pairs of models; both by default")
    parser.add_argument("--rows", nargs="+", choices=("full", "packed"), default=["full", "packed"])
    parser.add_argument("--steps", type=int, help=f"steps of each side; {STEPS} by default, {QUICK_STEPS} with --quick")
    parser.add_argument("--limit", type=float, help="seconds that a side may take; 240 by default, 90 with --quick")
    parser.add_argument("--folder", type=Path, help="keeps models, data and logs; temporary by default")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--checkpointing", choices=("on", "off"), help="of all sides; by default as the models need it")
    parser.add_argument("--set", type=setting, nargs="+", default=[], metavar="KEY=VALUE", help="options of Limbeck")
    parser.add_argument(
        "--plan", action="store_true", help="print what limbeck plan predicts, which needs no GPU, and end"
    )
    parser.add_argument("--profile", action="store_true", help="write the kernels of one step to profile.txt of a side")
    parser.add_argument("--tiny", action="store_true", help="tiny models and rows, to check that the script runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    args.sides = args.sides or (["products", "limbeck"] if args.quick else list(SIDES))
    args.shapes = args.shapes or (["0.5B<-1.5B"] if args.quick else list(SHAPES))
    args.steps = args.steps or (6 if args.tiny else QUICK_STEPS if args.quick else STEPS)
    args.limit = args.limit or (90 if args.quick else 240)
    args.set = dict(args.set)
    if args.profile and args.folder is None:
        parser.error("--profile needs --folder, where the profiles are kept")
    return args


def main() -> None:
    args = parse()
    deadline = time.monotonic() + (QUICK_SECONDS if args.quick else float("inf"))
    import torch

    if args.plan:
        for name in args.shapes:
            with tempfile.TemporaryDirectory() as temporary:
                print(name, planned(SHAPES[name], GPU_DATA, args, Path(temporary)), flush=True)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("This measures a GPU, and there is none here; --tiny --device cpu checks that the script runs.")
    shapes = TINY if args.tiny else {name: SHAPES[name] for name in args.shapes}
    data = TINY_DATA if args.tiny else GPU_DATA
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        begun = time.monotonic()
        prepare(
            folder, {name for shape in shapes.values() for name in (shape.student, shape.teacher)}, data, args.device
        )
        print(f"{device}, torch {torch.__version__}; prepared in {time.monotonic() - begun:.0f} s", flush=True)
        results: list[dict[str, Any]] = []
        report = {"device": device, "torch": torch.__version__, "overrides": args.set, "results": results}
        for name, shape in shapes.items():
            for result in compare(args, name, shape, data, folder, deadline):
                results.append(result)
                add_ratios(results)
                if args.json:  # what is there stands if this process is ended
                    write_json(args.json, report | {"goals": step_goals(results)})
        show(results)
        print("", *lines(step_goals(results)), sep="\n")
    wanted = [result for result in results if not result["status"].startswith("not installed")]
    sys.exit(any("seconds" not in result for result in wanted))


if __name__ == "__main__":
    main()
