"""Saves and reads a checkpoint of 0.5 billion parameters on a CPU, beside a plain synchronous save of the same state.

    python benchmarks/checkpoint.py                   # 494 million parameters: 13 GB of memory, 21 GB of disk in --folder
    python benchmarks/checkpoint.py --layers 2        # smaller

The student has the sizes of Qwen2.5-0.5B, float32 masters and moments of AdamW, and is exported in bfloat16. The plain save is
``torch.save`` of masters and moments and transformers' ``save_pretrained``, flushed to disk, without checksums. The loop is
stopped during all of it; here, until ``Saver.save`` returns. Memory is the growth of the peak of the process over its memory
before the save.

Then, the bytes that the first of 1, 2, 4 and 8 FSDP ranks reads when it resumes from that checkpoint, and the most that a rank
reads to compare files with their checksums, which ranks share file by file. Whole files are what ``safetensors.load_file`` in
every rank reads, and checksums that every rank compares.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import Qwen2Config, Qwen2ForCausalLM

from limbeck.config import DistillConfig
from limbeck.demo.training import make_tokenizer
from limbeck.strategies.optimizer import make_optimizer
from limbeck.strategies.shards import local_box
from limbeck.strategies.torch_engine import TorchEngine
from limbeck.strategies.world import World
from limbeck.train.build.student import Student
from limbeck.train.checkpoint import MANIFEST, load_checkpoint
from limbeck.train.saving import Saver


class Root(nn.Module):
    """The student without a loss: nothing is trained here."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def make_saver(folder: Path, layers: int, *, async_save: bool, engine: TorchEngine | None = None) -> Saver:
    args = {"model_args": {"dtype": "bf16"}, "data_args": {"file_name": "benchmark"}}
    config = DistillConfig(
        student_pretrain="benchmark", teacher_pretrain="benchmark", output_dir=str(folder), max_ckpt_to_keep=1,
        checkpoint_config={"async_save": async_save}, student=args,
    )  # fmt: skip
    world = World(0, 1, torch.device("cpu"))
    if engine is None:
        sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
        model = Qwen2ForCausalLM(
            Qwen2Config(**sizes, num_hidden_layers=layers, vocab_size=151_936, tie_word_embeddings=True)
        )
        root = Root(model)
        engine = TorchEngine(root, make_optimizer(root, config.student.training_args), world)
        for shards in engine.state_dict().optimizer.values():
            for shard in shards:
                shard.read().normal_()  # memory of zeros would be copied faster
    model = engine.root.model
    student = Student(engine, model, SimpleNamespace(), model.num_parameters())  # type: ignore[arg-type]
    (folder / "teacher.jsonl").write_text("{}")
    return Saver(config, world, student, make_tokenizer(folder, 300), None)


def plain_save(saver: Saver, folder: Path) -> None:
    engine, model = saver._student.engine, saver._student.model
    state = engine.state_dict()
    whole = {key: part.read() for kind in (state.model, state.optimizer) for key, (part,) in kind.items()}
    torch.save(whole, folder / "state.pt")
    model.save_pretrained(folder, state_dict={name: value.bfloat16() for name, value in model.state_dict().items()})
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def memory(field: str) -> float:
    """GB of this process: ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def measure(save: Callable[[], None], finish: Callable[[], None] = lambda: None) -> tuple[float, float, float]:
    """Seconds until ``save`` returns, seconds until ``finish`` does, and GB of additional memory at the peak."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    before, begun = memory("VmRSS"), time.perf_counter()
    save()
    stalled = time.perf_counter() - begun
    finish()
    return stalled, time.perf_counter() - begun, memory("VmHWM") - before


@contextmanager
def fake_ranks(size: int) -> Iterator[Any]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield init_device_mesh("cpu", (size,), mesh_dim_names=("dp_shard",))
    finally:
        dist.destroy_process_group()


def bytes_of_rank(path: Path, ranks: int) -> tuple[int, int]:
    """Bytes of the state that the first of ``ranks`` ranks reads, and the most bytes of files that a rank compares."""
    checkpoint, read = load_checkpoint(path), 0
    with fake_ranks(ranks) as mesh:
        for tensor in (*checkpoint.masters.values(), *checkpoint.optimizer.values()):
            shape = tuple(tensor.shape)
            if not shape:
                read += tensor[()].nbytes
                continue
            local = torch.empty(-(-shape[0] // ranks), *shape[1:], device="meta")
            like = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=local.stride())
            read += tensor[local_box(like)].nbytes
    files = [file["size"] for file in json.loads((path / MANIFEST).read_text())["files"].values()]
    return read, max(sum(files[rank::ranks]) for rank in range(ranks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        (folder / "plain").mkdir()
        (folder / "out").mkdir()
        behind = make_saver(folder / "out", options.layers, async_save=True)
        waiting = make_saver(folder / "out", options.layers, async_save=False, engine=behind._student.engine)  # type: ignore[arg-type]
        parameters = behind._student.num_parameters
        state = 12 * parameters / 1e9
        print(f"{parameters / 1e6:.0f} million parameters; masters and moments are {state:.2f} GB", flush=True)
        plain = measure(lambda: plain_save(behind, folder / "plain"))
        for file in (folder / "plain").iterdir():
            file.unlink()
        synchronous = measure(lambda: waiting.save(1, {}, {}))
        asynchronous = measure(lambda: behind.save(2, {}, {}), behind.wait)
        for name, (stalled, total, more) in (
            ("plain", plain),
            ("async_save: false", synchronous),
            ("async_save: true", asynchronous),
        ):
            print(
                f"{name:>18}: the loop waits {stalled:6.2f} s ({stalled / plain[0]:.2f} of plain); on the disk after "
                f"{total:6.2f} s ({total / plain[0]:.2f}); {more:5.2f} GB more memory"
            )
        path = folder / "out" / "checkpoint-2"
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        training = sum(file.stat().st_size for file in (path / "training").iterdir())
        print(f"resume, whole files in every rank: {training / 1e9:.2f} GB of state, {size / 1e9:.2f} GB to compare")
        for ranks in (1, 2, 4, 8):
            read, compared = bytes_of_rank(path, ranks)
            part = f"{read / training:.3f} and {compared / size:.3f} of whole"
            print(f"{ranks:>3} ranks: {read / 1e9:.2f} GB of state, {compared / 1e9:.2f} GB to compare ({part})")


if __name__ == "__main__":
    main()
