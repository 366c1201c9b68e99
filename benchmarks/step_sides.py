"""The two programs that step.py compares. Each reads requests from stdin, takes one training step per request, and prints the
seconds.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def send(**values: float) -> None:
    print("@" + json.dumps(values), flush=True)


def turns():
    """Yield every request except ``memory``, which is handled here."""
    before = resident_mb()
    send(ready=1)
    for line in sys.stdin:
        if line.strip() == "memory":
            send(growth_mb=peak_mb() - before)
        else:
            yield line.strip()


def take_turns(config) -> None:
    """Train what a ``DistillConfig`` describes, one step per request. ``parts`` is answered by the work of a step, each part
    measured alone, and the memory of gradients and optimizer.
    """
    import torch

    from limbeck.strategies.base import MicroBatches
    from limbeck.train import loop
    from limbeck.train.build.run import Run
    from limbeck.train.student import TrainInput

    requests = None
    step = loop.train_step

    def held_mb(run: Run, what: str) -> float:
        return sum(tensor.nbytes for tensor in run.engine.held_tensors()[what]) / 2**20

    def parts(run: Run) -> dict[str, float]:
        batch = run.source.next(0)
        begun = time.perf_counter()
        signals = [run.teacher.request(micro, run.signal_spec)(micro) for micro in batch.micro_batches]
        seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        inputs = [TrainInput(*pair, batch.normalizer) for pair in zip(batch.micro_batches, signals, strict=True)]
        for _ in run.engine.forward_backward(MicroBatches(len(inputs), lambda: iter(inputs))):
            pass
        seconds += time.perf_counter() - begun
        gradients = held_mb(run, "gradients")
        begun = time.perf_counter()
        run.engine.step()
        seconds += time.perf_counter() - begun
        return {"seconds": seconds, "gradients_mb": gradients, "optimizer_mb": held_mb(run, "optimizer")}

    def timed(run: Run) -> None:
        nonlocal requests
        requests = requests or turns()
        for what in requests:
            if what == "parts":
                send(**parts(run))
                continue
            waited, tokens = run.metrics.timer._seconds["data"], run.metrics._tokens
            begun = time.perf_counter()
            step(run)
            seconds = time.perf_counter() - begun
            waited = run.metrics.timer._seconds["data"] - waited
            send(seconds=seconds, data=waited, tokens=run.metrics._tokens - tokens)
            return
        sys.exit()

    loop.train_step = timed
    torch.set_num_threads(os.cpu_count() or 1)
    loop.DistillPipeline(config).run()


def limbeck(folder: Path, dtype: str, steps: int) -> None:
    from limbeck.config import DistillConfig

    training = {"per_device_train_batch_size": 4, "learning_rate": 1e-4}
    config = DistillConfig(
        student_pretrain=str(folder / "student"), teacher_pretrain=str(folder / "teacher"), output_dir=str(folder / "run"),
        sequence_length=256, max_steps=steps + 1, save_steps=0, logging_steps=10**6, track_with="none",
        distill_on_prompt=True, compile_loss=True,  # as ``auto`` decides for a run of a few hundred such steps
        student={
            "model_args": {"dtype": dtype, "disable_gradient_checkpointing": True},
            "training_args": training,
            "data_args": {"file_name": [str(folder / "data.jsonl")], "cache_path": str(folder / "cache")},
        },
        teacher={"model_args": {"dtype": dtype}},
    )  # fmt: skip
    take_turns(config)


def trl(folder: Path, dtype: str, steps: int) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    rows = [json.loads(line) for line in (folder / "data.jsonl").open()]
    ids = torch.tensor([tokenizer(row["question"] + " " + row["answer"] + " </s>")["input_ids"] for row in rows])
    torch.set_num_threads(os.cpu_count() or 1)

    class SameBatches(GKDTrainer):
        def get_train_dataloader(self):
            everything = torch.ones(4, ids.shape[1], dtype=torch.long)
            return [
                {"input_ids": part, "attention_mask": everything, "labels": part.clone(),
                 "prompts": part[:, :1], "prompt_attention_mask": everything[:, :1]}
                for part in ids.split(4) * (steps // 16 + 1)
            ]  # fmt: skip

    class TimedSteps(TrainerCallback):
        requests = None

        def on_step_begin(self, *args, **kwargs):
            self.requests = self.requests or turns()
            if next(self.requests, None) is None:
                sys.exit()
            self.begun = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            send(seconds=time.perf_counter() - self.begun)

    config = GKDConfig(
        output_dir=str(folder / "trl"), lmbda=0.0, beta=0.0, bf16=dtype == "bf16", use_cpu=True, gradient_checkpointing=False,
        per_device_train_batch_size=4, max_steps=steps + 1, learning_rate=1e-4, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, max_length=256,
    )  # fmt: skip
    load = lambda name: AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)  # noqa: E731
    messages = [{"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]}] * 8
    trainer = SameBatches(
        model=load("student"), teacher_model=load("teacher"), args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_list(messages), callbacks=[TimedSteps()],
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    side, where, precision, count = sys.argv[1:]
    {"limbeck": limbeck, "trl": trl}[side](Path(where), precision, int(count))
