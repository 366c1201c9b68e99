"""docs/data.md names every key of the data, and what it shows as a configuration is one."""

import re
from pathlib import Path

import pytest
import yaml

from limbeck.config import load_mapping
from limbeck.config.schema import DataArgs, SourceArgs

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
PACKING = (
    "use_sequence_packing", "packing_algorithm", "use_dynamic_batching_in_train", "max_tokens_per_microbatch_in_train",
    "sequence_length_round_in_train", "group_by_length",
)  # fmt: skip


@pytest.mark.parametrize("key", sorted({*DataArgs.model_fields, *SourceArgs.model_fields, *PACKING}))
def test_every_key_is_named(key):
    assert re.search(rf"\b{key}\b", TEXT)


def test_configurations_are_accepted():
    blocks = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
    for block in blocks:
        whole = {"student_pretrain": "s", "teacher_pretrain": "t", **yaml.safe_load(block)}
        assert not load_mapping(whole).notices
    assert blocks
