"""Groups of worker processes: started at their places, joined in a process group, watched, and ended.

What a worker does is its class's affair. A worker that dies, hangs or loses its peers ends in ``WorkerLost``, which says that
going on from the last checkpoint is worth a try; a user's mistake stays a ``LimbeckError``, which it is not.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from limbeck.cluster.placement import Placement
from limbeck.cluster.session import NAMESPACE, load_ray
from limbeck.errors import LimbeckError
from limbeck.strategies.world import World

_STARTING_SECONDS = 300
_LOOK_SECONDS = 0.1
_ROLL_SECONDS = 5

Look = Callable[[], None]


def no_look() -> None:
    pass


class WorkerLost(Exception):
    """A worker died, hung, or failed in a way that may be another's fault."""


def versions() -> dict[str, str]:
    """What must be the same in all processes of a run."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, **{name: version(name) for name in ("limbeck", "torch", "transformers")}}


class Worker:
    """One process of a group. log: the file that takes everything it prints. needs: a module that takes long to import, which
    only the workers do."""

    needs = "torch"

    def __init__(self, name: str, log: str) -> None:
        self.name = name
        self.world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", buffering=1) as file:  # noqa: PTH123
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Ray itself makes use of there
            again = load_ray().get_runtime_context().was_current_actor_reconstructed
        if again:
            print(f"{name} died before; Ray has started it again, as process {os.getpid()}", flush=True)
        # Thousands of modules are no garbage, and looking for it among them takes a sixth of the time.
        gc.disable()
        import_module(self.needs)
        gc.freeze()
        gc.enable()

    def about(self) -> dict[str, Any]:
        """Which process on which machine this is, and what it runs."""
        given = load_ray().get_runtime_context().get_assigned_resources().get("GPU", 0)
        seen = torch.cuda.is_available()
        return {
            "pid": os.getpid(),
            "host": platform.node(),
            "versions": versions(),
            "gpu": str(torch.cuda.get_device_properties(0).uuid) if seen else None,
            "gpu_unseen": given > 0 and not seen,
        }

    def offer_store(self) -> tuple[str, int]:
        """Open the store over which the group meets, on a port that is free; returns where it is."""
        host = load_ray().util.get_node_ip_address()
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._store.port

    def join(self, rank: int, size: int, store: tuple[str, int], minutes: float) -> None:
        """Become ``rank`` of a process group of ``size`` (gloo on CPUs, NCCL on GPUs)."""
        if not hasattr(self, "_store"):
            self._store = dist.TCPStore(store[0], store[1], is_master=False)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0")
        backend = "cpu:gloo,cuda:nccl" if self.world.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=self._store, rank=rank, world_size=size, timeout=timedelta(minutes=minutes)
        )
        self.world = World(rank, size, self.world.device)


@contextmanager
def failures_logged() -> Iterator[None]:
    """Inside a worker: leave the traceback of what fails in the block in its log; whoever called gets a sentence."""
    try:
        yield
    except LimbeckError:
        raise
    except BaseException:
        traceback.print_exc()
        raise


@dataclass(frozen=True)
class WorkerGroup:
    """The workers of one role, in the order of their ranks. look: called again and again while they are waited for; what it
    raises ends the waiting."""

    name: str
    actors: tuple[Any, ...]
    look: Look = no_look

    @classmethod
    def start(
        cls,
        name: str,
        worker: type[Worker],
        arguments: Sequence[Any],
        *,
        placement: Placement,
        which: int,
        log_dir: Path,
        environment: Mapping[str, str],
        threads: int = 1,
        restarts: int = 0,
        registered: str | None = None,
        direct: bool = False,
        look: Look = no_look,
    ) -> WorkerGroup:
        """Start a ``worker(name, log, *arguments)`` at each of the placement's ``which``-th places, and do not wait for it.

        threads: calls that a worker takes at once. restarts: how often Ray may start a dead one again by itself, its calls
        repeated; only for workers whose constructor makes all of their state. registered: a name under which other programs
        find them for as long as this one lives. direct: tensors can travel between them and others past the object store.
        """
        ray = load_ray()
        if direct:
            import limbeck.teachers.channels.ray_direct  # noqa: F401  what the workers must know is taken from this process
        # Where Ray may let them, workers run on other threads than the first, so only where it must.
        remote = ray.remote(enable_tensor_transport=True) if direct else ray.remote
        actors = []
        places = placement.groups[which]
        for rank, at in enumerate(places):
            options: dict[str, Any] = {
                "num_cpus": 1 if placement.device == "CPU" else 0,
                "num_gpus": at.gpus,
                "max_concurrency": threads,
                "max_restarts": restarts,
                "max_task_retries": -1 if restarts else 0,
                "runtime_env": {"env_vars": dict(environment)},
                "scheduling_strategy": ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                    placement.group, placement_group_bundle_index=at.bundle
                ),
            }
            if registered is not None:
                options |= {"name": f"{registered}/{rank}", "namespace": NAMESPACE}
            called = f"{name}-{rank}"
            actors.append(remote(worker).options(**options).remote(called, str(log_dir / f"{called}.log"), *arguments))
        return cls(name, tuple(actors), look)

    @classmethod
    def find(cls, name: str, registered: str, look: Look = no_look) -> WorkerGroup | None:
        """The group that another program has registered, if it is there; ``name`` is what it is called in this one."""
        ray = load_ray()
        try:
            actors = [
                ray.get_actor(f"{registered}/{rank}", NAMESPACE)
                for rank in range(registered_groups().get(registered, 0))
            ]
        except ValueError:  # it has ended in between
            return None
        return cls(name, tuple(actors), look) if actors else None

    def meet(self, minutes: float, *, together: bool = True) -> None:
        """Wait until all are there and run the same versions; ``together``, let them join in a process group, in which none
        waits longer than ``minutes`` for another."""
        self._check_workers()
        size = len(self.actors)
        if together and size > 1:
            store = result(self.actors[0].offer_store.remote(), f"{self.name}-0", _STARTING_SECONDS, self.look)
            self.call_each("join", [(rank, size, store, minutes) for rank in range(size)])

    def call(self, method: str, *arguments: Any, seconds: float | None = _STARTING_SECONDS) -> list[Any]:
        """Call a method of every worker and wait for all results."""
        return self.call_each(method, [arguments] * len(self.actors), seconds=seconds)

    def call_each(
        self, method: str, arguments: Sequence[Sequence[Any]], *, seconds: float | None = _STARTING_SECONDS
    ) -> list[Any]:
        """The same with arguments of its own for each worker."""
        asked = [getattr(actor, method).remote(*args) for actor, args in zip(self.actors, arguments, strict=True)]
        return [result(ref, f"{self.name}-{rank}", seconds, self.look) for rank, ref in enumerate(asked)]

    def end(self) -> None:
        """End the processes at once."""
        ray = load_ray()
        for actor in self.actors:
            with suppress(Exception):  # whatever Ray says of an actor that is gone already
                ray.kill(actor)

    def _check_workers(self) -> None:
        ours = versions()
        for rank, about in enumerate(self.call("about")):
            if about["gpu_unseen"]:
                raise LimbeckError(
                    f"{self.name}-{rank} on {about['host']} was given a GPU that PyTorch {about['versions']['torch']} does not "
                    "see there; install a build of PyTorch for it, or mend its driver."
                )
            for package, theirs in about["versions"].items():
                if theirs != ours[package]:
                    raise LimbeckError(
                        f"{self.name}-{rank} on {about['host']} runs {package} {theirs}, and this process {ours[package]}; "
                        "install the same on all machines."
                    )


class HealthMonitor:
    """Asks workers who they are and does not wait: each has one such question before it at most. The group has met."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group
        self._seen = list(map(_process, group.call("about")))
        self._asked: dict[int, tuple[Any, float]] = {}
        self._next = 0.0

    def started_again(self) -> list[str]:
        """A sentence for each worker that Ray has been found to have started again since the last call."""
        if time.monotonic() >= self._next:
            self._ask()
        told = []
        for rank, (ref, _) in list(self._asked.items()):
            if not load_ray().wait([ref], timeout=0)[0]:
                continue
            del self._asked[rank]
            name = f"{self._group.name}-{rank}"
            with suppress(WorkerLost):  # whoever waits for it is told
                now = _process(result(ref, name, 0))
                if now != self._seen[rank]:
                    self._seen[rank] = now
                    told.append(f"{name} died; Ray has started it again ({now}), and its questions are repeated.")
        return told

    def silent(self, seconds: float) -> list[str]:
        """The names of the workers that have not answered for so long, which is waited for, or are dead."""
        self._ask()
        refs = [ref for ref, _ in self._asked.values()]
        until = min(since for _, since in self._asked.values()) + seconds
        ready = load_ray().wait(refs, num_returns=len(refs), timeout=max(0, until - time.monotonic()))[0]
        return [
            f"{self._group.name}-{rank}" for rank, (ref, _) in self._asked.items() if ref not in ready or _failed(ref)
        ]

    def _ask(self) -> None:
        now = time.monotonic()
        self._next = now + _ROLL_SECONDS
        for rank, actor in enumerate(self._group.actors):
            if rank not in self._asked:
                self._asked[rank] = (actor.about.remote(), now)


def find_lost(groups: Sequence[WorkerGroup], seconds: float) -> tuple[list[str], list[str]]:
    """A sentence for each worker that is dead, and for each that has not answered after so long, which may be at work. When
    one is lost, it is often another that fails first, for want of its peer."""
    ray = load_ray()
    asked = {
        actor.about.remote(): f"{group.name}-{rank}" for group in groups for rank, actor in enumerate(group.actors)
    }
    ready = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)[0] if asked else []
    dead = []
    for ref in ready:
        try:
            result(ref, asked[ref], 0)
        except WorkerLost as lost:
            dead.append(str(lost))
    return dead, [f"{name} does not answer" for ref, name in asked.items() if ref not in ready]


def _process(about: Mapping[str, Any]) -> str:
    return f"process {about['pid']} on {about['host']}"


def _failed(ref: Any) -> bool:
    try:
        result(ref, "", 0)
    except WorkerLost:
        return True
    return False


def registered_groups() -> dict[str, int]:
    """The names under which groups can be found, with the number of their workers that live."""
    there = load_ray().util.list_named_actors(all_namespaces=True)
    names = [str(actor["name"]) for actor in there if actor["namespace"] == NAMESPACE and "/" in actor["name"]]
    return dict(Counter(name.rsplit("/", 1)[0] for name in sorted(names)))


def result(ref: Any, name: str, seconds: float | None, look: Look | None = None) -> Any:
    """What a worker called ``name`` returns; raises its LimbeckError, or WorkerLost for everything else that can happen.
    ``look`` is called again and again until then; what it raises ends the waiting."""
    ray = load_ray()
    if look is not None:
        until = math.inf if seconds is None else time.monotonic() + seconds
        while not ray.wait([ref], timeout=_LOOK_SECONDS)[0] and time.monotonic() < until:
            look()
        look()
    try:
        return ray.get(ref, timeout=seconds if look is None else 0)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, LimbeckError):
            raise cause from None
        if isinstance(cause, WorkerLost):
            raise WorkerLost(str(cause)) from error
        raise WorkerLost(f"{name} failed: {type(cause).__name__}: {_first_line(cause)}") from error
    except ray.exceptions.GetTimeoutError as error:
        raise WorkerLost(f"{name} has not answered for {seconds:.0f} s") from error
    except ray.exceptions.OutOfMemoryError as error:
        raise LimbeckError(
            f"{name} was ended because its machine ran out of memory; place fewer ranks on a machine, use smaller models, or "
            "lower student.training_args.per_device_train_batch_size or sequence_length."
        ) from error
    except ray.exceptions.RayError as error:
        raise WorkerLost(f"{name} died ({type(error).__name__})") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no more is known")
