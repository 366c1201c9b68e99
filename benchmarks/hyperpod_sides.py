"""The programs that hyperpod.py compares. Each takes one training step per request from stdin, and prints the seconds and the
tokens that are not padding.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path

from step_sides import send, take_turns, turns

ACCUMULATION = 2


def limbeck(folder: Path, dtype: str, steps: int, length: int, *overrides: str) -> None:
    """Our script's run."""
    from transformers import AutoTokenizer

    from limbeck.config import load_arguments

    arguments = {
        "teacher_model": folder / "teacher", "student_model": folder / "student", "dataset_name": folder / "rows.jsonl",
        "max_length": length, "gradient_accumulation_steps": ACCUMULATION, "output_dir": folder / "run",
        "chat_template": AutoTokenizer.from_pretrained(folder / "student").chat_template,
        "logging_steps": 10**6, "save_steps": 0,
    }  # fmt: skip
    argv = [word for flag, value in arguments.items() for word in (f"--{flag}", str(value))]
    fixed = [
        f"max_steps={steps + 1}", "track_with=none", f"student.data_args.cache_path={folder / 'cache'}",
        "student.model_args.disable_gradient_checkpointing=true",
    ]  # fmt: skip
    precision = ["--no-bf16"] if dtype == "fp32" else ["--bf16"]
    take_turns(load_arguments([*argv, *precision, *fixed, *overrides], "hyperpod").config)


def reference(folder: Path, dtype: str, steps: int, length: int) -> None:
    """The arithmetic of the sample in plain PyTorch: rows padded to ``length`` and trained on everywhere, whole logits of both
    models, and float32 masters for bf16 weights, as DeepSpeed keeps them.
    """
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    temperature, alpha = 2.0, 0.5
    torch.set_num_threads(os.cpu_count() or 1)
    precision = torch.float32 if dtype == "fp32" else torch.bfloat16
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=precision) for name in ("student", "teacher")
    )
    student.train()
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    roles = {"human": "user", "gpt": "assistant"}
    texts = []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        turns_of_row = [{"role": roles[t["from"]], "content": t["value"]} for t in json.loads(line)["conversations"]]
        system = {"role": "system", "content": "You are a helpful assistant."}
        texts.append(tokenizer.apply_chat_template([system, *turns_of_row], tokenize=False))
    padded = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    rows = itertools.cycle(zip(padded["input_ids"], padded["attention_mask"].sum(1).tolist(), strict=True))
    weights = list(student.parameters())
    masters = weights if dtype == "fp32" else [weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=2e-5, weight_decay=0.05)

    def pad_logits(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return F.pad(one, (0, max(0, other.shape[-1] - one.shape[-1])))

    def step() -> int:
        tokens = 0
        for ids, count in itertools.islice(rows, ACCUMULATION):
            inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None]), "labels": ids[None]}
            of_student = student(**inputs)
            with torch.no_grad():
                of_teacher = teacher(**inputs)
            z_s = pad_logits(of_student.logits, of_teacher.logits)
            z_t = pad_logits(of_teacher.logits, of_student.logits)
            kd = F.kl_div(F.log_softmax(z_s / temperature, -1), F.softmax(z_t / temperature, -1), reduction="batchmean")
            loss = alpha * kd * temperature**2 / length + (1 - alpha) * of_student.loss
            loss.backward()
            tokens += count
        for weight, master in zip(weights, masters, strict=True):
            if weight is not master:
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                if weight is not master:
                    weight.copy_(master)
        return tokens

    for _ in turns():
        begun = time.perf_counter()
        tokens = step()
        send(seconds=time.perf_counter() - begun, tokens=tokens)


if __name__ == "__main__":
    side, where, precision, count, length, *options = sys.argv[1:]
    program = reference if side == "sample" else limbeck
    program(Path(where), precision, int(count), int(length), *options)
