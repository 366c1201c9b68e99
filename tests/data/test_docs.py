"""docs/data.md and its translation name every key of the data, and what they show as a configuration is one."""

import re
from pathlib import Path

import pytest
import yaml

from limbeck.config import load_mapping
from limbeck.config.schema import DataArgs, SourceArgs

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {name: (DOCS / name).read_text(encoding="utf-8") for name in ("data.md", "data.zh.md")}
PACKING = (
    "use_sequence_packing", "packing_algorithm", "use_dynamic_batching_in_train", "max_tokens_per_microbatch_in_train",
    "sequence_length_round_in_train", "group_by_length",
)  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("key", sorted({*DataArgs.model_fields, *SourceArgs.model_fields, *PACKING}))
def test_every_key_is_named(page, key):
    assert re.search(rf"\b{key}\b", PAGES[page], re.ASCII)


@pytest.mark.parametrize("page", PAGES)
def test_configurations_are_accepted(page):
    blocks = re.findall(r"```yaml\n(.*?)```", PAGES[page], re.S)
    for block in blocks:
        whole = {"student_pretrain": "s", "teacher_pretrain": "t", **yaml.safe_load(block)}
        assert not load_mapping(whole).notices
    assert blocks


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.zh.md")), ids=lambda path: path.name)
def test_a_translation_shows_the_code_of_its_original(page):
    """Blocks and tables, apart from comments and the words around them."""
    original = page.with_name(page.name.replace(".zh", "")).read_text(encoding="utf-8")
    text = page.read_text(encoding="utf-8")

    def code(markdown):
        blocks = re.findall(r"^```.*?^```", markdown, re.S | re.M)
        return [re.sub(r"\s*#.*", "", block) for block in blocks]

    assert code(text) == code(original)
    assert text.count("\n#") == original.count("\n#")
    assert text.count("\n|") == original.count("\n|")
