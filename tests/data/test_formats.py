"""The shapes of rows beside question and answer: what becomes of every field that changes what is learned."""

import pytest

from limbeck.data.rows import FORMATS, RowKeys, check_columns, detect, reader
from limbeck.data.sources import Record
from limbeck.errors import LimbeckError

KEYS = RowKeys("question", "answer")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def conversation(row, keys=KEYS):
    record = Record(row, "f.jsonl", 7)
    return reader(detect(record, keys), keys)(record)


def parsed(row, keys=KEYS):
    return [(message["role"], message["content"]) for message in conversation(row, keys).messages]


def share(*pairs, **more):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in pairs], **more}


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, "prompt_completion", [("user", "p"), ("assistant", "c")]),
        (
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}],
             "completion": [{"role": "assistant", "content": "c"}]},
            "prompt_completion",
            [("system", "s"), ("user", "p"), ("assistant", "c")],
        ),
        ({"instruction": "i", "input": "x", "output": "o"}, "instruction", [("user", "i\nx"), ("assistant", "o")]),
        ({"instruction": "i", "input": None, "output": "o"}, "instruction", [("user", "i"), ("assistant", "o")]),
        (
            {"instruction": "i", "input": "", "output": "o", "system": "s", "history": [["q", "a"]]},
            "instruction",
            [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "i"), ("assistant", "o")],
        ),
        ({"text": "t"}, "text", [("assistant", "t")]),
        (
            {"conversations": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            "conversations",
            [("user", "u"), ("assistant", "a")],
        ),
        ({"messages": '[{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]'}, "messages",
         [("user", "u"), ("assistant", "a")]),
    ],
)  # fmt: skip
def test_each_format_is_detected_and_read(row, name, expected):
    assert detect(Record(row, "f", 1), KEYS) == name
    assert parsed(row) == expected
    assert conversation(row).plain == (name == "text")


def test_several_system_turns_and_all_speakers_keep_their_order():
    row = share(
        ("system", "a"),
        ("human", "b"),
        ("gpt", "c"),
        ("system", "d"),
        ("human", "e"),
        ("observation", "f"),
        ("gpt", "g"),
    )
    roles = ["system", "user", "assistant", "system", "user", "tool", "assistant"]
    assert parsed(row) == list(zip(roles, "abcdefg", strict=True))


def test_the_system_field_of_a_row_comes_first_and_only_once():
    pairs = [("human", "u"), ("gpt", "a")]
    assert parsed(share(*pairs, system="s"))[0] == ("system", "s")
    assert parsed(share(("system", "s"), *pairs, system="s")) == [("system", "s"), ("user", "u"), ("assistant", "a")]
    assert parsed(share(*pairs, system=None)) == [("user", "u"), ("assistant", "a")]


@pytest.mark.parametrize("tools", [[TOOL], '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'])
def test_the_tools_of_a_row_travel_with_it(tools):
    assert conversation(share(("human", "u"), ("gpt", "a"), tools=tools)).tools == [TOOL]
    assert conversation({"question": "q", "answer": "a", "tools": tools}).tools == [TOOL]
    assert conversation(share(("human", "u"), ("gpt", "a"), tools="")).tools is None


def test_calls_of_tools_are_the_same_in_both_dialects():
    openai = {
        "messages": [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": None,
             "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "content": None, "name": "add"},
            {"role": "assistant", "content": [{"type": "text", "text": "it is "}, {"type": "text", "text": "2"}]},
        ]
    }  # fmt: skip
    ours = share(
        ("human", "u"),
        ("function_call", '{"name": "add", "arguments": {"a": 1}}'),
        ("observation", ""),
        ("gpt", "it is 2"),
    )
    for row in (openai, ours):
        messages = conversation(row).messages
        assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
        assert [message["content"] for message in messages] == ["u", "", "", "it is 2"]


@pytest.mark.parametrize("share", [False, True])
def test_weights_of_rows_and_turns_are_read(share):
    row = {
        "weight": 0.5,
        "messages": [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a", "train": False, "weight": 3},
            {"role": "user", "content": "v"},
            {"role": "assistant", "content": "b", "weight": 2},
            {"role": "user", "content": "w"},
            {"role": "assistant", "content": "c", "train": True, "weight": None},
        ],
    }
    if share:
        speakers = {"user": "human", "assistant": "gpt"}
        row["conversations"] = [
            {"from": speakers[turn.pop("role")], "value": turn.pop("content"), **turn} for turn in row.pop("messages")
        ]
    found = conversation(row)
    assert found.weight == 0.5
    assert [message.get("weight") for message in found.messages] == [None, 0.0, None, 2.0, None, None]
    assert not any("train" in message for message in found.messages)
    assert conversation({"question": "q", "answer": "a", "weight": "heavy"}, RowKeys("question", "answer", weight=None))
    assert (
        conversation({"question": "q", "answer": "a", "kg": "2.5"}, RowKeys("question", "answer", weight="kg")).weight
        == 2.5
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "q", "answer": "a", "weight": -1}, '"weight" must be a number from 0'),
        ({"question": "q", "answer": "a", "weight": True}, '"weight" must be a number'),
        ({"question": "q", "answer": "a", "weight": float("nan")}, '"weight" must be a number'),
        ({"question": "q\0", "answer": "a"}, "NUL character"),
        ({"question": "q", "answer": "a", "tools": 7}, '"tools" must be a list'),
        ({"question": "q", "answer": "a", "tools": "[{"}, '"tools" is not valid JSON'),
        (share(("human", "u"), ("function_call", "add(1)")), "write it as JSON"),
        ({"instruction": "i", "output": "o", "history": [1]}, r'"history"\[0\] must be a pair'),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "must be a string, but is a list"),
        ({3: "q", None: "a"}, r'has no "question" \(it has 3, None\)'),
    ],
)
def test_invalid_rows_raise_errors(row, words):
    with pytest.raises(LimbeckError, match=f"f.jsonl:7.*{words}"):
        conversation(row)


def test_prompts_without_answers_are_recognised():
    with pytest.raises(LimbeckError, match=r"f\.jsonl:7 is a prompt without an answer"):
        conversation({"prompt": "p", "id": 3})


def test_column_settings_raise_an_error_for_formats_without_columns():
    keys = RowKeys("question", "answer", prompt="hint")
    for name in FORMATS:
        if name != "question_answer":
            with pytest.raises(LimbeckError, match="prompt_key: hint does not apply"):
                check_columns(name, keys, "f.jsonl")
