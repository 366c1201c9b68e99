"""Every kind of file that is not plain JSON: the same rows come out of each."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from limbeck.data import IGNORE, Source, tokenize_files
from limbeck.data.sources import BadRow, Document, inputs_of
from limbeck.errors import LimbeckError

pa = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")
zstandard = pytest.importorskip("zstandard")

ROWS = [{"question": f"How many, if {i}?", "answer": f'"{i}",\tüber\nalles'} for i in range(1200)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)


def csv_of(delimiter):
    def cell(text):
        return '"' + text.replace('"', '""') + '"'

    lines = ["question" + delimiter + "answer", *(delimiter.join(map(cell, row.values())) for row in ROWS)]
    return "\r\n".join(lines) + "\r\n"


def write(path):
    name = path.name
    if name.endswith(".parquet"):
        pa.parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=700)
    elif name == "file.arrow":
        with pa.ipc.new_file(path, pa.Table.from_pylist(ROWS).schema) as sink:
            sink.write(pa.Table.from_pylist(ROWS))
    elif name == "stream.arrow":
        with pa.ipc.new_stream(path, pa.Table.from_pylist(ROWS).schema) as sink:
            sink.write(pa.Table.from_pylist(ROWS))
    elif name == "saved":
        datasets.Dataset.from_list(ROWS).filter(lambda row: True).save_to_disk(path, num_shards=3)
    elif name == "splits":
        dataset = datasets.Dataset.from_list(ROWS)
        datasets.DatasetDict(train=dataset, test=dataset.select(range(5))).save_to_disk(path)
    else:
        raw = (csv_of(",") if ".csv" in name else csv_of("\t") if ".tsv" in name else TEXT).encode()
        if ".json" in name and ".jsonl" not in name:
            raw = json.dumps(ROWS, indent=1).encode()
        pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(raw))
    return path


KINDS = [
    *("a.parquet", "file.arrow", "stream.arrow", "saved", "splits", "a.csv", "a.tsv"),
    *("a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.csv.zst", "a.json"),
]


@pytest.mark.parametrize("name", KINDS)
def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path, name, read_records):
    path = write(tmp_path / name)
    assert [record.row for record in read_records(path)] == ROWS


def test_a_row_of_a_table_is_named_by_its_number(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([*ROWS, {"question": "q", "answer": ""}]), path)
    with pytest.raises(LimbeckError, match=r'a\.parquet \(row 1200\): "answer" is empty'):
        tokenize_files([path], tokenizer)


def test_text_in_a_table_that_is_not_utf8_harms_its_own_row_only(tmp_path):
    answers = pa.array([b"good", b"\xff", b"fine"], pa.binary()).view(pa.string())
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"question": ["q"] * 3, "answer": answers}), path)
    (one,) = inputs_of(Source(path=(str(path),)))
    items = list(one.read())
    assert [isinstance(item, BadRow) for item in items] == [False, True, False]
    assert items[1].number == 1


def test_a_csv_row_of_the_wrong_width_or_encoding_is_named_by_its_line(tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_bytes(b'question,answer\n"two\nlines",a\nq,"b,c"\nq\nq,\xff\n')
    _, report = tokenize_files([path], tokenizer, on_bad_row="skip", cache_dir=tmp_path / "cache")
    assert dict(report.bad) == {"not CSV": 1, "not UTF-8": 1}
    listed = map(json.loads, Path(report.bad_rows_file).read_text().splitlines())
    assert [(bad["line"], bad["row"]) for bad in listed] == [(5, 2), (6, 3)]


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_truncated_file_raises_an_error(tmp_path, name, read_records):
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(LimbeckError, match=f"{name} cannot be read"):
        list(read_records(path))


def test_a_missing_split_is_reported_with_the_existing_ones(tmp_path):
    folder = write(tmp_path / "splits")
    assert len(list(inputs_of(Source(path=(str(folder),), split="test"))[0].read())) == 5
    with pytest.raises(LimbeckError, match="no split valid; it holds train, test"):
        inputs_of(Source(path=(str(folder),), split="valid"))


def test_a_hub_dataset_is_read_by_name_config_split_and_revision(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    repository = tmp_path / "repository"
    (repository / "main").mkdir(parents=True)
    (repository / "main" / "train.jsonl").write_text(TEXT)
    (repository / "main" / "test.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - split: train\n    path: main/train.jsonl\n  - split: test\n    path: main/test.jsonl\n---\n"
    )
    source = Source(hub=str(repository), config="main", split="train[:30]")
    examples, report = tokenize_files([source], tokenizer, cache_dir=tmp_path / "cache")
    plain, _ = tokenize_files([write(tmp_path / "a.parquet")], tokenizer)
    assert len(examples) == 30
    assert np.array_equal(examples.tokens, plain.tokens[: len(examples.tokens)])
    assert report.files[0].path == f"hub:{repository}/main/train[:30]"
    again, _ = tokenize_files([source], tokenizer, cache_dir=tmp_path / "cache")
    assert np.array_equal(examples.tokens, again.tokens)
    with pytest.raises(LimbeckError, match=r"cannot be loaded.*check its name, config, split and revision"):
        inputs_of(Source(hub=str(repository), config="other"))


@pytest.mark.parametrize("code", [4, 8])
@pytest.mark.parametrize("name", ["corpus", "corpus.bin", "corpus.idx", "corpus*"])
def test_a_megatron_corpus_gives_its_documents_with_every_token_learned(tmp_path, tokenizer, name, code, write_corpus):
    documents = [list(range(5, 5 + length)) for length in (3, 40, 2)]
    write_corpus(tmp_path / "corpus", documents, code)
    examples, report = tokenize_files([tmp_path / name], tokenizer, sequence_length=16, overlong="split")
    assert report.files[0].format == "tokens"
    assert report.split == 1
    assert examples.tokens.tolist() == [token for document in documents for token in document]
    assert (examples.labels != IGNORE).sum() == sum(len(document) - 1 for document in documents)


def test_a_megatron_pair_that_does_not_belong_together_is_refused(tmp_path, write_corpus):
    write_corpus(tmp_path / "corpus", [[1, 2, 3]])
    index = (tmp_path / "corpus.idx").read_bytes()
    for tokens, words in ((b"\1\0", "is shorter than"), (bytes(2 * 3 + 1), "is longer than")):
        (tmp_path / "corpus.bin").write_bytes(tokens)
        with pytest.raises(LimbeckError, match=words):
            list(inputs_of(Source(path=(str(tmp_path / "corpus"),)))[0].read())
    for broken, words in (
        (index[:60], "cut off"),
        (b"other" + index, "not a Megatron index"),
        (index[:9] + b"\7" + index[10:], "version 7"),
    ):
        (tmp_path / "corpus.idx").write_bytes(broken)
        with pytest.raises(LimbeckError, match=words):
            list(inputs_of(Source(path=(str(tmp_path / "corpus.bin"),)))[0].read())
    (tmp_path / "corpus.idx").unlink()
    with pytest.raises(LimbeckError, match=r"corpus\.idx does not exist"):
        inputs_of(Source(path=(str(tmp_path / "corpus.bin"),)))
    with pytest.raises(LimbeckError, match=r"nope does not exist .*, nor do .*nope\.bin and .*nope\.idx"):
        inputs_of(Source(path=(str(tmp_path / "nope"),)))


def test_a_negative_token_is_a_bad_row(tmp_path, tokenizer, write_corpus):
    write_corpus(tmp_path / "corpus", [[1, 2], [-1, 2]], code=4)
    assert isinstance(next(inputs_of(Source(path=(str(tmp_path / "corpus"),)))[0].read()), Document)
    with pytest.raises(LimbeckError, match=r"corpus\.bin \(row 1\) holds the token id"):
        tokenize_files([tmp_path / "corpus"], tokenizer)
