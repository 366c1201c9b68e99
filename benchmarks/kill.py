"""Kills runs with SIGKILL at random moments and resumes them. The final weights must be those of an undisturbed run.

    python benchmarks/kill.py                            # 100 kills
    python benchmarks/kill.py --one 10 --two 2 --ray 0   # fewer

Each kill is of a run of its own: it starts, is killed while it loads, between two steps or inside a save, and resumes to the
end. Then every safetensors file of its last checkpoint (student, trained parameters and optimizer) is compared byte by byte.

one, two  all processes of a run of one or two ranks are killed. The ranks are forks of this process, which has imported
          everything, so that a kill costs about a second.
ray       a driver, a student's worker or a teacher's worker is killed. A run that loses a worker goes on by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import yaml

from limbeck import cli
from limbeck.demo.problems import generate, write_jsonl
from limbeck.demo.training import make_model, make_tokenizer
from limbeck.train.checkpoint import find_damage, list_checkpoints
from limbeck.train.run_lock import LOCK_FILE

STEPS, SAVE_STEPS = 8, 2
SECONDS = 300  # after which a run counts as hung
MARK = "LIMBECK_KILL_BENCHMARK"  # in the environment of the processes of a run on Ray
MOMENTS = ("loading", "between saves", "inside a save")


class Run(Protocol):
    """The processes of a started run."""

    def status(self) -> int | None:
        """The exit status; None while it runs."""

    def kill(self, chance: random.Random) -> str | None:
        """Kill; returns which process, or None if it was not there."""


class Forked:
    """Ranks that are forks of this process."""

    def __init__(self, ranks: int, config: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._ended: dict[int, int] = {}
        self._ranks: list[int] = []
        for rank in range(ranks):
            environment = {} if ranks == 1 else {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            self._ranks.append(_fork(lambda: _train(config), log, {key: str(environment[key]) for key in environment}))

    def status(self) -> int | None:
        for pid in self._ranks:
            if pid not in self._ended and (found := os.waitpid(pid, os.WNOHANG)) != (0, 0):
                self._ended[pid] = os.waitstatus_to_exitcode(found[1])
        if any(self._ended.values()):
            self.kill()
        return max(self._ended.values(), key=abs) if len(self._ended) == len(self._ranks) else None

    def kill(self, chance: random.Random | None = None) -> str | None:
        left = [pid for pid in self._ranks if pid not in self._ended]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for pid in left:
            self._ended[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return "all ranks"


class OnRay:
    """A driver and its workers."""

    def __init__(self, config: Path, log: Path) -> None:
        command = [sys.executable, "-m", "limbeck", "train", str(config)]
        self._mark = f"{config}-{time.monotonic_ns()}"
        with log.open("ab") as file:
            self._driver = subprocess.Popen(
                command, stdout=file, stderr=file, env={**os.environ, MARK: self._mark}, start_new_session=True
            )

    def status(self) -> int | None:
        return self._driver.poll()

    def kill(self, chance: random.Random) -> str | None:
        victim = chance.choice(["driver", "StudentWorker", "TeacherWorker"])
        if victim == "driver":
            self._driver.kill()
            self._driver.wait()
            while self._workers(""):  # Ray ends them when it notices
                time.sleep(0.1)
            return victim
        workers = self._workers(victim)
        for pid in workers[:1]:
            os.kill(pid, signal.SIGKILL)
        return victim if workers else None

    def _workers(self, name: str) -> list[int]:
        found, mark = [], f"{MARK}={self._mark}".encode()
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                ours = mark in entry.with_name("environ").read_bytes().split(b"\0")
                if ours and entry.read_bytes().startswith(f"ray::{name}".encode()):
                    found.append(int(entry.parent.name))
            except OSError:  # ended meanwhile
                continue
        return found


def _train(config: Path) -> int:
    return cli.main(["train", str(config)])


def _fork(work: Callable[[], int], log: Path, environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environment)
        status = work()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


class Campaign:
    """Kills of one kind of run in ``folder``; ``begin(config file, log file)`` starts one."""

    def __init__(
        self, folder: Path, settings: dict[str, Any], begin: Callable[[Path, Path], Run], chance: random.Random
    ) -> None:
        self.folder, self.settings, self.begin, self.chance = folder, settings, begin, chance
        self.kills: Counter[str] = Counter()
        self.victims: Counter[str] = Counter()
        self.unfinished = self.without_checkpoint = 0
        self.wrong: list[str] = []
        self._measure()

    def _start(self, out: Path) -> Run:
        config = self.folder / f"{out.name}.yaml"
        config.write_text(yaml.safe_dump({**self.settings, "output_dir": str(out), "resume_from_checkpoint": True}))
        return self.begin(config, self.folder / f"{out.name}.log")

    def _measure(self) -> None:
        """Make the undisturbed run, and measure when it loads, steps and saves."""
        self.expected = self.folder / "undisturbed"
        begun, run, saves, saving = time.monotonic(), self._start(self.expected), [], 0.0
        self.loading = self.running = 0.0
        while run.status() is None:
            now = time.monotonic()
            if not self.loading and _steps(self.expected):
                self.loading = now - begun
            if not saving and _unfinished(self.expected):
                saving = now
            elif saving and not _unfinished(self.expected):
                saves.append(now - saving)
                saving = 0.0
            time.sleep(0.001)
        self.running = time.monotonic() - begun - self.loading
        if run.status() != 0:
            raise SystemExit(f"the undisturbed run failed:\n{self._log(self.expected)}")
        self.saving = sorted(saves)[len(saves) // 2] if saves else 0.01

    def kill_one(self, number: int) -> None:
        """Start a run, kill it, resume it, and compare."""
        out = self.folder / f"run-{number}"
        victim = moment = None
        while victim is None:  # a run that ends before its moment, or a process that is not there, is tried again
            shutil.rmtree(out, ignore_errors=True)
            moment = MOMENTS[number % len(MOMENTS)]
            run = self._start(out)
            if self._wait_for(moment, out, run):
                victim = run.kill(self.chance)
            if victim is None:
                self._wait_for_end(run, out)
        self.kills[moment] += 1
        self.victims[victim] += 1
        self.unfinished += bool(_unfinished(out))
        self.without_checkpoint += not list_checkpoints(out)
        damaged = [path.name for path in list_checkpoints(out) if find_damage(path)]
        if damaged:
            self.wrong.append(f"kill {number}, {moment}: {', '.join(damaged)} damaged")
        if victim in ("all ranks", "driver"):
            run = self._start(out)
        self._wait_for_end(run, out)
        different = _differences(self.expected / f"checkpoint-{STEPS}", out / f"checkpoint-{STEPS}")
        left = [path.name for path in (*_unfinished(out), *out.glob(f"{LOCK_FILE}*"))]
        if different or left:
            self.wrong.append(f"kill {number}, {moment}: {different or 'left behind: '}{', '.join(left)}")
        shutil.rmtree(out, ignore_errors=True)

    def _wait_for(self, moment: str, out: Path, run: Run) -> bool:
        """Return when the moment has come; False if the run has ended before."""
        delay, begun = self.chance.random(), time.monotonic()
        step, saves, was_saving, due = (
            self.chance.randrange(1, STEPS),
            self.chance.randrange(1, STEPS // SAVE_STEPS + 1),
            False,
            0.0,
        )
        while run.status() is None:
            now, saving = time.monotonic(), bool(_unfinished(out))
            saves -= saving and not was_saving
            was_saving = saving
            if not due:
                if moment == "loading":
                    due = begun + delay * self.loading
                elif moment == "between saves" and _steps(out) >= step:
                    due = now + delay * self.running / STEPS
                elif moment == "inside a save" and saves <= 0:
                    due = now + delay * self.saving
            if due and now >= due:
                return True
            time.sleep(0.001)
        return False

    def _wait_for_end(self, run: Run, out: Path) -> None:
        until = time.monotonic() + SECONDS
        while run.status() is None:
            if time.monotonic() > until:
                raise SystemExit(f"a run does not end:\n{self._log(out)}")
            time.sleep(0.005)
        if run.status() != 0:
            raise SystemExit(f"a run ended with status {run.status()}:\n{self._log(out)}")

    def _log(self, out: Path) -> str:
        return "\n".join((self.folder / f"{out.name}.log").read_text().splitlines()[-30:])


def _unfinished(out: Path) -> list[Path]:
    return list(out.glob(".checkpoint-*"))


def _steps(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _differences(expected: Path, found: Path) -> str:
    """What differs between the tensors of two checkpoints, in words."""
    one, other = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
        for folder in (expected, found)
    )
    return ", ".join(sorted(name for name in one | other if one.get(name) != other.get(name)))


def make_settings(folder: Path) -> dict[str, Any]:
    """Tiny models and data in ``folder``; returns the settings of a run."""
    write_jsonl(generate(200, 1), folder / "teacher.jsonl")
    tokenizer = make_tokenizer(folder, 320)
    make_model(folder / "teacher", tokenizer, (2, 48), 1)
    make_model(folder / "student", tokenizer, (2, 32), 0)
    data = {"file_name": str(folder / "teacher.jsonl"), "cache_path": str(folder / "cache")}
    return {
        "student_pretrain": str(folder / "student"),
        "teacher_pretrain": str(folder / "teacher"),
        "sequence_length": 128,
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "logging_steps": 1,
        "track_with": "none",
        "student": {"data_args": data, "model_args": {"dtype": "fp32"}},
        "teacher": {"model_args": {"dtype": "fp32"}},
    }


def with_rows(settings: dict[str, Any], rows: int) -> dict[str, Any]:
    """The settings with ``rows`` in the micro-batch of each rank."""
    student = {**settings["student"], "training_args": {"per_device_train_batch_size": rows}}
    return {**settings, "student": student}


def on_ray(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with workers of their own for student and teacher."""
    roles = {"student": {**settings["student"], "device_mapping": [0]}}
    roles["teacher"] = {**settings["teacher"], "device_mapping": [1]}
    return {**settings, **roles, "max_restarts": 3}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=int, default=70, help="kills of runs of one rank")
    parser.add_argument("--two", type=int, default=20, help="kills of runs of two ranks")
    parser.add_argument("--ray", type=int, default=10, help="kills of runs on Ray")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings_file, modules_file = folder / "settings.json", folder / "modules.json"

        def prepare() -> int:  # not in this process: one that has computed must not be forked
            settings_file.write_text(json.dumps(make_settings(folder)))
            config = folder / "first.yaml"
            config.write_text(
                yaml.safe_dump({**json.loads(settings_file.read_text()), "output_dir": str(folder / "first")})
            )
            status = _train(config)
            modules_file.write_text(json.dumps(list(sys.modules)))
            return status

        if os.waitpid(_fork(prepare, folder / "prepare.log", {}), 0)[1]:
            raise SystemExit((folder / "prepare.log").read_text())
        for module in json.loads(modules_file.read_text()):  # the forks find everything imported
            with contextlib.suppress(ImportError):  # a name that another module has made
                importlib.import_module(module)
        settings = with_rows(json.loads(settings_file.read_text()), 4)
        kinds: dict[str, tuple[int, dict[str, Any], Callable[[Path, Path], Run]]] = {
            "one rank": (args.one, settings, lambda config, log: Forked(1, config, log)),
            "two ranks": (args.two, with_rows(settings, 2), lambda config, log: Forked(2, config, log)),
            "Ray": (args.ray, on_ray(settings), OnRay),
        }
        results = []
        for name, (count, its_settings, begin) in kinds.items():
            if not count:
                continue
            place, begun = folder / name.replace(" ", "-"), time.monotonic()
            place.mkdir()
            campaign = Campaign(place, its_settings, begin, random.Random(f"{args.seed}/{name}"))
            for number in range(count):
                campaign.kill_one(number)
            results.append(
                {
                    "processes": name,
                    "kills": count,
                    **{moment: campaign.kills[moment] for moment in MOMENTS},
                    "left an unfinished checkpoint": campaign.unfinished,
                    "started again from the beginning": campaign.without_checkpoint,
                    "other final weights": len(campaign.wrong),
                    "victims": dict(campaign.victims),
                    "wrong": campaign.wrong,
                    "seconds": round(time.monotonic() - begun, 1),
                }
            )
    columns = [key for key in results[0] if key not in ("victims", "wrong", "seconds")]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for result in results:
        print("| " + " | ".join(str(result[column]) for column in columns) + " |")
    for result in results:
        print(f"{result['processes']}: {result['victims']}, {result['seconds']} s", *result["wrong"], sep="\n  ")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return int(any(result["wrong"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
