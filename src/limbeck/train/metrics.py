"""Metrics between two log lines. Values stay on the device until a line is written, which costs one copy."""

from __future__ import annotations

import difflib
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from limbeck.config import DistillConfig
from limbeck.data.batch import StepBatch
from limbeck.errors import LimbeckError
from limbeck.objectives import DistillationLoss
from limbeck.strategies.world import World
from limbeck.train.on_policy import GAP_METRICS, LogProbGap
from limbeck.train.student import StudentLoss

FEATURES = "features/"
_STUDENT_METRICS = ("val/loss", "val/ce", "val/student_entropy", "student/val_loss")
_TEACHER_METRICS = ("val/kd", "val/teacher_entropy", "val/top1_agreement")
_WHOLE_DISTRIBUTION = ("/teacher_entropy", "/top1_agreement")
"""Ends of the names of metrics that need the probabilities of all tokens, or of the teacher's most likely ones."""
METRICS_OF_ANSWERS = _STUDENT_METRICS + _TEACHER_METRICS
"""Metrics of validation rows with an answer."""
WRITTEN_METRICS = ("val/accuracy", "val/mean_length", "val/truncated_share", "val/reward_unknown_share")
"""Metrics of validation by writing."""
_LOSS_NAMES = DistillationLoss._fields


class LossSums:
    """Sums of losses over micro-batches, on the device.

    Args:
        device: where the sums are.
        pairs: labels of the pairs of intermediate features, whose losses are summed too.
    """

    def __init__(self, device: torch.device, pairs: Sequence[str] = ()) -> None:
        self._names = (*_LOSS_NAMES, *(f"{FEATURES}{pair}" for pair in pairs))
        self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=device)

    def add(self, loss: StudentLoss) -> None:
        """Add one micro-batch, whose loss is already divided by the count of the global batch."""
        parts = torch.stack([part.detach() for part in loss.distillation])
        self._sums[: len(parts)] += parts
        if loss.features is not None:
            self._sums[len(parts) :] += loss.features

    def read(self, world: World, divisor: float) -> dict[str, float]:
        """Return the sums over all ranks divided by ``divisor``, by name, and reset them. Collective."""
        values = (world.sum(self._sums) / divisor).tolist()
        self._sums.zero_()
        return dict(zip(self._names, values, strict=True))


class Timer:
    """Measures the seconds of named sections. An inner section pauses the outer one. On a GPU, sections are measured by
    events on its stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: list[tuple[str, Any]] = []  # name and start of the open sections, the innermost last

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Add the time of the enclosed block to ``name``. The section "data" is always measured on the host."""
        if self._open:
            self._count(*self._open[-1])
        self._open.append((name, self._now(name)))
        try:
            yield
        finally:
            self._count(*self._open.pop())
            if self._open:
                outer = self._open[-1][0]
                self._open[-1] = (outer, self._now(outer))

    def read(self) -> dict[str, float]:
        """Return the seconds by section since the previous call."""
        if self._events:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self._seconds[name] += start.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = dict(self._seconds), defaultdict(float), []
        return seconds

    def _now(self, name: str) -> Any:
        if not self._on_gpu or name == "data":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _count(self, name: str, start: Any) -> None:
        if isinstance(start, float):
            self._seconds[name] += time.perf_counter() - start
        else:
            self._events.append((name, start, self._now(name)))


class StepMetrics:
    """Training metrics between two log lines, by their public names.

    Args:
        pairs: labels of the pairs of intermediate features.
        gap: compares log-probabilities of written tokens, if there are any.
        has_topk: the divergence is over some tokens of the vocabulary only.
        has_policy: the loss has a policy gradient.
    """

    def __init__(
        self,
        world: World,
        pairs: Sequence[str] = (),
        gap: LogProbGap | None = None,
        has_topk: bool = False,
        has_policy: bool = False,
    ) -> None:
        self.world, self._gap, self._has_topk, self._has_policy = world, gap, has_topk, has_policy
        self.losses = LossSums(world.device, pairs)
        self.timer = Timer(world.device)
        self._norm = torch.zeros((), device=world.device)
        self._begin()

    def _begin(self) -> None:
        self._steps = self._tokens = self._supervised = self._slots = 0
        self._aligned = 0.0
        self._started = time.perf_counter()

    @contextmanager
    def exclude_from_timing(self) -> Iterator[None]:
        """Exclude the enclosed block from step time and throughput."""
        begun = time.perf_counter()
        yield
        self._started += time.perf_counter() - begun

    def count(self, batch: StepBatch, grad_norm: Tensor) -> None:
        """Add one optimizer step."""
        self._steps += 1
        self._tokens += batch.num_tokens
        self._supervised += batch.num_supervised
        self._slots += batch.num_slots
        self._aligned += (batch.aligned_share or 0.0) * batch.num_supervised
        self._norm += grad_norm

    def line(self, learning_rate: float, has_teacher: bool) -> dict[str, float]:
        """Return the means over the steps since the previous line, NaN if unknown, and reset them. Collective."""
        n = max(self._steps, 1)
        # Each rank has divided its loss by its part of the supervised tokens, so the mean over the ranks that compute a loss
        # is the global mean.
        losses, seconds = self.losses.read(self.world, n * self.world.dims.loss_ranks), self.timer.read()
        norm = self._norm.item() / n
        self._norm.zero_()
        wall = time.perf_counter() - self._started
        line = {
            "train/loss": losses["loss"],
            "train/train_student_loss": losses["ce"],
            "train/student_entropy": losses["student_entropy"],
            "student/lr": learning_rate,
            "student/grad_norm": norm,
            "train/tokens": float(self._tokens),
            "train/supervised_tokens": float(self._supervised),
            "train/tokens_per_second": self._tokens / wall,
            "train/padding_share": 1 - self._tokens / max(self._slots, 1),
            **{f"time/{name}": seconds.get(name, 0.0) / n for name in ("data", "teacher", "student", "optimizer")},
            "time/step": wall / n,
            "train/teacher_forward": seconds.get("teacher", 0.0) / n,
            "train/student_train_step": (seconds.get("student", 0.0) + seconds.get("optimizer", 0.0)) / n,
            "train/step_train": wall / n,
            "system/peak_memory_gb": peak_memory_gb(self.world.device),
        }
        if has_teacher:
            line["train/train_distill_loss"] = losses["kd"]
            line["train/teacher_entropy"] = losses["teacher_entropy"]
            line["train/top1_agreement"] = losses["top1_agreement"]
            if self._has_topk:
                line["train/topk_mass"] = losses["topk_mass"]
                line["train/topk_overlap"] = losses["topk_overlap"]
        if self._has_policy:
            line["train/policy_loss"] = losses["policy"]
        if self._gap is not None:
            line |= self._gap.read(self.world)
        pairs = {f"train/{name}": value for name, value in losses.items() if name.startswith(FEATURES)}
        if pairs:
            line |= pairs | {f"train/{FEATURES}total": sum(pairs.values()) / len(pairs)}
        if self._aligned:
            line["train/aligned_share"] = self._aligned / max(self._supervised, 1)
        self._begin()
        return line


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process so far, in 10⁹ bytes: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def check_best_metric(config: DistillConfig, world: World, of_source: Iterable[str] | None = None) -> None:
    """Raise LimbeckError unless ``checkpoint_config.best_metric`` is a metric of the run. Collective.

    of_source: names of the metrics of the step source. Before there is one, only names that begin with val/, train/ or student/
    are checked.
    """
    metric, teacher = config.checkpoint_config.best_metric, config.has_teacher
    if metric is None or (of_source is None and not metric.startswith(("val/", "train/", "student/"))):
        return
    validation = [*_STUDENT_METRICS, *(_TEACHER_METRICS if teacher else ())]
    if config.effective_validation.rollout is not None:
        validation += WRITTEN_METRICS
    topk = teacher and config.logits_topk > 0
    training = StepMetrics(world, has_topk=topk, has_policy=config.has_policy_gradient).line(0.0, teacher)
    aligned = config.cross_tokenizer != "off"
    optional = {
        "train/aligned_share": aligned,
        f"train/{FEATURES}total": bool(config.features.pairs),
        **dict.fromkeys(GAP_METRICS, config.rollout is not None and not config.rollout.truncates and not aligned),
    }
    known = [*validation, *(of_source or ()), *training, *(name for name, given in optional.items() if given)]
    if config.teacher_source == "ray" and config.teacher_signal == "sampled_token":
        known = [name for name in known if not name.endswith(_WHOLE_DISTRIBUTION)]
    named_later = (  # by a submodule, or by an environment
        *((f"train/{FEATURES}",) if config.features.pairs else ()),
        *(("rollout/reward_reasons/",) if config.rollout is not None and config.rollout.environment else ()),
    )
    if metric not in known and not metric.startswith(named_later):
        close = difflib.get_close_matches(metric, known, n=1)
        raise LimbeckError(
            f"checkpoint_config.best_metric = {metric!r} is not a metric of this run; "
            f"{f'did you mean {close[0]}? There ' if close else 'there '}are {', '.join(known)}."
        )
