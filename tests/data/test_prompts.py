"""Prompts for a model that is to write the answers: what it would receive at inference, without anything to learn."""

import json

import numpy as np
import pytest

from limbeck.data import IGNORE, tokenize_files, tokenize_rows
from limbeck.errors import LimbeckError

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
HISTORY = [*ASKED, {"role": "assistant", "content": "12"}, {"role": "user", "content": "eggs?"}]
ROWS = {
    "prompt": ({"prompt": "How many?"}, ASKED[1:]),
    "prompt in turns": ({"prompt": HISTORY}, HISTORY),
    "question": ({"question": "How many?"}, ASKED[1:]),
    "instruction": ({"instruction": "How", "input": "many?"}, [{"role": "user", "content": "How\nmany?"}]),
    "messages": ({"messages": HISTORY}, HISTORY),
    "with an answer": ({"messages": [*HISTORY, {"role": "assistant", "content": "3"}]}, HISTORY),
    "with an empty answer": ({"question": "How many?", "answer": ""}, ASKED[1:]),
    "with a completion": ({"prompt": "How many?", "completion": "12", "system": "Be brief."}, ASKED),
    "sharegpt": ({"conversations": [{"from": "human", "value": "How many?"}]}, ASKED[1:]),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_prompt_equals_the_prompt_at_inference(native_tokenizer, case):
    row, messages = ROWS[case]
    examples, report = tokenize_rows(
        [row, row], native_tokenizer, prompts=True, distill_on_prompt=True, weight_key=None
    )
    wanted = native_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    for i in range(2):
        tokens, labels = examples.row(i)
        assert tokens.tolist() == wanted
        assert (labels == IGNORE).all()
    assert examples.weights is None
    assert (report.supervised_tokens, report.rows, report.dropped) == (0, 2, {})


def test_prompts_are_cached_apart_from_what_is_learned(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": "How many?" * n, "answer": "12"}) + "\n" for n in (1, 2, 30)))
    learned, _ = tokenize_files([path], tokenizer, cache_dir=tmp_path / "cache", sequence_length=64)
    prompts, report = tokenize_files([path], tokenizer, cache_dir=tmp_path / "cache", sequence_length=64, prompts=True)
    assert report.dropped == {"longer than 64 tokens": 1}  # a prompt that is cut asks something else
    assert (len(learned), len(prompts)) == (2, 2)
    for i in range(2):
        np.testing.assert_array_equal(learned.row(i)[0][: len(prompts.row(i)[0])], prompts.row(i)[0])


@pytest.mark.parametrize(
    "row", [{"text": "running"}, {"messages": [{"role": "assistant", "content": "12"}]}, {"messages": ASKED[:1]}]
)
def test_a_prompt_without_a_user_turn_is_a_bad_row(tokenizer, row):
    with pytest.raises(LimbeckError, match="rows:0 has no user turn, which a prompt needs"):
        tokenize_rows([row], tokenizer, prompts=True)


def test_a_pretokenised_document_is_not_a_prompt(tmp_path, tokenizer, write_corpus):
    write_corpus(tmp_path / "corpus", [[5, 6, 7]])
    with pytest.raises(LimbeckError, match=r"corpus\.bin \(row 0\) is pretokenised text, which has no question"):
        tokenize_files([tmp_path / "corpus"], tokenizer, prompts=True)


def test_prompts_without_answers_are_refused_in_training(tokenizer):
    with pytest.raises(
        LimbeckError, match=r"rows:0 is a prompt without an answer \(it has prompt\); a student that writes"
    ):
        tokenize_rows([{"prompt": "How many?"}], tokenizer)
