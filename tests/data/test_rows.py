import pytest

from limbeck.data.rows import RowKeys, check_columns, detect, reader, shown_format
from limbeck.data.sources import Record
from limbeck.errors import LimbeckError

KEYS = RowKeys("question", "answer")


def read(row, keys=KEYS, first=None):
    form = detect(Record(first or row, "f.jsonl", 1), keys)
    check_columns(form, keys, "f.jsonl")
    return reader(form, keys)(Record(row, "f.jsonl", 7)).messages


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def test_question_and_answer_become_two_turns():
    assert read({"question": "q", "answer": "a", "id": 3}) == turns(("user", "q"), ("assistant", "a"))


def test_prompt_is_put_before_the_question_and_system_gets_its_own_turn():
    keys = RowKeys("q", "a", prompt="p", system="s")
    row = {"q": "why", "a": "so", "p": "Think.", "s": "Be kind."}
    assert read(row, keys) == turns(("system", "Be kind."), ("user", "Think.\nwhy"), ("assistant", "so"))
    assert read({**row, "p": "", "s": None}, keys) == turns(("user", "why"), ("assistant", "so"))


def test_openai_messages_keep_their_order_and_further_keys():
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho", "reasoning_content": "hm"},
        {"role": "user", "content": "bye"},
    ]
    assert read({"messages": messages}) == messages


def test_sharegpt_speakers_become_roles():
    said = [("system", "s"), ("human", "h"), ("gpt", "g"), ("tool", "t"), ("assistant", "a"), ("user", "u")]
    row = {"conversations": [{"from": speaker, "value": value} for speaker, value in said]}
    roles = ["system", "user", "assistant", "tool", "assistant", "user"]
    assert read(row) == turns(*zip(roles, (value for _, value in said), strict=True))


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"question": "q", "answer": "a", "messages": []}, "question/answer"),
        ({"messages": []}, "messages"),
        ({"conversations": []}, "conversations"),
    ],
)
def test_the_first_row_decides_the_format(row, name):
    assert shown_format(detect(Record(row, "f.jsonl", 1), KEYS), KEYS) == name


QA = {"question": "q", "answer": "a"}
CHAT = {"messages": turns(("user", "u"), ("assistant", "a"))}
SHARE = {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}


@pytest.mark.parametrize(
    ("first", "row", "words"),
    [
        (None, {"problem": "q", "answer": "a"}, ['"question"', "problem, answer", "question_key: problem"]),
        (None, {"question": "q", "solution": "a"}, ['"answer"', "answer_key: solution"]),
        (None, {"foo": "q"}, ['"question"', "foo", "set question_key", "(input_key in the form of NeMo-RL)"]),
        (QA, {"question": "q"}, ['"answer"', "answer_key"]),
        (QA, {"question": "q", "answer": " \n"}, ['"answer" is empty']),
        (QA, {"question": "q", "answer": 5}, ['"answer" must be a string', "int"]),
        (QA, {"question": None, "answer": "a"}, ['"question" must be a string']),
        (QA, {"question": "q\ud800", "answer": "a"}, ["surrogate", "\\ud800"]),
        (CHAT, QA, ['no "messages"', "question, answer"]),
        (CHAT, {"messages": "hi"}, ['"messages" must be a list']),
        (CHAT, {"messages": turns(("user", "u"))}, ["no assistant turn"]),
        (CHAT, {"messages": turns(("assistant", "u"))}, ["begins with the assistant"]),
        (CHAT, {"messages": turns(("user", "u"), ("assistant", ""))}, ["turn 1 is empty"]),
        (CHAT, {"messages": turns(("wizard", "u"), ("assistant", "a"))}, ["messages[0]", '"wizard"']),
        (CHAT, {"messages": [{"role": "user"}]}, ["messages[0]", '"content"']),
        (CHAT, {"messages": turns(("user", "u"), ("assistant", None))}, ["messages[1]", 'has no "content"']),
        (CHAT, {"messages": turns(("user", "u"), ("assistant", 7))}, ["messages[1]", "must be a string"]),
        (SHARE, {"conversations": [{"from": "bot", "value": "u"}]}, ["conversations[0]", '"bot"', "gpt"]),
        (SHARE, {"conversations": [{"from": "human", "content": "u"}]}, ["conversations[0]", '"value"']),
    ],
)
def test_a_bad_row_is_reported_with_its_location(first, row, words):
    with pytest.raises(LimbeckError) as caught:
        read(row, first=first)
    for word in ["f.jsonl:7", *words]:
        assert word in str(caught.value)


def test_a_configured_column_must_exist_and_apply_to_the_format():
    with pytest.raises(LimbeckError, match=r'f\.jsonl:7 has no "hint".*prompt_key'):
        read(QA, RowKeys("question", "answer", prompt="hint"))
    with pytest.raises(LimbeckError, match="system_key: sys does not apply"):
        read(CHAT, RowKeys("question", "answer", system="sys"))
