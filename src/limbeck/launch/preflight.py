"""``limbeck check``: everything that a run checks before its first step, without loading a model.

First come the files, the machines and the memory; if those are right, also the data. Activations are not counted: what does
not fit here does not run, and what fits may still run out of memory. ``limbeck plan`` counts them.
"""

from __future__ import annotations

import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from limbeck.cluster.actors import versions
from limbeck.cluster.placement import Place, describe_device_slots, plan_placement, unknown_gpu
from limbeck.cluster.session import can_join, load_ray, ray_session
from limbeck.config import DistillConfig
from limbeck.config.launcher import launched_processes
from limbeck.config.schema import WorkerConfig
from limbeck.errors import LimbeckError, UnknownMemory
from limbeck.launch.driver import refuse_backend
from limbeck.launch.first_batch import FirstRank, describe_data
from limbeck.plan.memory import ModelMemory, student_memory, teacher_memory
from limbeck.strategies.base import check_worker
from limbeck.teachers.service import find_service
from limbeck.train.build.early_checks import early_checks
from limbeck.train.build.objective import make_objective, make_objectives
from limbeck.train.build.student import resolve_parallelism
from limbeck.train.run_lock import lock_run


@dataclass(frozen=True)
class Machine:
    """Resources of one machine. memory: bytes. gpu_memory: bytes of its smallest GPU."""

    name: str
    cpus: int
    gpus: int
    memory: int
    gpu_memory: int
    versions: dict[str, str]


def check_run(config: DistillConfig) -> list[str]:
    """Print what a run would use and read, and return a sentence for everything that would end it before its first step.

    The data is read only if nothing else is wrong.
    """
    config = _with_launched_ranks(config)
    print("versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    problems = [*wrong_versions(), *check_machines(config)]
    try:
        with lock_run(config):
            pass
    except LimbeckError as error:
        problems.append(str(error))
    if problems:
        return problems
    print("fits")
    try:
        print(describe_data(config))
    except LimbeckError as error:
        return [str(error)]
    return []


def _with_launched_ranks(config: DistillConfig) -> DistillConfig:
    """``config`` with a device for each process of the launcher, if only the launcher decides their number."""
    ranks = launched_processes()
    if ranks is None or config.device_mapping or config.needs_worker_groups:
        return config
    return config.model_copy(
        update={"student": config.student.model_copy(update={"device_mapping": list(range(ranks))})}
    )


def wrong_versions() -> list[str]:
    """A sentence for every library whose version is not among those that Limbeck supports. One that only some runs need is
    a note.
    """
    problems = []
    with suppress(PackageNotFoundError):  # Limbeck runs from a folder of sources
        for required in map(Requirement, requires("limbeck") or []):
            optional = required.marker is not None and "extra" in str(required.marker)
            found = _installed(required.name)
            if found is None or required.specifier.contains(found, prereleases=True):
                continue
            sentence = (
                f"{required.name} {found} is installed, but Limbeck needs {required.specifier}; "
                f"pip install '{required.name}{required.specifier}'."
            )
            if optional:
                print(f"note: {sentence}", file=sys.stderr)
            else:
                problems.append(sentence)
    return problems


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_machines(config: DistillConfig) -> list[str]:
    """Print the placement, and return a sentence for everything that is missing or does not fit.

    The machines are those of the Ray at RAY_ADDRESS if that is set, else this machine.
    """
    if not _would_join(config):
        return _check(config, [this_machine()])
    with ray_session(0) as where:
        print(where)
        problems = []
        if config.teacher.service is not None:
            try:
                find_service(config)
            except LimbeckError as error:
                problems.append(str(error))
        return problems + _check(config, _joined_machines())


def _would_join(config: DistillConfig) -> bool:
    """Whether the run would join a Ray that is running."""
    uses_ray = config.needs_worker_groups or (config.num_nodes > 1 and launched_processes() is None)
    return uses_ray and can_join()


def this_machine() -> Machine:
    """The machine of this process."""
    gpus = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(platform.node(), os.cpu_count() or 1, len(gpus), memory, min(gpus, default=0), versions())


def _check(config: DistillConfig, machines: Sequence[Machine]) -> list[str]:
    problems = _layout_problems(config, on_gpus=any(machine.gpus for machine in machines))
    print(describe_device_slots(sum(machine.gpus for machine in machines)))
    ours = versions()
    for machine in machines:
        for package, theirs in machine.versions.items():
            if theirs != ours[package]:
                problems.append(
                    f"{machine.name} runs {package} {theirs}, and this process {ours[package]}; install the same on all "
                    "machines."
                )
    loads: list[ModelMemory] = []
    runs_teacher = config.teacher.model_args.names_a_model and config.teacher.service is None
    for measure in (student_memory, teacher_memory) if runs_teacher else (student_memory,):
        try:
            loads.append(measure(config))
        except UnknownMemory as error:
            print(f"note: memory is not checked: {error}", file=sys.stderr)
        except LimbeckError as error:
            problems.append(str(error))
    problems += _placement_problems(config, machines, loads)
    return list(dict.fromkeys(problems))


def _layout_problems(config: DistillConfig, *, on_gpus: bool) -> list[str]:
    mappings = _mappings(config)
    roles: list[tuple[str, WorkerConfig, int]] = [
        (role, worker, len(mapping))
        for role, worker, mapping in zip(
            ("student", "teacher"), (config.student, config.teacher), mappings, strict=False
        )
    ]
    device_type = "cuda" if on_gpus else "cpu"
    world = FirstRank(0, len(mappings[0]), torch.device("cpu"))
    checks: list[Callable[[], object]] = [
        *early_checks(config, world),
        lambda: resolve_parallelism(
            config, world, teacher_here=not config.needs_worker_groups, device_type=device_type
        ),
        lambda: make_objective(config, torch.device("cpu")),
        lambda: make_objectives(config, torch.device("cpu")),
        lambda: refuse_backend(config, "GPU" if on_gpus else "CPU"),
        *(partial(check_worker, config, *role, device_type) for role in roles),
    ]
    problems = []
    for check in checks:
        try:
            check()
        except LimbeckError as error:
            problems += str(error).splitlines()
    return problems


def _mappings(config: DistillConfig) -> list[list[int]]:
    """The devices of the student's ranks, and of the teacher's if the run starts it."""
    mappings = [list(config.device_mapping or [0])]
    if config.has_teacher and config.teacher.service is None:
        own = config.teacher.device_mapping if config.needs_worker_groups else None
        mappings.append(list(own or mappings[0]))
    return mappings


def _placement_problems(config: DistillConfig, machines: Sequence[Machine], loads: Sequence[ModelMemory]) -> list[str]:
    """Print the placement; returns what cannot be placed, and which memory is too small for what is placed on it."""
    problems = []
    if config.num_nodes > len(machines) and launched_processes() is None:
        hint = "" if can_join() else "; set RAY_ADDRESS to a Ray that has them"
        problems.append(f"num_nodes = {config.num_nodes}, but there are {len(machines)} machine(s){hint}.")
    here = launched_processes(variable="LOCAL_WORLD_SIZE")  # the other ranks are on other machines
    mappings = [mapping[:here] for mapping in _mappings(config)]
    on_gpus = any(machine.gpus for machine in machines)
    # Roles in one process take one slot; as groups of workers each takes its own.
    placed = mappings if config.needs_worker_groups else mappings[:1]
    own = (config.rollout and config.rollout.device_mapping) or []
    named = [*placed, own] if own else placed
    problems += filter(None, [unknown_gpu(named, sum(machine.gpus for machine in machines))])
    bundles, places = plan_placement(placed, config.num_gpus_per_node, on_gpus, config.generator_devices[:here])
    device = "GPU" if on_gpus else "CPU"
    # A Ray that is started here is given as many CPU slots as the run needs.
    bounded = on_gpus or _would_join(config)
    hosts, unplaced = _place([bundle[device] for bundle in bundles], machines, device, bounded=bounded)
    problems += unplaced
    assigned = []
    for load in loads:
        role = 0 if load.role == "student" else 1
        bundle_of = [place.bundle for place in places[role if len(places) > 1 else 0]]
        assigned += [
            _Assigned(hosts[bundle], number, load.held_by(rank), load.loading)
            for rank, (bundle, number) in enumerate(zip(bundle_of, mappings[role], strict=True))
            if bundle in hosts
        ]
    if loads:
        Console(highlight=False).print(_placement_table(loads, places, hosts))
    return problems + _host_problems(assigned, on_gpus) + (_gpu_problems(config, assigned) if on_gpus else [])


@dataclass(frozen=True)
class _Assigned:
    """One rank of a role on a machine. device: its number in device_mapping. held, loading: bytes."""

    machine: Machine
    device: int
    held: int
    loading: int


def _place(
    slots: Sequence[float], machines: Sequence[Machine], device: str, *, bounded: bool
) -> tuple[dict[int, Machine], list[str]]:
    """The machine of each bundle of ``slots``, largest bundles first, and what has no machine."""
    free = [float(machine.gpus if device == "GPU" else machine.cpus) for machine in machines]
    hosts: dict[int, Machine] = {}
    problems = []
    for number in sorted(range(len(slots)), key=lambda number: -slots[number]):
        index = max(range(len(machines)), key=lambda index: free[index])
        if slots[number] > free[index] and bounded:
            problems.append(
                f"device_mapping needs {slots[number]:g} free {device} slots on one machine, but {machines[index].name} has "
                f"{free[index]:g} and no machine has more; name fewer devices, or set num_gpus_per_node to what a machine has."
            )
            continue
        free[index] -= slots[number]
        hosts[number] = machines[index]
    return hosts, problems


def _placement_table(
    loads: Sequence[ModelMemory], places: Sequence[Sequence[Place]], hosts: Mapping[int, Machine]
) -> Table:
    table = Table("role", "ranks", "parameters", "memory per rank", "machines", box=None)
    for load in loads:
        role = 0 if load.role == "student" or len(places) == 1 else 1
        names = sorted({hosts[place.bundle].name for place in places[role] if place.bundle in hosts})
        memory = _size(load.per_rank)
        table.add_row(load.role, str(load.ranks), f"{load.parameters:,}", memory, ", ".join(names) or "none")
    return table


def _host_problems(assigned: Sequence[_Assigned], on_gpus: bool) -> list[str]:
    """Machines whose memory is too small for what their processes hold or load."""
    held: Counter[str] = Counter()
    loading: Counter[str] = Counter()
    for each in assigned:
        held[each.machine.name] += 0 if on_gpus else each.held
        loading[each.machine.name] += each.loading
    problems = []
    for machine in {each.machine.name: each.machine for each in assigned}.values():
        if held[machine.name] > machine.memory:
            problems.append(
                f"{machine.name} would hold {_size(held[machine.name])} of models, gradients and optimizer, but has "
                f"{_size(machine.memory)} of memory; use more machines, smaller models or LoRA."
            )
        elif loading[machine.name] > machine.memory:
            problems.append(
                f"the processes on {machine.name} load {_size(loading[machine.name])} of models before they shard them, "
                f"but it has {_size(machine.memory)} of memory; place fewer ranks on it."
            )
    return problems


def _gpu_problems(config: DistillConfig, assigned: Sequence[_Assigned]) -> list[str]:
    """GPUs whose memory is too small for the roles on them, which add up unless they are offloaded."""
    held: dict[int, int] = {}
    for each in assigned:
        before = held.get(each.device, 0)
        held[each.device] = max(before, each.held) if config.offloads_colocated else before + each.held
    hosts = {each.device: each.machine for each in assigned}
    return [
        f"device {number} ({hosts[number].name}) would hold {_size(size)} of models, gradients and optimizer, but a GPU "
        f"there has {_size(hosts[number].gpu_memory)}; use more devices, smaller models or LoRA."
        for number, size in held.items()
        if size > hosts[number].gpu_memory
    ]


def _joined_machines() -> list[Machine]:
    ray = load_ray()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    inspect = ray.remote(this_machine)
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    refs = [
        inspect.options(num_cpus=0, scheduling_strategy=strategy(node["NodeID"], soft=False)).remote() for node in nodes
    ]
    try:
        machines_seen = ray.get(refs, timeout=120)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        raise LimbeckError(f"a machine of the Ray cluster does not respond: {type(error).__name__}.") from error
    machines = []
    for node, machine in zip(nodes, machines_seen, strict=True):
        slots = node["Resources"]
        machines.append(
            Machine(
                f"{machine.name} ({node['NodeManagerAddress']})",
                int(slots.get("CPU", 0)),
                int(slots.get("GPU", 0)),
                machine.memory,
                machine.gpu_memory,
                machine.versions,
            )
        )
    return machines


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
