"""A head that is split over ranks gives the loss and the gradients of the whole one. The comparison is in the ranks' script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.processes
@pytest.mark.parametrize(("ranks", "vocab"), [(2, 13), (4, 11)])
def test_every_divergence_and_tail_is_the_same_on_any_number_of_ranks(ranks, vocab):
    script = Path(__file__).with_name("run_vocab_parallel.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    done = subprocess.run(
        [*command, str(vocab)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("agrees") == ranks
