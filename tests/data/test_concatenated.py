"""Rows cut from concatenated documents: Megatron's corpora and mock data."""

import json

import numpy as np
import pytest

from limbeck.data import BatchStream, MixtureSettings, Source, StreamSettings, fixed_batches, mix, tokenize_files
from limbeck.errors import LimbeckError

LENGTH = 8


@pytest.fixture
def corpora(tmp_path, write_corpus):
    """Two corpora of 20 and 5 documents; every token id says where it is."""
    documents = [[100 * n + i for i in range(3 + n % 4)] for n in range(20)]
    write_corpus(tmp_path / "a", documents, 4)
    write_corpus(tmp_path / "b", [[7000 + 10 * n + i for i in range(6)] for n in range(5)], 8)
    return tmp_path


def source(folder, name="a", first=0.0, last=1.0):
    return Source(path=(str(folder / name),), concatenate=True, documents=(first, last))


def read(sources, tokenizer, **changes):
    return tokenize_files(sources, tokenizer, sequence_length=LENGTH, **changes)


def test_every_token_follows_its_predecessor_and_rows_are_full(corpora, tokenizer):
    whole = np.frombuffer((corpora / "a.bin").read_bytes(), np.int32)
    examples, report = read([source(corpora)], tokenizer)
    assert len(examples) == (len(whole) - 1) // LENGTH == report.rows
    rows = [examples.row(i) for i in range(len(examples))]
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in rows]), whole[: len(rows) * LENGTH])
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in rows]), whole[1 : len(rows) * LENGTH + 1])
    assert report.largest_token == whole.max()
    assert report.supervised_tokens == len(rows) * LENGTH == examples.num_supervised.sum()


def test_parts_of_the_documents_are_disjoint_and_whole(corpora, tokenizer):
    seen = []
    for first, last in ((0.0, 0.7), (0.7, 0.95), (0.95, 1.0)):
        part, _ = tokenize_files([source(corpora, "a", first, last)], tokenizer, sequence_length=2)
        documents = {int(token) // 100 for i in range(len(part)) for token in part.row(i)[0]}
        assert documents == set(range(round(20 * first), round(20 * last)))
        seen.append(documents)
    assert not seen[0] & seen[1] and not seen[1] & seen[2]


def test_a_blend_is_weighted_and_resumes_exactly_on_any_number_of_ranks(corpora, tokenizer, tmp_path):
    examples, report = read([source(corpora), source(corpora, "b")], tokenizer, cache_dir=tmp_path / "cache")
    mixture = mix(examples, report, MixtureSettings(weights=(0.25, 0.75), num_samples=8), seed=3)
    rows = mixture.rows_of_epoch(0)
    from_b = [i for i in rows if examples.row(i)[0][0] >= 7000]
    assert (len(rows), len(from_b)) == (8, 6)
    settings = StreamSettings(LENGTH, 2, pad_id=0, accumulation_steps=2, rows_of_epoch=mixture.rows_of_epoch)

    def tokens(stream):
        return sorted(row for batch in next(stream).micro_batches for row in batch.input_ids.tolist())

    stream = BatchStream(examples, settings)
    first, position, second = tokens(stream), json.loads(json.dumps(stream.position)), tokens(stream)
    assert first != second
    halves = []
    for rank in range(2):
        again = BatchStream(
            examples,
            StreamSettings(LENGTH, 2, pad_id=0, accumulation_steps=1, rows_of_epoch=mixture.rows_of_epoch),
            rank=rank,
            world_size=2,
        )
        again.seek(position)
        halves += tokens(again)
    assert sorted(halves) == second
    assert BatchStream(read([source(corpora)], tokenizer)[0], settings).position["checksum"] != position["checksum"]


def test_validation_takes_the_rows_that_it_is_given(corpora, tokenizer):
    examples, _ = read([source(corpora)], tokenizer)
    batches = fixed_batches(
        examples, batch_size=2, rank=0, world_size=1, pad_id=0, length_round=4, rows=np.array([1, 4, 5])
    )
    got = [row for step in batches for batch in step.micro_batches for row in batch.input_ids.tolist()]
    assert got == [examples.row(i)[0].tolist() for i in (1, 4, 5)]


def test_mock_data_is_the_same_in_every_run_and_fits_the_vocabulary(tokenizer):
    examples, report = read([Source(mock=30)], tokenizer)
    again, _ = read([Source(mock=30)], tokenizer)
    assert len(examples) == 30
    tokens = np.concatenate([examples.row(i)[0] for i in range(30)])
    np.testing.assert_array_equal(tokens, np.concatenate([again.row(i)[0] for i in range(30)]))
    assert tokens.min() >= 0 and tokens.max() <= report.largest_token < len(tokenizer)
    assert (tokens == tokenizer.eos_token_id).any() and len(set(tokens.tolist())) > 20


def test_what_cannot_be_read_is_one_sentence(corpora, tokenizer, write_corpus, tmp_path):
    with pytest.raises(LimbeckError, match=r"a has fewer tokens than one row needs, sequence_length \+ 1 = 1001"):
        tokenize_files([source(corpora)], tokenizer, sequence_length=1000)
    write_corpus(tmp_path / "c", [[1, 2, -3], [4] * 30], 4)
    with pytest.raises(LimbeckError, match="holds the token id -3"):
        read([source(tmp_path, "c")], tokenizer)
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(LimbeckError, match=r"is not a \.bin/\.idx pair"):
        read([source(tmp_path, "rows.jsonl")], tokenizer)
    index = bytearray((corpora / "b.idx").read_bytes())
    index[34 + 10 * 4 + 8 : 34 + 10 * 4 + 16] = (20).to_bytes(8, "little")  # the second sequence lies elsewhere
    (corpora / "b.idx").write_bytes(index)
    with pytest.raises(LimbeckError, match="do not follow one another"):
        read([source(corpora, "b")], tokenizer)


def test_a_corpus_that_megatron_wrote_is_read(tmp_path, tokenizer):
    builder = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    written = builder.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    documents = [list(range(n, n + 11)) for n in range(9)]
    for document in documents:
        written.add_document(torch.tensor(document), [len(document)])
    written.finalize(str(tmp_path / "m.idx"))
    examples, _ = read([source(tmp_path, "m")], tokenizer)
    whole = [token for document in documents for token in document]
    assert [token for i in range(len(examples)) for token in examples.row(i)[0]] == whole[: len(examples) * LENGTH]
