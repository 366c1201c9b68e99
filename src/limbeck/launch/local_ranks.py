"""One process per device on this machine, without a launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from limbeck.errors import USER_MISTAKE, LimbeckError

STARTED_HERE = "LIMBECK_STARTED_HERE"
"""Environment variable of processes that ``run_ranks`` has started."""

_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


def visible_devices(devices: Sequence[int], allowed: str | None) -> str:
    """The value of CUDA_VISIBLE_DEVICES for ``devices``, which are indices within its present value ``allowed``."""
    if allowed is None:
        return ",".join(map(str, devices))
    names = [name.strip() for name in allowed.split(",") if name.strip()]
    if names and max(devices) >= len(names):
        raise LimbeckError(
            f"device_mapping names device {max(devices)}, but CUDA_VISIBLE_DEVICES = {allowed} leaves only "
            f"{len(names)} (numbered from 0); name devices that exist."
        )
    return ",".join(names[device] for device in devices) if names else allowed


def run_ranks(ranks: int, command: Sequence[str]) -> int:
    """Run ``command`` once per rank on this machine. If one process fails, the others are terminated.

    Returns:
        The exit status of the first rank that failed, else 0.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, STARTED_HERE: "1", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    with tempfile.TemporaryFile("w+") as others:
        processes = [
            subprocess.Popen(
                command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=others if rank else None
            )
            for rank in range(ranks)
        ]

        def pass_on(number: int, frame: object) -> None:
            for process in processes:
                process.terminate()

        before = signal.signal(signal.SIGTERM, pass_on)
        _wait(processes)
        signal.signal(signal.SIGTERM, before)
        # After an error of the main rank, the errors of the others only report that it has ended.
        if processes[0].returncode != USER_MISTAKE and any(process.returncode for process in processes):
            others.seek(0)
            sys.stderr.write("".join(others.readlines()[-40:]))
    codes = [process.returncode for process in processes]
    worst = next((code for code in codes if code), 0)
    return 128 - worst if worst < 0 else worst


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    while any(process.poll() is None for process in processes):
        try:
            time.sleep(0.2)
            # After a stop signal all ranks end by themselves. If one fails, the others would wait for it.
            if any(process.poll() not in (None, 0, *_STOPPED) for process in processes):
                # The error may be the main rank's: leave it time to print it before it is terminated too.
                time.sleep(2)
                for process in processes:
                    process.terminate()
                for process in processes:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(60)
                    process.kill()
                    process.wait()
        except KeyboardInterrupt:
            continue  # the processes have received the same Ctrl-C and save a checkpoint
