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
        LimbeckError, match=r"rows:0 is a prompt without an answer \(it has prompt\); give rows with answers, or let"
    ):
        tokenize_rows([{"prompt": "How many?"}], tokenizer)


@pytest.mark.parametrize("case", [case for case in ROWS if case not in ("with an answer", "with a completion")])
def test_where_answers_may_lack_a_row_without_one_is_a_prompt_and_others_are_learned(native_tokenizer, case):
    row, messages = ROWS[case]
    answered = {"messages": [*messages, {"role": "assistant", "content": "3"}]}
    examples, report = tokenize_rows([row], native_tokenizer, prompts_only=True)
    wanted = native_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert examples.row(0)[0].tolist() == wanted
    assert (report.supervised_tokens, report.dropped) == (0, {})
    learned, _ = tokenize_rows([answered], native_tokenizer, prompts_only=True)
    as_before, _ = tokenize_rows([answered], native_tokenizer)
    for one, other in zip(learned.row(0), as_before.row(0), strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_rows_that_lack_an_answer_are_dropped_when_they_are_too_long(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "How many?" * n, **({"answer": "How many?" * 30} if n == 1 else {})} for n in (1, 2, 30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"cache_dir": tmp_path / "cache", "sequence_length": 64, "prompts_only": True}
    examples, report = tokenize_files([path], tokenizer, **settings)
    assert report.dropped == {"longer than 64 tokens": 1}
    assert report.truncated == 1
    assert [bool(count) for count in examples.num_supervised] == [True, False]
    wanted = r"rows.jsonl:2 has no \"answer\" .* set answer_key .*, or .*on_policy_fraction: 1.*off_policy: teacher"
    with pytest.raises(LimbeckError, match=wanted):  # also after a cache entry was made
        tokenize_files([path], tokenizer, **{**settings, "prompts_only": False})


def test_a_prompt_that_leaves_no_room_for_an_answer_is_dropped(tokenizer):
    examples, _ = tokenize_rows([{"question": "How many?"}], tokenizer, prompts_only=True)
    length = len(examples.row(0)[0])
    rows = [{"question": "How many?"}, {"question": "How?"}]
    examples, report = tokenize_rows(rows, tokenizer, prompts_only=True, sequence_length=length)
    assert len(examples) == 1
    assert report.dropped == {f"prompt of {length} tokens, which leaves no room for an answer": 1}
    examples, _ = tokenize_rows(rows, tokenizer, prompts_only=True, sequence_length=length + 1)
    assert len(examples) == 2


def test_a_row_without_an_answer_has_no_weight(tokenizer):
    with pytest.raises(LimbeckError, match='rows:0 has no answer, and its "weight" would weight one; remove it'):
        tokenize_rows([{"question": "How many?", "weight": 2}], tokenizer, prompts_only=True)
