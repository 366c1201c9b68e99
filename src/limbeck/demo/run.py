"""``limbeck demo``: shows the effect of distillation in minutes on a CPU.

A teacher trains on many clean arithmetic word problems. A smaller student has a small file in which some answers are wrong. It
is trained twice from the same weights, on the same batches, for the same number of steps: with cross-entropy only, and
distilled. Both are measured on unseen problems. All runs use the ordinary pipeline with fixed settings.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.config import DistillConfig
from limbeck.demo.problems import Problem, final_answer, generate, write_jsonl
from limbeck.errors import LimbeckError
from limbeck.models.logs import configure_logging
from limbeck.report import Answer, Level, ResultRow, ResultTable, Sample, load_run, write_report
from limbeck.train.loop import DistillPipeline
from limbeck.train.result import RunResult

TEMPLATE = "{% for m in messages %}{{ m['content'] + (eos_token if m['role'] == 'assistant' else '\n') }}{% endfor %}"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the demo, chosen so that it takes less than five minutes on two cores."""

    teacher_problems: int = 20_000
    student_problems: int = 1_000
    held_out: int = 500
    slips: float = 0.3
    vocab_size: int = 512
    teacher: tuple[int, int] = (4, 160)  # layers, hidden size
    student: tuple[int, int] = (2, 128)
    teacher_steps: int = 1_200
    student_steps: int = 600
    packs_per_step: int = 10  # of 128 tokens, three problems each
    distill_loss_weight: float = 0.9


def run_demo(folder: Path, *, seed: int = 0, sizes: Sizes | None = None) -> Path:
    """Runs the demo in ``folder``, prints its table and returns the path of its report."""
    from rich.console import Console

    configure_logging()
    sizes, console, begun = sizes or Sizes(), Console(), time.perf_counter()
    _clear(folder)
    held_out = _make_data(folder / "data", sizes, seed)
    tokenizer = _make_tokenizer(folder / "data", sizes.vocab_size)
    for name, shape in (("teacher", sizes.teacher), ("student", sizes.student)):
        _make_model(folder / "start" / name, tokenizer, shape, seed)

    console.rule("[bold]1 of 3: a teacher, from many clean problems", align="left")
    teacher = _train(folder, "teacher", sizes, seed, "teacher", steps=sizes.teacher_steps, rate=3e-3, weight=0.0)
    console.rule("[bold]2 of 3: the student alone, from the small file", align="left")
    alone = _train(folder, "cross-entropy", sizes, seed, "student", weight=0.0, teacher=teacher)
    console.rule("[bold]3 of 3: the same student on the same file, distilled", align="left")
    weight = sizes.distill_loss_weight
    distilled = _train(folder, "distilled", sizes, seed, "student", weight=weight, teacher=teacher)

    runs = {"Teacher": teacher, "Cross-entropy only": alone, "Distilled": distilled}
    written = {name: _write_answers(run.result.student, held_out) for name, run in runs.items()}
    table = _table(runs, written, held_out)
    samples = _samples(written, held_out)
    page = write_report(
        [load_run(folder / name) for name in ("cross-entropy", "distilled")],
        folder / "report.html",
        title="The same student, without and with a teacher",
        summary=_summary(sizes),
        table=table,
        samples=samples,
        levels=[Level("val/ce", "teacher", teacher.result.metrics["val/ce"])],
    )
    _print_table(console, table)
    console.print(f"{time.perf_counter() - begun:.0f} seconds in all. Report: {page}", highlight=False, soft_wrap=True)
    return page


@dataclass(frozen=True)
class _Trained:
    result: RunResult
    seconds: float


def _clear(folder: Path) -> None:
    marker = folder / ".limbeck-demo"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise LimbeckError(f"{folder} contains files that are not from a demo; choose an empty folder with --output.")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    marker.touch()


def _make_data(folder: Path, sizes: Sizes, seed: int) -> list[Problem]:
    held_out = generate(sizes.held_out, seed + 1)
    seen = {problem.question for problem in held_out}
    write_jsonl(held_out, folder / "held-out.jsonl")
    write_jsonl(generate(sizes.teacher_problems, seed + 2, exclude=seen), folder / "teacher.jsonl")
    write_jsonl(generate(sizes.student_problems, seed + 3, exclude=seen, slips=sizes.slips), folder / "student.jsonl")
    return held_out


def _make_tokenizer(folder: Path, vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train([str(folder / "teacher.jsonl")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE, padding_side="left"
    )


def _make_model(folder: Path, tokenizer: Any, shape: tuple[int, int], seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden = shape
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train(
    folder: Path,
    name: str,
    sizes: Sizes,
    seed: int,
    start: str,
    *,
    weight: float,
    steps: int | None = None,
    rate: float = 3e-3,
    teacher: _Trained | None = None,
) -> _Trained:
    """One run of the ordinary pipeline. With weight 0, only cross-entropy is trained, and a teacher is used in validation."""
    steps = sizes.student_steps if steps is None else steps
    config = DistillConfig.model_validate(
        {
            "exp_name": name,
            "seed": seed,
            "output_dir": str(folder / name),
            "student_pretrain": str(folder / "start" / start),
            "teacher_pretrain": None if teacher is None else str(teacher.result.student),
            "sequence_length": 128,
            "max_steps": steps,
            "save_steps": 0,
            "logging_steps": 10,
            "eval_steps": max(1, steps // 8),
            "distill_loss_weight": weight,
            "track_with": "none",
            "student": {
                "model_args": {"dtype": "fp32", "disable_gradient_checkpointing": True},
                "training_args": {
                    "learning_rate": rate,
                    "lr_scheduler_type": "cosine",
                    "warmup_ratio": 0.05,
                    "weight_decay": 0.01,
                    "per_device_train_batch_size": sizes.packs_per_step,
                },
                "data_args": {
                    "file_name": [str(folder / "data" / f"{start}.jsonl")],
                    "cache_path": str(folder / "data" / "tokens"),
                },
                "use_sequence_packing": True,
                "infer_batch_size": 64,
            },
            "teacher": {"model_args": {"dtype": "fp32"}},
            "validation": {"data_args": {"file_name": [str(folder / "data" / "held-out.jsonl")]}},
        }
    )
    begun = time.perf_counter()
    result = DistillPipeline(config).run()
    if result.stopped_by:
        raise KeyboardInterrupt
    return _Trained(result, time.perf_counter() - begun)


def _write_answers(student: Path, problems: Iterable[Problem], batch: int = 125) -> list[str]:
    """Returns the model's greedy answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(student).eval(), AutoTokenizer.from_pretrained(student)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": problem.question}], tokenize=False)
        for problem in problems
    ]
    answers: list[str] = []
    with torch.no_grad():
        for first in range(0, len(prompts), batch):
            inputs = tokenizer(
                prompts[first : first + batch], return_tensors="pt", padding=True, add_special_tokens=False
            )
            inputs.pop("token_type_ids", None)
            output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
            answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def _right(answer: str, problem: Problem) -> bool:
    return final_answer(answer) == final_answer(problem.answer)


def _table(runs: dict[str, _Trained], written: dict[str, list[str]], held_out: list[Problem]) -> ResultTable:
    def row(label: str, key: str, better: Any, note: str, *, percent: bool = False) -> ResultRow:
        values = tuple(run.result.metrics.get(key) for run in runs.values())
        return ResultRow(label, values, better, note, percent)

    exact = tuple(
        sum(_right(answer, problem) for answer, problem in zip(written[name], held_out, strict=True)) / len(held_out)
        for name in runs
    )
    return ResultTable(
        tuple(runs),
        (
            row("Held-out loss", "val/ce", "lower", "cross-entropy per answer token, nats"),
            row("Divergence from the teacher", "val/kd", "lower", "KL(teacher ‖ student) per answer token, nats"),
            row(
                "Top-1 agreement", "val/top1_agreement", "higher", "with the teacher's most likely token", percent=True
            ),
            ResultRow("Exact match", exact, "higher", f"final number, {len(held_out)} unseen problems", True),
            ResultRow("Seconds", tuple(run.seconds for run in runs.values()), "lower", "training and validation"),
        ),
        reference="Teacher",
    )


def _samples(written: dict[str, list[str]], held_out: list[Problem]) -> list[Sample]:
    """Returns four held-out problems, drawn at random."""
    chosen = random.Random(0).sample(range(len(held_out)), 4)
    return [
        Sample(
            held_out[i].question,
            held_out[i].answer,
            tuple(
                Answer(name, answers[i], _right(answers[i], held_out[i]))
                for name, answers in written.items()
                if name != "Teacher"
            ),
        )
        for i in chosen
    ]


def _summary(sizes: Sizes) -> str:
    return (
        f"The teacher learned from {sizes.teacher_problems:,} clean problems. The student, a fraction of its size, has "
        f"{sizes.student_problems:,}, and in {sizes.slips:.0%} of them the worked answer contains an error. With "
        f"cross-entropy only, the student learns these errors too; distilled, it also learns from the teacher's distribution. "
        f"Both students start from the same weights and train on the same batches for {sizes.student_steps} steps."
    )


def _print_table(console: Any, table: ResultTable) -> None:
    from rich.table import Table

    drawn = Table(title="On unseen problems", title_justify="left")
    drawn.add_column("")
    for column in table.columns:
        drawn.add_column(column, justify="right")
    for row in table.rows:
        cells = ("–" if value is None else f"{value:.1%}" if row.percent else f"{value:.3f}" for value in row.values)
        drawn.add_row(row.label, *cells)
    console.print(drawn)
