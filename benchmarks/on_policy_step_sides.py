"""The two programs that on_policy_step.py compares. Each reads requests from stdin, takes one training step per request, and
prints the seconds of its parts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from step_sides import send, turns

MICRO_BATCH = 8


class Sizes(NamedTuple):
    """dtype: that both models compute in. samples: of a step. max_tokens: of a completion."""

    dtype: str
    samples: int
    max_tokens: int


def finish() -> None:
    """Wait for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(seconds: Counter[str], name: str, function: Any) -> Any:
    """``function``, whose seconds are added to ``name``."""

    def call(*args: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            finish()
            seconds[name] += time.perf_counter() - begun

    return call


def limbeck(folder: Path, steps: int, sizes: Sizes) -> None:
    from limbeck.config import DistillConfig
    from limbeck.teachers.signals import TeacherRequest
    from limbeck.train import loop
    from limbeck.train.build.run import Run

    seconds: Counter[str] = Counter()
    slots: Counter[str] = Counter()
    requests, step = turns(), loop.train_step

    def counted(request: Any) -> Any:
        """``request``, of whose batches the slots of both models and the tokens are counted."""

        def call(batch: Any, spec: Any) -> Any:
            slots.update(
                student=batch.input_ids.numel(),
                teacher=TeacherRequest.from_batch(batch).input_ids.numel(),
                tokens=batch.num_tokens,
            )
            return request(batch, spec)

        return call

    def measured(run: Run) -> None:
        generator = run.source.writer._generator
        if run.step == 0:
            run.teacher.request = counted(run.teacher.request)
            generator.generate = timed(seconds, "writing", generator.generate)
            generator.update_weights = timed(seconds, "weight sync", generator.update_weights)
        if next(requests, None) is None:
            sys.exit()
        seconds.clear()
        slots.clear()
        run.metrics.timer.read()
        begun = time.perf_counter()
        step(run)
        finish()
        whole, parts = time.perf_counter() - begun, run.metrics.timer.read()
        send(
            seconds=whole, teacher=parts["teacher"], student=parts["student"] + parts["optimizer"],
            written=run.source.writer.counts.tokens, writing=seconds["writing"],
            **{"weight sync": seconds["weight sync"]},
            **{f"{role} padding": 1 - slots["tokens"] / slots[role] for role in ("teacher", "student")},
        )  # fmt: skip
        run.source.metrics()  # begins to count anew

    loop.train_step = measured
    config = DistillConfig(
        student_pretrain=str(folder / "student"), teacher_pretrain=str(folder / "teacher"), output_dir=str(folder / "run"),
        sequence_length=512, max_steps=steps + 1, save_steps=0, logging_steps=10**6, track_with="none",
        kd_objective="reverse_kl", distill_loss_weight=1.0, rollout={"max_new_tokens": sizes.max_tokens},
        student={
            "use_sequence_packing": True,
            "model_args": {"dtype": sizes.dtype, "disable_gradient_checkpointing": True},
            "training_args": {
                "per_device_train_batch_size": MICRO_BATCH, "gradient_accumulation_steps": sizes.samples // MICRO_BATCH,
                "learning_rate": 1e-5,
            },
            "data_args": {"file_name": [str(folder / "data.jsonl")], "cache_path": str(folder / "cache")},
        },
        teacher={"model_args": {"dtype": sizes.dtype}},
    )  # fmt: skip
    loop.DistillPipeline(config).run()


def trl(folder: Path, steps: int, sizes: Sizes) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    rows = [tokenizer(json.loads(line)["question"])["input_ids"] for line in (folder / "data.jsonl").open()]
    seconds: Counter[str] = Counter()

    def batch(rows: list[list[int]]) -> dict[str, Any]:
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.clone(),
            "prompts": ids,
            "prompt_attention_mask": mask,
        }

    class SameBatches(GKDTrainer):
        def get_train_dataloader(self):
            return [batch(rows[i : i + MICRO_BATCH]) for i in range(0, len(rows), MICRO_BATCH)]

        @staticmethod
        def generate_on_policy_outputs(model, inputs, generation_config):
            write = timed(seconds, "writing", GKDTrainer.generate_on_policy_outputs)
            ids, mask, labels = write(model, inputs, generation_config)
            seconds["written"] += int((labels != -100).sum())
            return ids, mask, labels

    class TimedSteps(TrainerCallback):
        requests = turns()

        def on_step_begin(self, *args, **kwargs):
            if next(self.requests, None) is None:
                sys.exit()
            seconds.clear()
            self.begun = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            finish()
            whole = time.perf_counter() - self.begun
            student = whole - seconds["writing"] - seconds["teacher"]
            send(
                seconds=whole, student=student, teacher=seconds["teacher"], writing=seconds["writing"],
                written=seconds["written"], **{"weight sync": 0.0},
            )  # fmt: skip

    config = GKDConfig(
        output_dir=str(folder / "trl"), lmbda=1.0, beta=1.0, temperature=1.0, max_new_tokens=sizes.max_tokens,
        bf16=sizes.dtype == "bf16", use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False, per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=sizes.samples // MICRO_BATCH, max_steps=steps + 1, learning_rate=1e-5, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, max_length=256,
    )  # fmt: skip
    load = AutoModelForCausalLM.from_pretrained
    computes = torch.bfloat16 if sizes.dtype == "bf16" else torch.float32
    messages = [
        {"messages": [{"role": "user", "content": "w500"}, {"role": "assistant", "content": "w600"}]}
    ] * sizes.samples
    trainer = SameBatches(
        model=load(folder / "student", dtype=torch.float32), teacher_model=load(folder / "teacher", dtype=computes),
        args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(messages), callbacks=[TimedSteps()],
    )  # fmt: skip
    trainer.teacher_model.forward = timed(seconds, "teacher", trainer.teacher_model.forward)
    trainer.train()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    side, where, dtype, count, device, samples, max_tokens = sys.argv[1:]
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    {"limbeck": limbeck, "trl": trl}[side](Path(where), int(count), Sizes(dtype, int(samples), int(max_tokens)))
