"""Whatever stands in a file, it ends in a sentence or in a counted, listed row; never in another error, never in silence."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.data import tokenize_files, tokenize_rows
from limbeck.data.rows import FORMATS
from limbeck.data.sources import MAX_ROW
from limbeck.errors import LimbeckError

GOOD = {"question": "How many?", "answer": "She has 12 eggs."}
FUZZ = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
BAD_LINES = {
    b'{"question": "q", "answer": ': "not valid JSON",
    b'{"question": "q", "answer": "\xff"}': "not UTF-8",
    b'{"question": "q"}': "missing key",
    b'{"question": "q", "answer": " "}': "empty answer",
    b'{"question": "q", "answer": 3}': "wrong type",
    b'{"question": "q", "answer": null}': "wrong type",
    b'{"question": "q", "answer": "a\\u0000"}': "NUL character",
    b'{"question": "q", "answer": "a\0"}': "not valid JSON",
    b'{"question": "q", "answer": "a\\ud800"}': "half a surrogate pair",
    b'["question", "answer"]': "not an object",
    b"[" * 100_000: "not valid JSON",
    b'{"question": "q", "answer": "a", "weight": "x"}': "wrong weight",
    b'{"question": "q", "answer": "' + b"a" * MAX_ROW + b'"}': "too long",
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.slow
def test_every_bad_row_is_listed_with_its_place_and_counted_by_its_reason(tmp_path, tokenizer, workers):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\n".join([line for bad in BAD_LINES for line in (good, bad)] + [good]))
    examples, report = tokenize_files(
        [path], tokenizer, on_bad_row="skip", workers=workers, cache_dir=tmp_path / "cache"
    )
    assert len(examples) == len(BAD_LINES) + 1
    assert report.rows == 2 * len(BAD_LINES) + 1
    assert dict(report.bad) == Counter(BAD_LINES.values())
    listed = [json.loads(line) for line in Path(report.bad_rows_file).read_text().splitlines()]
    assert [(bad["line"], bad["kind"]) for bad in listed] == [
        (2 * i + 2, kind) for i, kind in enumerate(BAD_LINES.values())
    ]
    assert all(str(path) in bad["reason"] and len(bad["reason"]) < 400 for bad in listed)
    assert f"{len(BAD_LINES)} bad rows skipped" in str(report)
    assert report.bad_rows_file in str(report)
    for line in BAD_LINES:
        path.write_bytes(good + b"\n" + line + b"\n")
        with pytest.raises(LimbeckError, match=r"rows\.jsonl:2"):
            tokenize_files([path], tokenizer)


def test_a_row_of_another_format_is_a_bad_row(tmp_path, tokenizer):
    rows = [GOOD, {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}]
    _, report = tokenize_rows(rows, tokenizer, on_bad_row="skip")
    assert dict(report.bad) == {"missing key": 1}


def test_a_bad_first_row_does_not_decide_the_format(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("oops\n[1]\n" + json.dumps({"text": "How many?"}) + "\n")
    examples, report = tokenize_files([path], tokenizer, on_bad_row="skip")
    assert len(examples) == 1
    assert (report.files[0].format, report.files[0].rows, report.files[0].bad) == ("text", 3, 2)


def test_a_first_prompt_without_an_answer_is_a_bad_row_among_others(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "How many?", "completion": "She has 12 eggs."})
    path.write_text("\n".join(['{"prompt": "How many?"}', good, good]))
    examples, report = tokenize_files([path], tokenizer, on_bad_row="skip")
    assert len(examples) == 2 and "1 bad row skipped" in str(report)
    with pytest.raises(LimbeckError, match="is a prompt without an answer"):
        tokenize_files([path], tokenizer)
    path.write_text('{"prompt": "How many?"}')
    with pytest.raises(LimbeckError, match="is a prompt without an answer"):
        tokenize_files([path], tokenizer, on_bad_row="skip")


def test_a_row_in_a_list_on_one_line_is_named_by_its_number(tmp_path, tokenizer):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, GOOD, {"question": "q"}]))
    with pytest.raises(LimbeckError, match=r'rows\.json:1 \(row 2\) has no "answer"'):
        tokenize_files([path], tokenizer)


def test_nothing_but_bad_rows_is_an_error(tokenizer):
    with pytest.raises(LimbeckError, match=r"None of the 2 rows .*bad rows: missing key"):
        tokenize_rows([{"x": "y"}, {}], tokenizer, on_bad_row="skip")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        "question",
        "answer",
        "messages",
        "conversations",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "text",
        "system",
        "tools",
        "weight",
        "history",
        "role",
        "content",
        "from",
        "value",
        "tool_calls",
        "train",
    ]
)
SPEAKER = st.sampled_from(
    ["system", "user", "assistant", "tool", "human", "gpt", "function_call", "observation", "bot"]
)
TURN = st.dictionaries(NAMES, JSON | SPEAKER, max_size=4) | st.builds(
    lambda role, content: {"role": role, "content": content}, SPEAKER, st.text(max_size=5)
) | st.builds(lambda speaker, value: {"from": speaker, "value": value}, SPEAKER, st.text(max_size=5))  # fmt: skip
ROW = st.dictionaries(NAMES, JSON | st.lists(TURN, max_size=4), max_size=6)


CHAT = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "12"}]
GOOD_ROWS = {
    "question_answer": GOOD,
    "messages": {"messages": CHAT},
    "conversations": {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "12"}]},
    "prompt_completion": {"prompt": "How many?", "completion": "12"},
    "instruction": {"instruction": "How many?", "output": "12"},
    "text": {"text": "How many?"},
}


def accounted_for(path_or_rows, tokenizer, cache=None, **changes):
    """Read what there is, bad rows skipped, and hold every row to be learned, dropped for a reason, or listed as bad."""
    given = {"on_bad_row": "skip", **changes}
    if cache is None:
        examples, report = tokenize_rows(path_or_rows, tokenizer, **given)
    else:
        examples, report = tokenize_files([path_or_rows], tokenizer, cache_dir=cache, **given)
        listed = Path(report.bad_rows_file).read_text().splitlines() if report.bad else []
        assert Counter(json.loads(line)["kind"] for line in listed) == report.bad
    more = report.texts - report.rewritten  # a rewritten row is several texts
    assert len(examples) + sum(report.bad.values()) + sum(report.dropped.values()) == report.rows + more
    return report.rows


@pytest.mark.slow
@pytest.mark.parametrize("template", ["base", "native"])
def test_rows_of_any_content_are_learned_or_counted(native_tokenizer, template):
    seen = 0

    @settings(FUZZ, max_examples=28)
    @given(st.lists(ROW, min_size=50, max_size=60), st.sampled_from(list(FORMATS)))
    def check(rows, form):
        nonlocal seen
        rows = [GOOD_ROWS[form], *rows]
        assert accounted_for(rows, native_tokenizer, template=template) == len(rows)
        seen += len(rows)

    check()
    assert seen >= 1_300  # counted, not hoped for


def lines_of(content, name):
    """How many rows a file has by the plainest reading of its format; None where only a parser can tell."""
    if name.endswith("jsonl"):
        return sum(not line.isspace() and line != b"" for line in content.split(b"\n"))
    if name.endswith("json"):
        try:
            return len(json.loads(content))
        except (ValueError, RecursionError):
            return None
    if b'"' in content:
        return None
    return sum(line != b"" for line in re.split(rb"\r\n|\r|\n", content)) - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv"])
def test_bytes_of_any_content_are_learned_or_listed(tmp_path, tokenizer, name):
    path, parted = tmp_path / name, {"csv": b",", "tsv": b"\t"}.get(name[-3:])
    head = (
        json.dumps(GOOD).encode()
        if parted is None
        else parted.join([b"question", b"answer"]) + b"\n" + b"a" + parted + b"b"
    )
    pieces = [line for line in BAD_LINES if len(line) < 99_999] + [
        head,
        b'"',
        b",",
        b"\t",
        b"\\",
        b"\r",
        b"\xef\xbb\xbf",
    ]
    piece = st.binary(max_size=20) | st.sampled_from(pieces)
    line = st.lists(piece, max_size=3).map(b"".join).map(lambda raw: raw.replace(b"\n", b""))
    # A list that is broken anywhere is an error, so most of these hold whole rows of any kind.
    whole = st.builds(lambda value: json.dumps(value).encode(), ROW | JSON)
    if name.endswith("json"):
        line = st.one_of(whole, whole, whole, line)
    seen = 0

    @settings(FUZZ, max_examples={"rows.jsonl": 280, "rows.json": 40}.get(name, 80))
    @given(st.lists(line, min_size=60, max_size=80))
    def check(lines):
        nonlocal seen
        content = b"[" + b",\n".join([head, *lines]) + b"]" if name.endswith("json") else b"\n".join([head, *lines])
        path.write_bytes(content)
        rows = lines_of(content, name)
        try:
            found = accounted_for(path, tokenizer, tmp_path / "cache")
        except LimbeckError as error:
            assert str(path) in str(error)
            # What follows a broken list or an open quote cannot be told apart; everything else can be skipped.
            assert rows is None
            return
        assert rows in (None, found)
        seen += found

    check()
    assert seen >= {"rows.jsonl": 10_000, "rows.json": 50}.get(name, 500)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst", "a.bin"])
@given(content=st.binary(max_size=60), magic=st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_binary_files_of_any_content_end_in_a_sentence(tmp_path, tokenizer, name, content, magic):
    heads = {
        "a.parquet": b"PAR1",
        "a.arrow": b"ARROW1\0\0",
        "a.jsonl.gz": b"\x1f\x8b\x08",
        "a.jsonl.zst": b"\x28\xb5\x2f\xfd",
    }
    path = tmp_path / name
    path.write_bytes(heads.get(name, b"") + content if magic else content)
    (tmp_path / "a.idx").write_bytes(b"MMIDIDX\0\0\1\0\0\0\0\0\0\0\10" + content)
    with pytest.raises(LimbeckError, match=name.split(".")[0]):
        tokenize_files([path], tokenizer, on_bad_row="skip")


def test_a_row_of_many_levels_is_read_like_any_other(tmp_path, tokenizer):
    path = tmp_path / "deep.json"
    path.write_text(f'[{{"question": "a", "answer": "b", "notes": {"[" * 700}{"]" * 700}}}]')
    assert tokenize_files([path], tokenizer)[1].rows == 1
