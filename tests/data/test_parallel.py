"""Tokenising in several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from limbeck.data import tokenize_files
from limbeck.data.parallel import encode_in_parallel
from limbeck.errors import LimbeckError

ARRAYS = ("tokens", "labels", "offsets", "weights", "groups", "num_supervised")
SCRIPT = """
import sys, time
from transformers import AutoTokenizer
from limbeck.data import tokenize_files

def progress(rows):
    print("started", flush=True)
    time.sleep(float(sys.argv[3]))

_, report = tokenize_files([sys.argv[2]], AutoTokenizer.from_pretrained(sys.argv[1]), workers=2, progress=progress)
print(report.rows, flush=True)
"""


def rows(count):
    for i in range(count):
        row = {"question": f"How many eggs has Ann, if {i}?", "answer": f"She has {i} eggs. " * (i % 7 + 1)}
        yield {**row, "weight": 0.5} if i > count // 2 and i % 3 == 0 else row


def write(path, count):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path


def worker_processes(parent):
    """The ids of the tokenising processes that ``parent`` has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            started_by = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"LokyProcess" in command and started_by == parent:
            found.append(int(folder.name))
    return found


def exists(process):
    try:
        return "Z" not in (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")


@pytest.mark.processes
def test_results_do_not_depend_on_the_number_of_processes(tmp_path, tokenizer):
    files = [write(tmp_path / "a.jsonl", 5000), write(tmp_path / "b.jsonl", 1500)]
    done = []
    serial, report = tokenize_files(files, tokenizer, workers=1)
    parallel, same_report = tokenize_files(
        files, tokenizer, workers=3, cache_dir=tmp_path / "cache", progress=done.append
    )
    for name in ARRAYS:
        assert np.array_equal(getattr(serial, name), getattr(parallel, name))
    assert str(report) == str(same_report)
    assert done == sorted(done)
    assert done[-1] == 6500
    assert isinstance(parallel.tokens, np.memmap)
    assert serial.weights is not None
    assert serial.groups is not None


@pytest.mark.processes
def test_the_first_bad_row_is_reported(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", 4000)
    with path.open("a") as file:
        file.write('{"question": "q"}\n' + '{"question": 1, "answer": "a"}\n' * 3000)
    with pytest.raises(LimbeckError, match=r'a\.jsonl:4001 has no "answer"'):
        tokenize_files([path], tokenizer, workers=2)


@pytest.mark.processes
@pytest.mark.parametrize("interactive", [False, True])
def test_a_script_without_a_main_guard_works(tmp_path, tokenizer, interactive):
    """``interactive`` feeds the script through standard input, so that there is no main module to import."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path, script = write(tmp_path / "a.jsonl", 2500), tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = ["-" if interactive else str(script), str(tmp_path / "tokenizer"), str(path), "0"]
    result = subprocess.run(
        [sys.executable, *arguments],
        input=SCRIPT if interactive else None,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout.split() == ["started"] * 3 + ["2500"]


@pytest.mark.processes
def test_worker_processes_do_not_import_torch():
    code = "import sys, limbeck.data.parallel, limbeck.data.encode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.processes
@linux
def test_an_interrupt_ends_all_processes(tmp_path, tokenizer):
    found = []

    def interrupt(done):
        found.extend(worker_processes(os.getpid()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_files([write(tmp_path / "a.jsonl", 3000)], tokenizer, workers=2, progress=interrupt)
    assert found
    assert not any(exists(process) for process in found)


@pytest.mark.processes
@linux
def test_a_killed_parent_leaves_no_process_behind(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write(tmp_path / "a.jsonl", 2500)
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "tokenizer"), str(path), "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout.readline() == "started\n"
    found = worker_processes(parent.pid)
    assert found
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while any(exists(process) for process in found):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.processes
@linux
def test_a_killed_worker_raises_an_error_with_a_remedy(tmp_path, tokenizer):
    def kill_one(done):
        for process in worker_processes(os.getpid()):
            os.kill(process, signal.SIGKILL)

    with pytest.raises(LimbeckError, match=r"SIGKILL.*preprocessing_num_workers: 1"):
        tokenize_files([write(tmp_path / "a.jsonl", 30_000)], tokenizer, workers=2, progress=kill_one)


class _DiesWhileItSends:
    """Its process is killed after half of its second result was sent."""

    sent = 0

    def encode(self, size):
        def send_half(connection, data):
            os.write(connection.fileno(), bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        self.sent += 1
        if self.sent == 2:
            Connection._send = send_half
        return b"0" * size


@pytest.mark.processes
@linux
def test_a_worker_killed_in_the_middle_of_a_result_raises_the_same_error():
    with pytest.raises(LimbeckError, match=r"\(SIGKILL\(-9\)\).*preprocessing_num_workers: 1"):
        list(encode_in_parallel(_DiesWhileItSends(), range(20), lambda batch: (1000,), processes=2))
