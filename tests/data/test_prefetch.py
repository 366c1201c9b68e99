"""Steps made ahead are the steps of the stream, at the stream's positions, and leave nothing running behind."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.data import BatchStream, Examples, PrefetchedStream, StreamSettings
from limbeck.errors import LimbeckError


def plain(rows_of_epoch=None, **changes):
    tokens = np.arange(400, dtype=np.int32)
    examples = Examples(tokens, tokens, np.arange(0, 401, 5, dtype=np.int64))
    options = {"seed": 3, "sequence_length": 20, "per_device_batch_size": 2, "accumulation_steps": 2, "packing": True,
               "length_round": 1, "pad_id": 0}  # fmt: skip
    return BatchStream(examples, StreamSettings(rows_of_epoch=rows_of_epoch, **{**options, **changes}))


def ids(step):
    return [batch.input_ids.tolist() for batch in step.micro_batches]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "limbeck-batches"]


def test_steps_and_positions_are_those_of_the_stream():
    straight, ahead = plain(), PrefetchedStream(plain())
    assert ahead.steps_per_epoch == straight.steps_per_epoch
    for _ in range(3 * straight.steps_per_epoch):
        assert ahead.position == straight.position
        assert ids(next(ahead)) == ids(next(straight))
    ahead.close()
    assert not threads()


def test_what_was_made_ahead_is_not_lost_by_a_stop_nor_handed_out_after_a_seek():
    straight, ahead = plain(), PrefetchedStream(plain(), ahead=5)
    start = ahead.position
    steps = [ids(next(straight)) for _ in range(8)]
    assert ids(next(ahead)) == steps[0]
    time.sleep(0.05)  # let it run ahead
    saved = json.loads(json.dumps(ahead.position))
    ahead.close()
    assert ahead.position == saved
    assert ids(next(ahead)) == steps[1]
    ahead.seek(start)
    assert [ids(next(ahead)) for _ in range(8)] == steps
    ahead.seek(saved)
    assert ids(next(ahead)) == steps[1]
    ahead.close()
    other = PrefetchedStream(plain())
    other.seek(saved)
    assert ids(next(other)) == steps[1]
    other.close()


def test_an_error_is_raised_by_the_next_call_of_its_step_and_by_later_ones():
    def rows(epoch):
        if epoch == 1:
            raise LimbeckError("the second epoch is broken.")
        return np.arange(80)

    ahead, steps = PrefetchedStream(plain(rows), ahead=100), plain().steps_per_epoch
    for _ in range(steps):
        next(ahead)
    for _ in range(2):
        with pytest.raises(LimbeckError, match="second epoch is broken"):
            next(ahead)
    ahead.close()


def test_the_thread_ends_with_its_owner_and_keeps_its_hands_off_the_cores():
    before = torch.get_num_threads()
    ahead = PrefetchedStream(plain())
    next(ahead)
    assert len(threads()) == 1
    assert torch.get_num_threads() == before
    del ahead
    gc.collect()
    assert not threads()


def test_it_stays_only_so_many_steps_ahead():
    stream = plain()
    ahead = PrefetchedStream(stream, ahead=2)
    next(ahead)
    time.sleep(0.1)
    assert stream.position["step"] + stream.position["epoch"] * stream.steps_per_epoch == 3
    ahead.close()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("end", "code", "words"),
    [("", 0, ""), ("raise SystemExit(3)", 3, ""), ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt")],
)
def test_an_interpreter_that_forgets_to_close_still_exits_at_once(end, code, words):
    text = f"import test_prefetch as t\nahead = t.PrefetchedStream(t.plain())\nnext(ahead)\n{end}"
    paths = os.pathsep.join(str(Path(path).resolve()) for path in [Path(__file__).parent, *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", text], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert done.stderr.strip().rpartition("\n")[2] == words
