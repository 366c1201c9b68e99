"""Intermediate features: what three pairs add to a training step, and whether anything outlives one.

    python benchmarks/features.py                   # on a GPU where there is one, in bf16
    python benchmarks/features.py --rounds 60

Three things take turns: a whole step (teacher, student, optimizer) without features, the same step with three pairs of
different losses and widths, and the pair losses alone (rows, projections, losses, both passes) on inner states that were kept.
The first ratio is the second over the sum of the other two: above 1 is what taking the states out costs.

Then 200 steps (of shorter rows) with Python's garbage collector off: whatever a step leaves behind in a cycle would stay, and
show. Memory is what the allocator has handed out and not got back: on a CPU glibc's own count, on a GPU torch's.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from limbeck.data import IGNORE, Batch
from limbeck.models import HiddenStateCapture, body, output_head
from limbeck.objectives import FeatureLosses, Objective
from limbeck.strategies.host_memory import keep_freed_pages
from limbeck.teachers import LocalTeacher
from limbeck.train.features import Features
from limbeck.train.student import StudentWithLoss

ROWS, TIME, VOCAB = 4, 256, 8_000
COMMON = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": VOCAB, "max_position_embeddings": 2048}
TEACHER = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 2048, **COMMON}
STUDENT = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 1024, **COMMON}
PAIRS = [
    ("model.layers.0.mlp", "model.layers.1.mlp", "mse"),
    ("model.layers.2", "model.layers.5", "smooth_l1"),
    ("model.norm", "model.norm", "cosine"),
]


def make_batch(device: torch.device, time: int) -> Batch:
    """Rows of different lengths, the second half of each supervised."""
    torch.manual_seed(0)
    ids = torch.randint(3, VOCAB, (ROWS, time))
    ends = torch.tensor([time - time // 16 * i for i in range(ROWS)])
    place = torch.arange(time).expand(ROWS, time)
    real = place < ends[:, None]
    labels = torch.where(real & (place >= ends[:, None] // 2), ids.roll(-1, 1), IGNORE)
    return Batch.of(ids, labels, None, int(real.sum()), real=real.flatten().nonzero().squeeze(-1)).to(device)


class Bench:
    """Both models, and the three things that are timed."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(1)
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = LlamaForCausalLM(LlamaConfig(**STUDENT)).to(device)
        teacher = LlamaForCausalLM(LlamaConfig(**TEACHER)).to(device, self.dtype).requires_grad_(False)
        trunk = body(teacher)
        student, names, losses = zip(*PAIRS, strict=True)
        ours, theirs = (
            HiddenStateCapture.from_names(body(model), student, "student"),
            HiddenStateCapture.from_names(trunk, names, "teacher"),
        )
        probes = zip(ours.probe(body(model)), theirs.probe(trunk), strict=True)
        widths = [(s.shape[-1], t.shape[-1]) for s, t in probes]
        self.features = Features(
            FeatureLosses(losses, widths), ours, student, weight=1.0, supervised_only=False
        ).to(device)  # fmt: skip
        objective = Objective.of("forward_kl", kd_weight=0.5)
        self.plain = StudentWithLoss(model, objective, VOCAB)
        self.featured = StudentWithLoss(model, objective, VOCAB, self.features)
        self.teacher = LocalTeacher(trunk, output_head(teacher), 0)
        self.tapped = LocalTeacher(trunk, output_head(teacher), 0)
        self.tapped.tap(theirs, supervised_only=False)
        self.batch = make_batch(device, TIME)
        self.optimizer = torch.optim.AdamW(self.featured.parameters(), lr=1e-5, fused=True)
        with torch.no_grad(), self.autocast(), ours.capture() as found:
            body(model)(self.batch.input_ids, use_cache=False)
        self.kept = {name: output.detach() for name, output in found.items()}
        self.signal = self.tapped.signals(self.batch)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16)

    def _step(self, student: StudentWithLoss, teacher: LocalTeacher) -> None:
        signal = teacher.signals(self.batch)
        with self.autocast():
            loss = student(self.batch, signal, float(self.batch.supervised.numel()), float(self.batch.num_tokens))
        loss.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def without(self) -> None:
        self._step(self.plain, self.teacher)

    def with_features(self) -> None:
        self._step(self.featured, self.tapped)

    def pairs_alone(self) -> None:
        states = {name: state.clone().requires_grad_() for name, state in self.kept.items()}
        begun = self.clock()
        with self.autocast():
            self.features(states, self.batch, self.signal, 1.0, float(self.batch.num_tokens)).mean().backward()
        self.alone = self.clock() - begun  # without the clones
        self.features.zero_grad(set_to_none=True)

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, what: Callable[[], None]) -> float:
        begun = self.clock()
        what()
        return self.alone if what == self.pairs_alone else self.clock() - begun

    def held_mb(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) / 2**20
        return _mallinfo2().in_use / 2**20

    def growth(self, what: Callable[[], None], steps: int) -> str:
        for _ in range(20):
            what()
        held, alive = self.held_mb(), tensors()
        for _ in range(steps):
            what()
        return f"{tensors() - alive:+d} tensors, {self.held_mb() - held:+.2f} MB"


class _Mallinfo2(ctypes.Structure):
    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "in_use", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def _mallinfo2() -> _Mallinfo2:
    ask = ctypes.CDLL(None).mallinfo2  # glibc 2.33 and later
    ask.restype = _Mallinfo2
    return ask()


def tensors() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=200, help="steps with the garbage collector off")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_pages()
    bench = Bench(device)
    contestants = [bench.without, bench.with_features, bench.pairs_alone]
    seconds: dict[str, list[float]] = {what.__name__: [] for what in contestants}
    for turn in range(args.rounds + 5):
        for place in range(3):
            what = contestants[(turn + place) % 3]
            taken = bench.seconds(what)
            if turn >= 5:
                seconds[what.__name__].append(taken)
    plain, featured, alone = (statistics.median(times) for times in seconds.values())
    print(f"{device.type}, {bench.dtype}, {ROWS} × {TIME} tokens, {args.rounds} rounds, medians:")
    print(f"  step without features  {plain * 1e3:8.1f} ms")
    print(f"  step with three pairs  {featured * 1e3:8.1f} ms")
    print(f"  pair losses alone      {alone * 1e3:8.1f} ms")
    print(f"  with ÷ (without + alone) = {featured / (plain + alone):.3f}    with ÷ without = {featured / plain:.3f}")

    gc.collect()
    gc.disable()
    bench.batch = make_batch(device, TIME // 8)
    print(
        f"  {args.steps} steps with the garbage collector off, without features: {bench.growth(bench.without, args.steps)}"
    )
    print(
        f"  {args.steps} steps with the garbage collector off, three pairs:      "
        f"{bench.growth(bench.with_features, args.steps)}"
    )


if __name__ == "__main__":
    main()
