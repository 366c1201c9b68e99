"""The programs that megatron_step.py compares, each in as many processes as it has ranks.

Rank 0 reads requests from stdin and starts the others, answers with the seconds, and all of them compute.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from step import ROWS, TIME
from step_sides import peak_mb, resident_mb, send

REQUESTS = ("", "step", "student", "teacher", "memory")


def start_ranks(ranks: int) -> list[subprocess.Popen]:
    """Make this process rank 0, unless it is another, and start the others."""
    if "RANK" in os.environ:
        return []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    os.environ.update(shared, RANK="0", LOCAL_RANK="0")
    return [
        subprocess.Popen(
            [sys.executable, *sys.argv], env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )
        for rank in range(1, ranks)
    ]  # fmt: skip


def turns() -> Iterator[str]:
    """Yield rank 0's requests on every rank, except ``memory``, which is handled here."""
    import torch
    import torch.distributed as dist

    before, is_main = resident_mb(), dist.get_rank() == 0
    if is_main:
        send(ready=1)
    while True:
        what = torch.tensor(REQUESTS.index(sys.stdin.readline().strip()) if is_main else 0)
        dist.broadcast(what, 0)
        request = REQUESTS[int(what)]
        if request == "memory":
            growth = torch.tensor(peak_mb() - before)
            dist.all_reduce(growth)
            if is_main:
                send(growth_mb=growth.item())
        elif request:
            yield request
        else:
            return


def take_turns(works: dict[str, Callable[[], object]]) -> None:
    for what in turns():
        begun = time.perf_counter()
        works[what]()
        if os.environ["RANK"] == "0":
            send(seconds=time.perf_counter() - begun)
    sys.exit()


def limbeck(folder: Path, dtype: str, steps: int, ranks: int) -> None:
    from limbeck.config import DistillConfig
    from limbeck.train import loop

    step = loop.train_step
    loop.train_step = lambda run: take_turns({"step": lambda: step(run)})
    sizes = {"tensor_model_parallel_size": ranks}
    config = DistillConfig(
        student_pretrain=str(folder / "student"), teacher_pretrain=str(folder / "teacher"), output_dir=str(folder / "run"),
        sequence_length=TIME, max_steps=steps + 1, save_steps=0, logging_steps=10**6, track_with="none",
        distill_on_prompt=True, distill_loss_weight=1.0, temperature_squared=False,
        compile_loss=True,  # as ``auto`` decides for a run of a few hundred such steps
        student={
            "model_args": {"dtype": dtype, "disable_gradient_checkpointing": True},
            "training_args": {"per_device_train_batch_size": ROWS, "learning_rate": 1e-4},
            "strategy_args": {"strategy_name": "megatron_train", "strategy_config": sizes},
            "data_args": {"file_name": [str(folder / "data.jsonl")], "cache_path": str(folder / "cache")},
        },
        teacher={
            "model_args": {"dtype": dtype},
            "strategy_args": {"strategy_name": "megatron_infer", "strategy_config": sizes},
        },
    )  # fmt: skip
    loop.DistillPipeline(config).run()


def megatron(folder: Path, dtype: str, steps: int, ranks: int, *, distils: bool = False) -> None:
    """Megatron alone, or with ``distils`` ModelOpt's plugin."""
    from itertools import cycle

    import torch
    from modelopt_on_cpu import Trainer, build_gpt
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from limbeck.data.batch import Batch
    from limbeck.strategies.megatron.core import ProcessGroups
    from limbeck.strategies.parallel_dims import ParallelDims

    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    rows = [json.loads(line) for line in (folder / "data.jsonl").open()]
    ids = torch.tensor([tokenizer(row["question"] + " " + row["answer"] + " </s>")["input_ids"] for row in rows])
    ends = torch.full((ROWS, 1), -100)
    batches = cycle([Batch.of(part, torch.cat((part[:, 1:], ends), 1), None, part.numel()) for part in ids.split(ROWS)])
    groups = ProcessGroups(ParallelDims(tp=ranks))
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    student, teacher = (
        build_gpt(AutoModelForCausalLM.from_pretrained(folder / name, dtype=precision), groups)
        for name in ("student", "teacher")
    )
    trainer = Trainer(student, teacher if distils else None, {}, groups, lr=1e-4, clip_grad=1.0, weight_decay=0.0,
                      bf16=dtype == "bf16", params_dtype=precision)  # fmt: skip
    positions = torch.arange(TIME).expand(ROWS, TIME)

    @torch.no_grad()
    def compute_teacher() -> None:
        teacher.eval()(next(batches).input_ids, positions, None)

    train = lambda: trainer.step([next(batches)])  # noqa: E731
    take_turns({"step": train} if distils else {"student": train, "teacher": compute_teacher})


def modelopt(folder: Path, dtype: str, steps: int, ranks: int) -> None:
    megatron(folder, dtype, steps, ranks, distils=True)


if __name__ == "__main__":
    side, where, precision, count, size = sys.argv[1:]
    others = start_ranks(int(size))
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "strategies"))
    import megatron_on_cpu  # noqa: F401
    import torch
    import torch.distributed

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(size)))
    torch.distributed.init_process_group("gloo")
    try:
        {"limbeck": limbeck, "modelopt": modelopt, "megatron": megatron}[side](
            Path(where), precision, int(count), int(size)
        )
    finally:
        for other in others:
            other.wait()
