import json

import pytest

from limbeck.data import tokenize_files
from limbeck.data.sources import Source, expand
from limbeck.errors import LimbeckError

ROWS = [{"question": "a", "answer": "b"}, {"question": "c\nd", "answer": 'ü "]'}, {"x": [1, {"y": None}]}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_one_object_per_line_is_read_under_both_names(tmp_path, name, ending, encoding, read_records):
    path = tmp_path / name
    path.write_bytes(("\n" + ending.join(json.dumps(row) for row in ROWS) + "\n\n").encode(encoding))
    records = list(read_records(path))
    assert [record.row for record in records] == ROWS
    assert [record.where for record in records] == [f"{path}:{line}" for line in (2, 3, 4)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_with_the_line_of_every_row(tmp_path, indent, encoding, read_records):
    path = tmp_path / "rows.json"
    text = "\n" + json.dumps(ROWS, indent=indent, ensure_ascii=False) + "\n"
    path.write_text(text, encoding=encoding)
    records = list(read_records(path))
    assert [record.row for record in records] == ROWS
    expected = [2, 2, 2] if indent is None else [3, 7, 11]
    assert [record.line for record in records] == expected


def test_an_empty_list_has_no_rows(tmp_path, read_records):
    path = tmp_path / "rows.json"
    path.write_text("[ ]")
    assert list(read_records(path)) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b'{"a": 1}\n{"a": \n', [":2", "not valid JSON", "each line"]),
        ("rows.jsonl", b'{"a": 1}\n[1]\n', [":2", "list", "not an object"]),
        ("rows.jsonl", b'{"a": 1}\n"text"\n', [":2", "string"]),
        ("rows.jsonl", b'{"a": 1}\n\n{"a": "\xff"}\n', [":3", "UTF-8", "0xff"]),
        ("rows.jsonl", b'{"a": 1}\n' + b"[" * 100_000, [":2", "not valid JSON"]),
        ("rows.json", b'[\n{"a": 1},\n{"a": 2,\n "b": }\n]', [":4", "row 1", "begins on line 3"]),
        ("rows.json", b'[\n{"a": 1}\n{"a": 2}\n]', [":3", "after row 0"]),
        ("rows.json", b'[\n{"a": 1},\n7\n]', [":3", "row 1", "number"]),
        ("rows.json", b'[\n{"a": 1},\n', [":3", "row 1"]),
        ("rows.json", b'[\n{"a": 1}\n]\n{"a": 2}', [":4", "after the end"]),
        ("rows.json", b'[\n{"a": 1},\n{"a": "\xff"}]', [":3", "UTF-8"]),
        ("rows.json", b'{\n"data": []\n}', [":1", "JSON list"]),
    ],
)
def test_an_error_is_reported_with_its_line(tmp_path, name, content, words, read_records):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(LimbeckError) as caught:
        list(read_records(path))
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_globs_are_expanded_in_a_stable_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    assert [path.name for path in expand([tmp_path / "*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in expand([f"{tmp_path}/**/*.json*"])] == ["a.jsonl", "b.jsonl", "c.json"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    (tmp_path / "part[1].jsonl").write_text("{}")
    assert [path.name for path in expand([tmp_path / "part[1].jsonl"])] == ["part[1].jsonl"]


def test_a_missing_file_is_reported_with_similar_names(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(LimbeckError, match=r"trian\.jsonl does not exist.*did you mean .*train\.jsonl"):
        expand([tmp_path / "trian.jsonl"])
    with pytest.raises(LimbeckError, match="nor does the folder"):
        expand([tmp_path / "no" / "train.jsonl"])


def test_folders_other_formats_and_empty_patterns_are_refused(tmp_path):
    (tmp_path / "train.xlsx").write_text("")
    with pytest.raises(LimbeckError, match=r"is a folder.*\*\.jsonl"):
        expand([tmp_path])
    with pytest.raises(LimbeckError, match=r"train\.xlsx has an unknown file type \(\.json, \.jsonl"):
        expand([tmp_path / "train.xlsx"])
    with pytest.raises(LimbeckError, match="No file matches"):
        expand([tmp_path / "*.jsonl"])
    with pytest.raises(LimbeckError, match=r"data_args\.file_name"):
        expand([])


def test_a_quote_that_swallows_rows_is_an_error_also_when_bad_rows_are_skipped(tmp_path, tokenizer):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\nq,a\nq,"open\n' + "q,a\n" * 20)
    for how in ("error", "skip"):
        with pytest.raises(LimbeckError, match=r"rows\.csv:3 opens a quote that is never closed"):
            tokenize_files([path], tokenizer, template="base", on_bad_row=how)


def test_a_source_may_have_columns_of_its_own(tmp_path, tokenizer):
    rows = [{"prompt": [{"content": "one?"}], "gold": {"value": 1}}, {"prompt": [], "gold": {}}]
    nested, plain = tmp_path / "nested.jsonl", tmp_path / "plain.jsonl"
    nested.write_text(json.dumps(rows[0]) + "\n")
    plain.write_text(json.dumps({"question": "one?", "answer": "1"}) + "\n")
    columns = {"question_key": "prompt.0.content", "answer_key": "gold.value"}
    cache = {"cache_dir": tmp_path / "cache", "template": "base"}
    ours, _ = tokenize_files([Source(path=(str(nested),), **columns)], tokenizer, **cache)
    theirs, _ = tokenize_files([plain], tokenizer, **cache)
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert ours.labels.tolist() == theirs.labels.tolist()
    other = Source(path=(str(nested),), question_key="prompt.0.content", answer_key="prompt.0.content")
    again, _ = tokenize_files([other], tokenizer, **cache)  # not the cached rows of the other columns
    assert again.tokens.tolist() != ours.tokens.tolist()
    nested.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        LimbeckError,
        match=r'nested.jsonl:2 has no "prompt.0.content" \(its columns are prompt, gold\); .*input_key or output_key',
    ):
        tokenize_files([Source(path=(str(nested),), **columns)], tokenizer, template="base")
    _, report = tokenize_files([Source(path=(str(nested),), **columns)], tokenizer, template="base", on_bad_row="skip")
    assert report.bad == {"missing key": 1}
