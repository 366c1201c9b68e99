"""What a mixture takes: exact shares, nothing oftener than needed, and the same on every resume."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.data import DataReport, Examples, MixtureSettings, Source, mix, tokenize_files
from limbeck.errors import LimbeckError


def data(*sizes, domains=None):
    """Sources of the given sizes, or one source whose rows are of the given domains."""
    groups = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    total = len(groups)
    names = tuple((0, name) for name in domains) if domains else tuple((i, f"s{i}") for i in range(len(sizes)))
    report = DataReport((), "base", 8, total, 0, {}, total, total, groups=names)
    flat = np.zeros(total, dtype=np.int32)
    return Examples(flat, flat, np.arange(total + 1), groups=groups if len(sizes) > 1 else None), report


def taken(mixture, examples, epoch=0):
    rows = mixture.rows_of_epoch(epoch)
    groups = examples.groups if examples.groups is not None else np.zeros(len(examples), int)
    return np.bincount(groups[rows], minlength=1).tolist()


def test_without_any_setting_there_is_no_mixture():
    assert mix(*data(5, 3), MixtureSettings(weights=(None, None), max_samples=(None, None)), 0) is None


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=1, max_size=4),
    st.integers(1, 120), st.integers(0, 3), st.integers(1, 4),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_weights_are_exact_and_no_row_comes_oftener_than_it_must(sources, wanted, seed, epochs):
    sizes, weights = zip(*sources, strict=True)
    examples, report = data(*sizes)
    mixture = mix(examples, report, MixtureSettings(weights=weights, num_samples=wanted), seed)
    again = mix(examples, report, MixtureSettings(weights=weights, num_samples=wanted), seed)
    seen = Counter()
    for epoch in range(epochs):
        counts = taken(mixture, examples, epoch)
        assert sum(counts) == wanted
        for count, weight in zip(counts, weights, strict=False):
            assert abs(count - weight / sum(weights) * wanted) < 1
        assert np.array_equal(mixture.rows_of_epoch(epoch), again.rows_of_epoch(epoch))
        seen.update(mixture.rows_of_epoch(epoch).tolist())
    for first, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        of_source = [seen[row] for row in range(first, first + size)]
        assert max(of_source) - min(of_source) <= 1


def test_a_temperature_lifts_small_sources():
    examples, report = data(900, 100)
    assert taken(mix(examples, report, MixtureSettings(temperature=1), 0), examples) == [900, 100]
    assert taken(mix(examples, report, MixtureSettings(temperature=2), 0), examples) == [750, 250]
    assert taken(mix(examples, report, MixtureSettings(temperature=1e9), 0), examples) == [500, 500]


def test_domains_get_their_shares_wherever_their_rows_are():
    examples, report = data(60, 20, 20, domains=["math", "code", "chat"])
    probabilities = {"code": 0.5, "math": 0.5, "chat": 0}
    mixture = mix(examples, report, MixtureSettings(domain_probs=probabilities, num_samples=40), 0)
    assert taken(mixture, examples) == [20, 20]
    with pytest.raises(LimbeckError, match="the data has the domains math, code, chat"):
        mix(examples, report, MixtureSettings(domain_probs={"math": 1.0}), 0)
    with pytest.raises(LimbeckError, match=r"adds up to 1\.5"):
        mix(examples, report, MixtureSettings(domain_probs={**probabilities, "chat": 0.5}), 0)


def test_a_cap_chooses_the_same_rows_in_every_epoch():
    examples, report = data(50, 10)
    mixture = mix(examples, report, MixtureSettings(max_samples=(5, None)), 3)
    assert taken(mixture, examples) == [5, 10]
    assert np.array_equal(mixture.rows_of_epoch(0), mixture.rows_of_epoch(1))
    other = mix(examples, report, MixtureSettings(max_samples=(5, None)), 4)
    assert not np.array_equal(mixture.rows_of_epoch(0), other.rows_of_epoch(0))


def test_a_number_of_samples_is_drawn_without_repetition_and_goes_on_in_the_next_epoch():
    examples, report = data(10)
    mixture = mix(examples, report, MixtureSettings(num_samples=4), 0)
    epochs = [mixture.rows_of_epoch(epoch).tolist() for epoch in range(5)]
    assert all(len(set(rows)) == 4 for rows in epochs[:2])
    assert Counter(row for rows in epochs for row in rows) == dict.fromkeys(range(10), 2)
    with pytest.raises(LimbeckError, match="num_samples = 11 is more than the 10 rows"):
        mix(examples, report, MixtureSettings(num_samples=11), 0)


def test_an_empty_share_and_a_missing_weight_raise_errors():
    examples, report = data(10)
    with pytest.raises(LimbeckError, match="source 1 has a share in the mixture, but no row"):
        mix(examples, report, MixtureSettings(weights=(1, 1)), 0)
    with pytest.raises(LimbeckError, match="some sources have a weight"):
        mix(*data(5, 5), MixtureSettings(weights=(1, None)), 0)


def test_sources_and_a_column_of_domains_name_the_groups_of_rows(tmp_path, tokenizer):
    rows = [{"question": "How many?", "answer": f"{i} eggs", "tag": "math" if i % 3 else "chat"} for i in range(9)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [Source(path=(str(tmp_path / "a.jsonl"),), domain="first"), str(tmp_path / "b.jsonl")]
    examples, report = tokenize_files(files, tokenizer)
    assert report.groups == ((0, "first"), (1, str(tmp_path / "b.jsonl")))
    assert examples.groups.tolist() == [0] * 9 + [1] * 9
    examples, report = tokenize_files(files[:1], tokenizer, domain_key="tag", cache_dir=tmp_path / "cache")
    assert report.groups == ((0, "chat"), (0, "math"))
    assert examples.groups.tolist() == [0, 1, 1] * 3
    with pytest.raises(LimbeckError, match=r'a\.jsonl:1: "level" must name the row\'s domain'):
        tokenize_files(files, tokenizer, domain_key="level")
