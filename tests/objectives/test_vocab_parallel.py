"""A head that is split over ranks gives the loss and the gradients of the whole one. The comparison is in the ranks' script."""

from pathlib import Path

import pytest
from ranks import run_on_ranks


@pytest.mark.processes
@pytest.mark.parametrize(("ranks", "vocab"), [(2, 13), (4, 11)])
def test_every_divergence_and_tail_is_the_same_on_any_number_of_ranks(ranks, vocab):
    output = run_on_ranks(ranks, str(Path(__file__).with_name("run_vocab_parallel.py")), str(vocab))
    assert output.count("agrees") == ranks
