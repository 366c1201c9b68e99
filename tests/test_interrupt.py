"""Ctrl-C is acknowledged at once, also during an operation that does not return to Python."""

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import hashlib, sys, time
from limbeck import interrupt
interrupt._UNWINDING_SECONDS = 0.1
with interrupt.stop_requests(interrupt.SAVES) as stop:
    print("ready", flush=True)
    if sys.argv[1] == "python":
        while not stop.poll() or sys.argv[2] == "twice":
            time.sleep(0.01)
    else:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000 if sys.argv[2] == "once" else 2**31 - 1)
print("saved", stop.signal)
"""


def start(*arguments: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.processes
@pytest.mark.parametrize("inside", ["python", "an operation"])
def test_the_first_signal_is_acknowledged_and_the_second_ends_the_process(inside):
    first = "Stopping after this step and saving; press Ctrl-C again to quit without saving.\n"
    process = start(inside, "twice")
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == first
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "Quitting without saving.\n"
    out, _ = process.communicate(timeout=60)
    assert out == ""
    assert process.returncode in (130, -signal.SIGINT)  # the command turns KeyboardInterrupt into 130

    process = start(inside, "once")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == (f"saved {int(signal.SIGTERM)}\n", first)
