"""The fullest micro-batch of a run: every row is as long as it can be, and all its tokens are supervised."""

from __future__ import annotations

import torch

from limbeck.config import DistillConfig
from limbeck.data.batch import Batch
from limbeck.models import ModelSource, model_limits


def longest_row(config: DistillConfig) -> tuple[int, str | None]:
    """Tokens of the longest row that both models take, and a notice if ``sequence_length`` is larger.

    A run accepts a larger ``sequence_length`` as long as the rows of its data fit the models.
    """
    length, notice = config.sequence_length, None
    for role, worker in (("student", config.student), ("teacher", config.teacher if config.has_teacher else None)):
        if worker is None:
            continue
        source = ModelSource.from_args(worker.model_args, role)
        positions, _ = model_limits(source)
        if positions is not None and positions < length:
            length = positions
            notice = (
                f"sequence_length = {config.sequence_length} is more than {source.name} has positions for, so rows of "
                f"{positions} tokens are planned; training refuses data with longer rows."
            )
    return length, notice


def full_micro_batch(config: DistillConfig, length: int) -> tuple[Batch, int]:
    """A micro-batch of rows of ``length`` tokens, and the number of micro-batches of a rank in a step."""
    training = config.student.training_args
    rows, count = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if config.max_tokens_per_microbatch:
        fitting = max(1, config.max_tokens_per_microbatch // length)
        rows, count = min(fitting, rows * count), -(-rows * count // fitting)
    return make_micro_batch(rows, length, packed=config.student.use_sequence_packing), count


def make_micro_batch(rows: int, length: int, *, packed: bool) -> Batch:
    """``rows`` rows of ``length`` supervised tokens; packed, they lie end to end in one."""
    ids, everywhere = torch.zeros(rows, length, dtype=torch.long), torch.arange(rows * length)
    if not packed:
        return Batch(ids, ids, None, rows * length, everywhere)
    ids, positions = ids.view(1, -1), everywhere.view(1, -1) % length
    return Batch(ids, ids, positions, rows * length, everywhere, documents=(length,) * rows)
