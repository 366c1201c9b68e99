"""The parts of the demo and of ``benchmarks/on_policy.py``: data, models, training runs and answers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.config import DistillConfig
from limbeck.demo.problems import Problem, final_answer, generate, write_jsonl
from limbeck.evaluate.text_model import TextModel
from limbeck.rollout.generator import SamplingParams
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
    further_steps: int = 200
    further_rate: float = 1e-3
    packs_per_step: int = 10  # of 128 tokens
    problems_per_pack: int = 3
    distill_loss_weight: float = 0.9


@dataclass(frozen=True)
class Trained:
    """A run and its wall-clock seconds."""

    result: RunResult
    seconds: float


def make_data(folder: Path, sizes: Sizes, seed: int) -> list[Problem]:
    """Writes the files of teacher and student, and of held-out problems, which are returned."""
    held_out = generate(sizes.held_out, seed + 1)
    seen = {problem.question for problem in held_out}
    write_jsonl(held_out, folder / "held-out.jsonl")
    write_jsonl(generate(sizes.teacher_problems, seed + 2, exclude=seen), folder / "teacher.jsonl")
    write_jsonl(generate(sizes.student_problems, seed + 3, exclude=seen, slips=sizes.slips), folder / "student.jsonl")
    return held_out


def make_tokenizer(folder: Path, vocab_size: int) -> Any:
    """Trains a byte-level BPE tokenizer on the teacher's file."""
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


def make_model(folder: Path, tokenizer: Any, shape: tuple[int, int], seed: int) -> None:
    """Saves a Llama model with random weights. shape: layers and hidden size."""
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


def train(
    folder: Path,
    name: str,
    sizes: Sizes,
    seed: int,
    start: Path,
    *,
    weight: float,
    steps: int | None = None,
    rate: float = 3e-3,
    teacher: Trained | None = None,
    **settings: Any,
) -> Trained:
    """One run of the ordinary pipeline, from the checkpoint ``start``. With weight 0, only cross-entropy is trained, and a
    teacher is used in validation. ``settings`` are further keys of its configuration.
    """
    steps = sizes.student_steps if steps is None else steps
    problems = "teacher" if teacher is None else "student"
    rollout = settings.get("rollout")
    # With rollouts, a batch counts samples instead of packs.
    batch = sizes.packs_per_step * (sizes.problems_per_pack if rollout else 1)
    config = DistillConfig.model_validate(
        {
            "exp_name": name,
            "seed": seed,
            "output_dir": str(folder / name),
            "student_pretrain": str(start),
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
                    "per_device_train_batch_size": batch,
                },
                "data_args": {
                    "file_name": [str(folder / "data" / f"{problems}.jsonl")],
                    "cache_path": str(folder / "data" / "tokens"),
                },
                "use_sequence_packing": True,
                "infer_batch_size": 64,
            },
            "teacher": {"model_args": {"dtype": "fp32"}},
            "validation": {"data_args": {"file_name": [str(folder / "data" / "held-out.jsonl")]}},
            **settings,
        }
    )
    begun = time.perf_counter()
    result = DistillPipeline(config).run()
    if result.stopped_by:
        raise KeyboardInterrupt
    return Trained(result, time.perf_counter() - begun)


def go_on(
    folder: Path,
    name: str,
    sizes: Sizes,
    seed: int,
    distilled: Trained,
    teacher: Trained,
    *,
    kd_objective: str = "forward_kl",
    **rollout: Any,
) -> Trained:
    """Further steps of the distilled student, without cross-entropy. ``rollout`` are keys of that section; runs that differ
    in them only have the same prompts.
    """
    return train(
        folder,
        name,
        sizes,
        seed,
        distilled.result.student,
        weight=1.0,
        steps=sizes.further_steps,
        rate=sizes.further_rate,
        teacher=teacher,
        kd_objective=kd_objective,
        rollout={"max_new_tokens": 64, **rollout},
    )


def write_answers(student: Path, problems: Iterable[Problem]) -> list[str]:
    """Returns the model's greedy answers."""
    model = TextModel.load(str(student), device="cpu")
    prompts = [model.prompt([{"role": "user", "content": problem.question}]) for problem in problems]
    completions = model.write(prompts, SamplingParams(max_tokens=64, temperature=0.0), slots=125)
    return [model.decode(completion) for completion in completions]


def is_right(answer: str, problem: Problem) -> bool:
    """Whether the final number of ``answer`` is right."""
    return final_answer(answer) == final_answer(problem.answer)


def exact_match(answers: Sequence[str], problems: Sequence[Problem]) -> float:
    """The share of ``answers`` with the right final number."""
    return sum(map(is_right, answers, problems)) / len(problems)
