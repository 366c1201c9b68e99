"""Runs the containers of a manifest as processes: what kubelet and the operators do, on one machine and without devices."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml

from limbeck.cli import main


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def manifest(config: Path, folder: Path, capsys, *arguments: str) -> dict:
    """The job of ``limbeck deploy kubernetes`` whose volume is ``folder``; its ConfigMap is written to ``folder``/etc."""
    status = main(
        ["deploy", "kubernetes", str(config), "--image", "i", "--pvc", "p", "--nodes", "2", "--gpus-per-node", "1",
         "--mount-path", str(folder), *arguments]
    )  # fmt: skip
    output = capsys.readouterr()
    assert status == 0, output.err
    config_map, job = yaml.safe_load_all(output.out)
    (folder / "etc").mkdir(exist_ok=True)
    for name, text in config_map["data"].items():
        (folder / "etc" / name).write_text(text)
    return job


class Pod:
    """A container as a process; ``restart`` starts it again as kubelet does after a failure.

    Args:
        container: with ``command`` and ``env``.
        operator: environment variables that the operator sets.
        folder: working directory, unless the command changes it.
        log: file of its output.
    """

    def __init__(self, container: dict, operator: dict[str, str], folder: Path, log: Path) -> None:
        own = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        address = {"fieldRef": {"fieldPath": "status.podIP"}}
        own |= {one["name"]: "127.0.0.1" for one in container["env"] if one.get("valueFrom") == address}
        inside = {**own, **operator}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = {**os.environ, **inside, "PATH": path}
        expanded = [re.sub(r"\$\((\w+)\)", lambda found: inside[found.group(1)], word) for word in container["command"]]
        self._command = [word.replace("/etc/limbeck", str(folder / "etc")) for word in expanded]
        self._folder, self._log = folder, log
        self.restart()

    def restart(self) -> None:
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                self._command, cwd=self._folder, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def log(self) -> str:
        return self._log.read_text()


def wait_for(pods: list[Pod], seconds: float = 150) -> int:
    """Wait until all pods have succeeded, with the restart policy OnFailure; returns the number of restarts."""
    restarts, deadline = 0, time.monotonic() + seconds
    try:
        while any(pod.process.poll() != 0 for pod in pods):
            assert time.monotonic() < deadline, "\n".join(pod.log[-3000:] for pod in pods)
            for pod in pods:
                if pod.process.poll():
                    restarts += 1
                    assert restarts < 5, pod.log[-3000:]
                    pod.restart()
            time.sleep(0.05)
    finally:
        for pod in pods:
            pod.process.kill()
            pod.process.wait()
    return restarts
