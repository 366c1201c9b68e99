"""Values of single positions follow their labels through packing, padding and context parallelism."""

import numpy as np
import pytest
import torch

from limbeck.data import StreamSettings
from limbeck.data.examples import Examples
from limbeck.data.masks import IGNORE
from limbeck.data.stream import make_step

ROWS = 8


def examples():
    """Rows in which everything about a position is a function of its label."""
    random = np.random.default_rng(0)
    lengths = random.integers(3, 12, ROWS)
    labels = np.arange(1, lengths.sum() + 1, dtype=np.int32)
    labels[random.random(len(labels)) < 0.4] = IGNORE
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels[offsets[1:] - 2] = 1 + offsets[1:] - 2  # every row has a supervised position
    labels[offsets[1:] - 1] = IGNORE
    return Examples(
        np.ones_like(labels),
        labels,
        offsets,
        weights=(labels * 0.5).astype(np.float32),
        objectives=(np.arange(ROWS) % 3).astype(np.int8),
        sampled_log_probs=(-labels / 100).astype(np.float32),
        advantages=(labels * 2).astype(np.float32),
    )


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_values_of_positions_stay_with_their_labels(packing, shards):
    rows = examples()
    settings = StreamSettings(
        seed=0, sequence_length=24, pad_id=0, per_device_batch_size=4, accumulation_steps=2, packing=packing
    )
    step = make_step(rows, settings)
    row_of = {
        int(label): row
        for row in range(ROWS)
        for label in rows.labels[rows.offsets[row] : rows.offsets[row + 1]]
        if label != IGNORE
    }
    seen = []
    for micro_batch in step.micro_batches:
        for rank in range(shards):
            part, own = micro_batch.shard_for_context_parallel(rank, shards)
            labels = part.labels.flatten()[part.supervised]
            assert torch.equal(own.labels.flatten()[own.supervised], labels)
            for batch in (part.to(torch.device("cpu")), own):
                assert torch.equal(batch.weights, labels * 0.5)
                assert torch.equal(batch.sampled_log_probs, -labels.double().div(100).float())
                assert torch.equal(batch.advantages, labels * 2.0)
                for which, indices in enumerate(batch.objectives):
                    assert [row_of[int(label)] % 3 for label in labels[indices]] == [which] * len(indices)
                assert sorted(torch.cat(batch.objectives).tolist()) == list(range(len(labels)))
            seen += labels.tolist()
    assert sorted(seen) == sorted(row_of)


def test_a_step_without_such_values_has_none():
    rows = examples()
    plain = Examples(rows.tokens, rows.labels, rows.offsets)
    settings = StreamSettings(
        seed=0, sequence_length=40, pad_id=0, per_device_batch_size=4, accumulation_steps=2, packing=False
    )
    for batch in make_step(plain, settings).micro_batches:
        assert batch.objectives is batch.sampled_log_probs is batch.advantages is batch.weights is None
