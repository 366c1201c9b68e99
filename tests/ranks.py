"""Ranks that torchrun starts once for all tests of a session, because starting them takes longer than most runs of tests.

A test that is about the start, the end or the environment of processes starts its own.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from limbeck.strategies.world import start_world

_DONE = "all ranks are done\n"
_started: dict[int, Ranks] = {}


def run_on_ranks(size: int, *command: str) -> str:
    """What ``torchrun --nproc-per-node size command`` prints, which must succeed; other tests have used its processes before.

    Scripts find a process group and leave it, and undo what they change of other modules.
    """
    ranks = _started.get(size)
    if ranks is None or not ranks.alive:
        ranks = _started[size] = Ranks(size)
    output = ranks.run(*command)
    if size > 4:  # which take much memory
        ranks.end()
    return output


class Ranks:
    """``size`` processes in one group that run one command after another."""

    def __init__(self, size: int) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        self._process = subprocess.Popen(
            [*launcher, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        atexit.register(self.end)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def run(self, *command: str) -> str:
        """The output of all ranks. An error of one ends them all, and is an AssertionError with the output."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"command": command, "environment": dict(os.environ)}) + "\n")
        self._process.stdin.flush()
        output = ""
        try:
            for line in self._process.stdout:
                output += line
                if output.endswith(_DONE):
                    return output.removesuffix(_DONE)
        except BaseException:  # a test's time is over: the ranks are in the middle of its command
            self.end()
            raise
        self._process.wait()
        raise AssertionError(output)

    def end(self) -> None:
        self._process.terminate()
        self._process.communicate()
        atexit.unregister(self.end)


def serve() -> None:
    """One rank: runs what rank 0 reads from standard input, until that ends."""
    with start_world() as world:
        while True:
            job: list[dict[str, Any] | None] = [None]
            if world.is_main and (line := sys.stdin.readline()):
                job = [json.loads(line)]
            world.barrier()  # waits for any time
            dist.broadcast_object_list(job, device=torch.device("cpu"))
            if job[0] is None:
                return
            with _environment(job[0]["environment"]):
                _run(job[0]["command"])
            sys.stdout.flush()
            sys.stderr.flush()
            world.barrier()
            if world.is_main:
                sys.stdout.write(_DONE)
                sys.stdout.flush()


@contextmanager
def _environment(changes: dict[str, str]):
    """This process's environment with ``changes``; afterwards it is as it was before."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(command: list[str]) -> None:
    """``python command`` within this process."""
    argv, path = sys.argv, list(sys.path)
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        sys.argv, sys.path[:] = argv, path


if __name__ == "__main__":
    serve()
