"""The programs that step_gpu.py compares. The argument is a job as JSON; results go to files in the job's folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from side import write_json

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
Job = dict[str, Any]


class Done(Exception):
    """Ends a run after its last measured step, before it writes a checkpoint."""


class StepLog:
    """Writes a line for every ``every`` optimizer steps, and profiles as many more if the job wants that.

    Reading the clock after every step would wait for the GPU each time, which runs do at log lines only.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.steps, self.profiler = job, 0, None
        self.every = max(1, min(5, job["steps"] // 3))
        self.file = (Path(job["out"]) / "steps.jsonl").open("w")

    def record(self, seconds: float, tokens: float) -> None:
        """Call after ``every`` steps, when the GPU is done with them, with their sums."""
        if self.profiler is not None:
            self.write_profile()
            raise Done
        self.steps += self.every
        peak, reserved = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
        memory = {"peak_gb": peak() / 1e9, "reserved_gb": reserved() / 1e9} if ON_GPU else {}
        line = {
            "count": self.every,
            "seconds": seconds,
            "tokens": tokens,
            "peak_gb": None,
            "reserved_gb": None,
            **memory,
        }
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.steps < self.job["steps"]:
            return
        if not self.job["profile"]:
            raise Done
        self.profiler = torch.profiler.profile()
        self.profiler.start()

    def write_profile(self) -> None:
        if ON_GPU:
            torch.cuda.synchronize()
        self.profiler.stop()
        averages = self.profiler.key_averages()
        tables = [
            averages.table(sort_by=f"self_{kind}_time_total", row_limit=40, max_name_column_width=80)
            for kind in (("device", "cpu") if ON_GPU else ("cpu",))
        ]
        (Path(self.job["out"]) / "profile.txt").write_text("\n\n".join(tables))


def limbeck(job: Job) -> None:
    from limbeck import distill
    from limbeck.train.build.run import Run

    log, show = StepLog(job), Run.log

    def record(run: Run, console: Any, line: dict[str, float]) -> dict[str, float]:
        """What the loop does with a line of metrics. A tracker could not end the run, because it has a thread of its own."""
        values = show(run, console, line)
        if ON_GPU:
            torch.cuda.synchronize()
        log.record(values["time/step"] * log.every, values["train/tokens"])
        return values

    Run.log = record
    options = {
        "output_dir": job["out"], "track_with": "none", "logging_steps": log.every, "save_steps": 0,
        "max_steps": 1000,  # a long run, for which compiling is worth its time; the log ends it
        "sequence_length": job["length"], "distill_on_prompt": True, "dtype": job["dtype"],
        "use_sequence_packing": job["rows"] == "packed", "cache_path": f"{job['out']}/cache",
        "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["rows_per_step"] // job["micro_batch"],
        "disable_gradient_checkpointing": not job["checkpointing"], "learning_rate": 1e-5,
        **job["overrides"],
    }  # fmt: skip
    distill(job["student"], job["teacher"], job["file"], **options)


def trl(job: Job) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    log = StepLog(job)
    tokenizer = AutoTokenizer.from_pretrained(job["student"])
    with Path(job["file"]).open() as file:
        texts = [f"{row['question']} {row['answer']} </s>" for row in map(json.loads, file)]
    documents = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
    per_micro_batch, accumulation = job["micro_batch"] * job["length"], job["rows_per_step"] // job["micro_batch"]
    batches = padded(documents, per_micro_batch)
    wanted = (job["steps"] + 2 * log.every) * accumulation
    batches = (batches * (wanted // len(batches) + 1))[:wanted]

    class SameBatches(GKDTrainer):
        def get_train_dataloader(self):
            return batches

    class TimedSteps(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.ended = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % log.every:
                return
            if ON_GPU:
                torch.cuda.synchronize()
            now = time.perf_counter()
            taken = batches[(state.global_step - log.every) * accumulation : state.global_step * accumulation]
            log.record(now - self.ended, sum(int(batch["attention_mask"].sum()) for batch in taken))
            self.ended = time.perf_counter()

    config = GKDConfig(
        output_dir=job["out"], lmbda=0.0, beta=0.0, bf16=job["dtype"] == "bf16", use_cpu=not ON_GPU,
        gradient_checkpointing=job["checkpointing"], use_liger_kernel=job["side"] == "liger",
        per_device_train_batch_size=job["micro_batch"], gradient_accumulation_steps=accumulation,
        max_steps=job["steps"] + 2 * log.every, learning_rate=1e-5, max_length=job["length"],
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    student = AutoModelForCausalLM.from_pretrained(job["student"], dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(job["teacher"], dtype=getattr(torch, LONG[job["dtype"]]))
    if teacher.config.vocab_size != student.config.vocab_size:  # which GKDTrainer refuses; both have rows to spare
        teacher.resize_token_embeddings(student.config.vocab_size, mean_resizing=False)
    messages = [{"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]}]
    trainer = SameBatches(
        model=student, teacher_model=teacher, args=config, processing_class=tokenizer, callbacks=[TimedSteps()],
        train_dataset=Dataset.from_list(messages * (job["rows_per_step"] * (job["steps"] + 2))),
    )  # fmt: skip
    trainer.train()


LONG = {"bf16": "bfloat16", "fp32": "float32"}


def padded(documents: list[torch.Tensor], tokens: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of documents with at most ``tokens`` real tokens, padded to the longest one."""
    parts: list[list[torch.Tensor]] = [[]]
    for document in documents:
        if parts[-1] and sum(map(len, parts[-1])) + len(document) > tokens:
            parts.append([])
        parts[-1].append(document)
    pad = torch.nn.utils.rnn.pad_sequence
    batches = []
    for part in parts:
        ids, mask = pad(part, batch_first=True), pad([torch.ones_like(ids) for ids in part], batch_first=True)
        labels = pad(part, batch_first=True, padding_value=-100)
        prompts = {"prompts": ids[:, :1], "prompt_attention_mask": mask[:, :1]}
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels, **prompts})
    return batches


def seconds(run: Callable[[], object], repeats: int, best: bool = False) -> float:
    """The mean time of a call after two others, or the time of the fastest one."""
    times = []
    for repeat in range(repeats + 2):
        if ON_GPU and (best or repeat == 2):
            torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        if ON_GPU and (best or repeat == repeats + 1):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times[2:]) if best else sum(times[2:]) / repeats


def highest_rate(size: int, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of several square products of random numbers."""
    a, b, out = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(3))
    return 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out), 30, best=True)


def products(job: Job) -> None:
    dtype = getattr(torch, LONG[job["dtype"]])
    tokens = job["micro_batch"] * job["length"]
    micro_batches = job["rows_per_step"] // job["micro_batch"]
    make = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=dtype)  # noqa: E731
    peak = highest_rate(8192 if ON_GPU else 256, dtype)
    total, operations = 0.0, 0
    for matrices, trained in zip(job["matrices"], (True, False), strict=True):
        for inputs, outputs, number in matrices:
            x, w, y = make(tokens, inputs), make(outputs, inputs), make(tokens, outputs)
            d_x, d_w = torch.empty_like(x), torch.empty_like(w)

            def run(x=x, w=w, y=y, d_x=d_x, d_w=d_w, trained=trained) -> None:
                torch.mm(x, w.t(), out=y)
                if trained:
                    torch.mm(y, w, out=d_x)
                    torch.mm(y.t(), x, out=d_w)

            total += seconds(run, 20 if outputs < 100_000 else 5) * number * micro_batches
            operations += (6 if trained else 2) * tokens * inputs * outputs * number * micro_batches
            del x, w, y, d_x, d_w, run
    all_tokens = tokens * micro_batches
    result = {"seconds": total, "tokens_per_second": all_tokens / total, "operations": operations, "peak_flops": peak}
    result["parts"] = {"matmul peak, TFLOP/s": round(peak / 1e12, 1)}
    write_json(Path(job["out"]) / "result.json", result)  # these stand whatever happens to the bodies
    if job["bodies"]:
        result["parts"] |= bodies(job, micro_batches)
        write_json(Path(job["out"]) / "result.json", result)


def bodies(job: Job, micro_batches: int) -> dict[str, float]:
    """Seconds per step of the models' bodies, by a description."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, LONG[job["dtype"]])
    ids = torch.randint(3, 500, (job["micro_batch"], job["length"]), device=DEVICE)
    load = lambda name: AutoModelForCausalLM.from_pretrained(job[name], dtype=dtype).to(DEVICE).model  # noqa: E731

    def forward_only(model: Any) -> float:
        with torch.no_grad():
            return seconds(lambda: model(ids, use_cache=False), 5)

    found = {"s/step, body of the teacher": forward_only(load("teacher"))}
    student = load("student").train()
    if job["checkpointing"]:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=job["dtype"] == "bf16"):
            loss = student(ids, use_cache=False).last_hidden_state.float().mean()
        loss.backward()

    found[f"s/step, body of the student, forward and backward, {job['dtype']} weights"] = seconds(step, 5)
    student.float()
    student.zero_grad(set_to_none=True)
    found["s/step, the same, float32 masters under autocast"] = seconds(step, 5)
    return {name: round(value * micro_batches, 4) for name, value in found.items()}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    with suppress(Done):
        {"limbeck": limbeck, "trl": trl, "liger": trl, "products": products}[job["side"]](job)
