"""Keeps two runs from writing into one folder: a lock file with the holder of the folder, and its heartbeat.

The file is ordinary text and no kernel lock, because those are local to a machine, or missing, on some shared file
systems. It survives a crash of its holder, so that a later run decides whether the holder still runs:

- On the same machine (same boot and process namespace) by the process id and the start time of that process.
- From another machine or container by the heartbeat. The holder updates the modification time of the file every
  ``_BEAT_SECONDS``; without an update for ``_STALE_SECONDS`` it counts as ended. A heartbeat that is younger is watched
  until it beats again, or is that old.

All processes of one run share a token in the environment, so they do not lock each other out.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event, Thread

from limbeck.config import DistillConfig
from limbeck.errors import LimbeckError

LOCK_FILE = ".limbeck-run.lock"
_TOKEN = "LIMBECK_RUN_TOKEN"
_BEAT_SECONDS = 10
_STALE_SECONDS = 60
_WRITING_SECONDS = 1  # that a lock file may be empty while its holder writes it


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder.

    token: of its run. machine: identifies the boot and the process namespace in which ``pid`` and ``process_start`` (in
    clock ticks) are valid; empty if unknown. host, started: for messages.
    """

    token: str
    pid: int
    machine: str
    process_start: int | None
    host: str
    started: str


@contextmanager
def lock_run(config: DistillConfig) -> Iterator[None]:
    """Hold the folders of a run within the block: ``output_dir`` and the folder of the checkpoints.

    The processes that are started within the block belong to the run; the one that calls this again takes over. Folders
    that are still empty at the end are removed again.

    Raises:
        LimbeckError: if another run holds a folder, or a folder of the run cannot be written to.
    """
    token = os.environ.get(_TOKEN)
    holder = _this_process(token or uuid.uuid4().hex)
    folders = {Path(config.output_dir).resolve(): "output_dir"}
    folders.setdefault(config.checkpoint_dir.resolve(), "checkpoint_config.output_dir")
    with ExitStack() as stack:
        for folder, key in folders.items():
            stack.enter_context(_writable(folder, key))
            stack.enter_context(_locked(folder, holder))
        with _writable(config.log_dir, "logging_dir"):
            pass
        stack.callback(_set_token, token)
        _set_token(holder.token)
        yield


def _set_token(token: str | None) -> None:
    if token is None:
        os.environ.pop(_TOKEN, None)
    else:
        os.environ[_TOKEN] = token


@contextmanager
def _writable(folder: Path, key: str) -> Iterator[None]:
    """Make ``folder`` and write a file into it, or raise LimbeckError; removes the folders that are empty at the end."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"\0" * 4096)
        except OSError as error:
            raise LimbeckError(
                f"{key} = {str(folder)!r} cannot be written to: {error.strerror}; set another {key}, or make room there."
            ) from error
        yield
    finally:
        for each in made:
            with suppress(OSError):  # it has content, which is what it was made for
                each.rmdir()


@contextmanager
def _locked(folder: Path, holder: Holder) -> Iterator[None]:
    path = folder / LOCK_FILE
    owner = _acquire(path, holder)
    ended = Event()
    heart = Thread(target=_beat, args=(path, ended), daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        if owner and (last := _read(path)) is not None and last.token == holder.token:
            path.unlink(missing_ok=True)


def _beat(path: Path, ended: Event) -> None:
    while not ended.wait(_BEAT_SECONDS):
        with suppress(OSError):  # the folder may have been removed; the run notices when it writes there
            os.utime(path)


def _acquire(path: Path, mine: Holder) -> bool:
    """Write ``mine`` to ``path``. Returns whether it is the first holder of its run.

    Raises LimbeckError if another run holds it.
    """
    while True:
        try:
            _create(path, mine)
            return True
        except FileExistsError:
            found = _read(path)
        except OSError as error:
            raise LimbeckError(f"{path} cannot be written: {error.strerror}; set another output_dir.") from error
        if found is not None and found.token == mine.token:
            with suppress(FileExistsError):
                _create(beside := _beside(path), replace(mine, started=found.started))
                beside.replace(path)
            return False
        if _is_running(path, found):
            raise LimbeckError(_refusal(path, found))
        _remove_stale(path, found)


def _refusal(path: Path, holder: Holder | None) -> str:
    who = "another run"
    if holder is not None:
        who = f"another run: process {holder.pid} on {holder.host}, started {holder.started}"
    return (
        f"{path.parent} is in use by {who}. Set another output_dir, or end that run first; if it has ended on another "
        f"machine within the last {_STALE_SECONDS} s, start again after that time."
    )


def _create(path: Path, holder: Holder) -> None:
    with path.open("x", encoding="utf-8") as file:
        try:
            file.write(json.dumps(asdict(holder)) + "\n")
            file.flush()
        except OSError:  # the disk is full
            path.unlink()
            raise


def _read(path: Path) -> Holder | None:
    """The holder; None if the file is gone, or is no lock file even after the time that writing it takes."""
    until = time.monotonic() + _WRITING_SECONDS
    while True:
        try:
            return Holder(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            if time.monotonic() > until:
                return None
            time.sleep(0.05)


def _remove_stale(path: Path, stale: Holder | None) -> None:
    """Remove the lock file of ``stale``, but not one that another process has put in its place meanwhile."""
    beside = _beside(path)
    with suppress(FileNotFoundError):  # another process was first
        path.rename(beside)
        if _read(beside) == stale:
            beside.unlink()
        else:
            beside.rename(path)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}")


def _is_running(path: Path, holder: Holder | None) -> bool:
    """Whether the holder of ``path`` still runs; may watch its heartbeat for up to ``_STALE_SECONDS``."""
    if holder is not None and holder.machine and holder.machine == _machine():
        return holder.process_start is not None and holder.process_start == _process_start(holder.pid)
    last = _last_beat(path)
    if last is None:
        return False
    with tempfile.TemporaryFile(dir=path.parent) as probe:  # its time is by the clock of the file server too
        left = _STALE_SECONDS - (os.fstat(probe.fileno()).st_mtime - last)
    if left > 0:
        print(f"note: waiting up to {left:.0f} s to see whether the run that holds {path} goes on", file=sys.stderr)
    until = time.monotonic() + left
    while time.monotonic() < until:
        time.sleep(min(1, _BEAT_SECONDS / 4))
        beat = _last_beat(path)
        if beat != last:
            return beat is not None
    return False


def _last_beat(path: Path) -> float | None:
    """The modification time; None if the file is gone."""
    try:
        with path.open("rb") as file:  # opening it revalidates the attributes that NFS caches
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _this_process(token: str) -> Holder:
    pid, started = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %z")
    return Holder(token, pid, _machine(), _process_start(pid), socket.gethostname(), started)


def _machine() -> str:
    """Where a process id identifies a process: a boot of a machine, and a process namespace (of a container) in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return ""


def _process_start(pid: int) -> int | None:
    """When the process was started, in clock ticks after the boot; None if there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])
