"""Whatever a row contains, it is read or refused with a sentence; never another error, and no hang.

``LIMBECK_FUZZ=2000 pytest tests/data/test_random_rows.py`` tries 2000 rows of each format, 14 000 in all.
"""

import copy
import random

import pytest
from fuzzing import count, mutate, refusal

from limbeck.data import tokenize_rows

COUNT = count(default=120)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CHAT = [
    {"role": "system", "content": "Count."},
    {"role": "user", "content": [{"type": "text", "text": "How many?"}]},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "12", "name": "add", "tool_call_id": "1"},
    {"role": "assistant", "content": "12", "reasoning_content": "By the tool.", "train": True, "weight": 2.0},
]
SHARED = [
    {"from": "human", "value": "How many?"},
    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    {"from": "observation", "value": "12"},
    {"from": "gpt", "value": "12"},
]
ROWS = {
    "question_answer": {"question": "How many?", "answer": "12", "system": "Count.", "prompt": "Say.", "weight": 2.0},
    "messages": {"messages": CHAT, "tools": TOOLS, "weight": 0.5},
    "conversations": {"conversations": SHARED, "tools": '[{"name": "add"}]', "system": "Count."},
    "prompt_completion": {"prompt": CHAT[:2], "completion": [{"role": "assistant", "content": "12"}], "weight": "1"},
    "plain_completion": {"prompt": "How many?", "completion": "12", "system": None},
    "instruction": {"instruction": "Count.", "input": "eggs", "output": "12", "history": [["Hi", "Hello"]]},
    "text": {"text": "How many? 12", "weight": 3},
}
NAMES = sorted({name for row in ROWS.values() for name in row} | {"id", "domain"})
SETTINGS = [
    {},
    {"prompts_only": True},
    {"template": "chatml"},
    {"template": "qwen3"},
    {"train_on": "last"},
    {"domain_key": "domain"},
]


@pytest.mark.parametrize("form", list(ROWS))
def test_a_mutated_row_is_read_or_refused_with_a_sentence(form, native_tokenizer):
    chance, refused = random.Random(f"fuzz/{form}"), 0
    for _ in range(COUNT):
        row, changes = copy.deepcopy(ROWS[form]), chance.choice(SETTINGS)
        for _ in range(chance.choice([0, 1, 1, 1, 2, 3])):
            mutate(row, chance, NAMES)
        found = refusal(lambda: tokenize_rows([row], native_tokenizer, **changes), f"{changes} {row!r}")  # noqa: B023
        assert found is None or found.startswith(("rows:0", "None of the 1 rows")), f"{found} {row!r}"
        refused += found is not None
    assert 0 < refused < COUNT
