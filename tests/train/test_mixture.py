"""Whole runs on a mixture of sources: its shares, and resuming."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from runs import assert_same_weights, forget_after

from limbeck import DistillPipeline, LimbeckError
from limbeck.data import IGNORE
from limbeck.strategies.world import World
from limbeck.train.build.data import make_data
from limbeck.train.step_source import DatasetSource

PACKED = {
    "student.use_sequence_packing": True,
    "student.training_args.per_device_train_batch_size": 2,
}


@pytest.fixture
def mixed(tmp_path):
    """Two sources of different formats and sizes with weights 3 and 1; 40 of their 48 rows are in an epoch."""
    first, second = tmp_path / "sums.jsonl", tmp_path / "chat.jsonl"
    sums = [{"question": f"What is {i} plus 1?", "answer": f"{i + 1}"} for i in range(36)]
    chat = [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": "yes " * (i % 9 + 1) + "!"},
            ]
        }
        for i in range(12)
    ]
    for path, rows in ((first, sums), (second, chat)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def changes(*weights: float, **more) -> dict:
        sources = [{"path": str(first), "weight": weights[0]}, {"path": str(second), "weight": weights[1]}]
        return {
            "student.data_args.file_name": None,
            "student.data_args.sources": sources,
            "student.data_args.num_samples": 40,
            "student.training_args.num_train_epochs": 20,
            **more,
        }

    return changes


def rows_of(step, tokenizer) -> list[str]:
    """The supervised text of each row of a step."""
    found = []
    for batch in step.micro_batches:
        if batch.documents is None:
            found += [tokenizer.decode(row[row != IGNORE]) for row in batch.labels]
        else:
            found += [tokenizer.decode(row[row != IGNORE]) for row in batch.labels[0].split(list(batch.documents))]
    return found


@pytest.mark.parametrize("packing", [{}, PACKED], ids=["rows", "packed"])
def test_every_epoch_has_the_configured_shares(configure, mixed, packing):
    # One row or pack in a step, so that no remainder is left over at the end of an epoch.
    config = configure(**mixed(3, 1), **{**packing, "student.training_args.per_device_train_batch_size": 1})
    world = World(0, 1, torch.device("cpu"))
    data = make_data(config, world)
    source = DatasetSource(config, world, data)
    seen: Counter[str] = Counter()
    for epoch in range(3):
        assert source.state_dict()["epoch"] == epoch
        taken: Counter[str] = Counter()
        while source.state_dict()["epoch"] == epoch:
            taken.update(rows_of(source.next(0), data.tokenizer))
        assert sum(count for text, count in taken.items() if "yes" in text) == 10
        assert sum(taken.values()) == 40
        seen.update(taken)
    source.close()
    assert "each epoch takes 40 rows" in data.report
    assert {count for text, count in seen.items() if "yes" not in text} == {2, 3}  # 90 times one of 36


@pytest.mark.parametrize("packing", [{}, PACKED], ids=["rows", "packed"])
def test_a_run_on_a_mixture_resumes_exactly_and_only_with_the_same_mixture(configure, mixed, tmp_path, packing):
    config = configure(**mixed(3, 1), **packing)
    DistillPipeline(config).run()
    out = Path(config.output_dir)
    shutil.copytree(out, tmp_path / "full", symlinks=True)
    forget_after(out, 10)
    with pytest.raises(LimbeckError, match="use the same data, mixture"):
        DistillPipeline(configure(**mixed(1, 1), **packing, resume_from_checkpoint=True)).run()
    with pytest.raises(LimbeckError, match="use the same data, mixture"):
        DistillPipeline(configure(**mixed(3, 1.2), **packing, resume_from_checkpoint=True)).run()
    assert DistillPipeline(configure(**mixed(3, 1), **packing, resume_from_checkpoint=True)).run().step == 12
    assert_same_weights(tmp_path / "full" / "checkpoint-12", out / "checkpoint-12")
