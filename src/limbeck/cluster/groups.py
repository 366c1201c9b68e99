"""Groups of worker processes: starts them at their places, joins them in a process group, calls and ends them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.cluster.actors import Worker, versions
from limbeck.cluster.calls import Poll, no_poll, result
from limbeck.cluster.placement import Placement
from limbeck.cluster.session import NAMESPACE, load_ray
from limbeck.errors import LimbeckError

_STARTING_SECONDS = 300


@dataclass(frozen=True)
class GroupSpec:
    """The workers of one role, before they are started.

    Args:
        name: the role; workers are called ``<name>-<rank>``.
        worker: class of the actors, constructed as ``worker(name, log, *arguments)``.
        log_dir: folder of their log files.
        environment: environment variables of their processes.
        concurrency: calls that an actor executes at once.
        restarts: number of times that Ray may restart a dead actor and repeat its calls; only for workers whose
            constructor makes all of their state.
        registered: name under which other programs find the group while this program lives.
        direct: whether tensors may travel between these actors and others without the object store.
    """

    name: str
    worker: type[Worker]
    arguments: tuple[Any, ...]
    log_dir: Path
    environment: Mapping[str, str]
    concurrency: int = 1
    restarts: int = 0
    registered: str | None = None
    direct: bool = False

    def start(self, placement: Placement, mapping: int, poll: Poll = no_poll) -> WorkerGroup:
        """Start a worker at each place of the placement's group number ``mapping`` and return without waiting for
        them.
        """
        ray = load_ray()
        # With a tensor transport Ray may run calls on other threads than the first, so only where it is used.
        remote = ray.remote(enable_tensor_transport=True) if self.direct else ray.remote
        actors = []
        for rank, place in enumerate(placement.groups[mapping]):
            options: dict[str, Any] = {
                "num_cpus": 1 if placement.device == "CPU" else 0,
                "num_gpus": place.gpus,
                "max_concurrency": self.concurrency,
                "max_restarts": self.restarts,
                "max_task_retries": -1 if self.restarts else 0,
                "runtime_env": {"env_vars": dict(self.environment)},
                "scheduling_strategy": ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                    placement.group, placement_group_bundle_index=place.bundle
                ),
            }
            if self.registered is not None:
                options |= {"name": f"{self.registered}/{rank}", "namespace": NAMESPACE}
            name = f"{self.name}-{rank}"
            actor = remote(self.worker).options(**options)
            actors.append(actor.remote(name, str(self.log_dir / f"{name}.log"), *self.arguments))
        return WorkerGroup(self.name, tuple(actors), poll)


@dataclass(frozen=True)
class WorkerGroup:
    """The started workers of one role, in the order of their ranks. poll: called while results are awaited."""

    name: str
    actors: tuple[Any, ...]
    poll: Poll = no_poll

    @classmethod
    def find(cls, name: str, registered: str, poll: Poll = no_poll) -> WorkerGroup | None:
        """The group that another program has registered as ``registered``, or None; ``name`` is its name in this
        program.
        """
        ray = load_ray()
        try:
            actors = [
                ray.get_actor(f"{registered}/{rank}", NAMESPACE)
                for rank in range(registered_groups().get(registered, 0))
            ]
        except ValueError:  # it ended in between
            return None
        return cls(name, tuple(actors), poll) if actors else None

    def connect(self, minutes: float, *, process_group: bool = True) -> None:
        """Wait until all workers run, check their versions, and with ``process_group`` make them one process group.

        minutes: timeout of collectives in that process group.
        """
        self._check_workers()
        size = len(self.actors)
        if process_group and size > 1:
            store = result(self.actors[0].open_store.remote(), f"{self.name}-0", _STARTING_SECONDS, self.poll)
            self.call_each("join", [(rank, size, store, minutes) for rank in range(size)])

    def call(self, method: str, *arguments: Any, seconds: float | None = _STARTING_SECONDS) -> list[Any]:
        """Call a method of every worker and wait for all results."""
        return self.call_each(method, [arguments] * len(self.actors), seconds=seconds)

    def call_each(
        self, method: str, arguments: Sequence[Sequence[Any]], *, seconds: float | None = _STARTING_SECONDS
    ) -> list[Any]:
        """As ``call``, with other arguments for each worker."""
        refs = [getattr(actor, method).remote(*args) for actor, args in zip(self.actors, arguments, strict=True)]
        return [result(ref, f"{self.name}-{rank}", seconds, self.poll) for rank, ref in enumerate(refs)]

    def end(self) -> None:
        """Kill the processes."""
        ray = load_ray()
        for actor in self.actors:
            with suppress(Exception):  # Ray raises for an actor that is dead already
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


def registered_groups() -> dict[str, int]:
    """Names of the registered groups, with the number of their living workers."""
    listed = load_ray().util.list_named_actors(all_namespaces=True)
    names = [str(actor["name"]) for actor in listed if actor["namespace"] == NAMESPACE and "/" in actor["name"]]
    return dict(Counter(name.rsplit("/", 1)[0] for name in sorted(names)))
