"""Tokenising in several processes, and of several processes that want the same data."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from limbeck.data import cache as caching
from limbeck.data import tokenize_files

ARRAYS = ("tokens", "labels", "offsets", "weights", "groups", "num_supervised")
BEGIN = """
import sys, time
from pathlib import Path
from transformers import AutoTokenizer
from limbeck.data import tokenize_files
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
calls = []
def progress(rows):
    calls.append(rows)
    time.sleep(float(sys.argv[4]))
print("ready", flush=True)
sys.stdin.readline()
print("started", flush=True)
examples, report = tokenize_files([sys.argv[2]], tokenizer, cache_dir=Path(sys.argv[3]), progress=progress)
print(len(calls), len(examples), report.tokens, flush=True)
"""


def rows(count):
    for i in range(count):
        row = {"question": f"How many eggs has Ann, if {i}?", "answer": f"She has {i} eggs. " * (i % 7 + 1)}
        yield {**row, "weight": 0.5} if i > count // 2 and i % 3 == 0 else row


def write(path, count):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)


def process(tmp_path, slow):
    arguments = [
        sys.executable,
        "-c",
        BEGIN,
        str(tmp_path / "tokenizer"),
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "cache"),
    ]
    return subprocess.Popen([*arguments, str(slow)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def begin(*processes):
    for one in processes:
        assert one.stdout.readline() == "ready\n"
    for one in processes:
        one.stdin.write("\n")
        one.stdin.flush()
        assert one.stdout.readline() == "started\n"


@pytest.mark.processes
def test_two_processes_that_start_together_make_the_entry_once(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write(tmp_path / "a.jsonl", 3000)
    both = [process(tmp_path, 0.2) for _ in range(2)]
    begin(*both)
    outputs = [one.communicate(timeout=60)[0].split() for one in both]
    assert sorted(int(calls) for calls, *_ in outputs) == [0, 3]
    assert outputs[0][1:] == outputs[1][1:]
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.processes
def test_the_next_process_removes_what_a_killed_process_left(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path, cache = write(tmp_path / "a.jsonl", 3000), tmp_path / "cache"
    victim = process(tmp_path, 60)
    begin(victim)
    while not list(cache.glob("*/tokens.npy")):
        time.sleep(0.05)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    assert list(cache.glob("*.lock"))
    examples, _ = tokenize_files([path], tokenizer, cache_dir=cache)
    assert same(examples, tokenize_files([path], tokenizer)[0])
    assert len(list(cache.iterdir())) == 1


def test_the_hash_of_a_large_file_is_remembered_until_the_file_changes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(caching, "_REMEMBERED", 1)
    path, cache = write(tmp_path / "a.jsonl", 10), tmp_path / "cache"
    os.utime(path, (1, 1))
    tokenize_files([path], tokenizer, cache_dir=cache)
    (memo,) = (cache / "hashes").iterdir()
    before = memo.read_text()
    tokenize_files([path], tokenizer, cache_dir=cache)
    assert memo.read_text() == before
    path.write_text(path.read_text().replace("Ann", "Eve"))
    os.utime(path, (2, 2))
    examples, _ = tokenize_files([path], tokenizer, cache_dir=cache)
    assert memo.read_text() != before
    assert "Eve" in tokenizer.decode(examples.row(0)[0])


def test_a_file_changed_a_moment_ago_is_hashed_again(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(caching, "_REMEMBERED", 1)
    path = write(tmp_path / "a.jsonl", 10)
    tokenize_files([path], tokenizer, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / "hashes").exists()


def test_a_process_that_waited_for_a_failed_one_makes_the_entry(tmp_path):
    folder, made = tmp_path / "entry", []
    waiting, inside, done = threading.Event(), threading.Event(), threading.Event()

    def make_after_a_failure():
        waiting.set()
        with caching.entry(folder) as unfinished:
            made.append(unfinished)
            inside.set()
            done.wait(10)

    second = threading.Thread(target=make_after_a_failure)
    with pytest.raises(KeyError), caching.entry(folder):
        second.start()
        waiting.wait(10)
        time.sleep(0.2)  # until it waits for the lock
        raise KeyError
    assert inside.wait(10)
    with (tmp_path / "entry.lock").open("w") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    done.set()
    second.join()
    assert made[0] is not None
    assert folder.is_dir()
