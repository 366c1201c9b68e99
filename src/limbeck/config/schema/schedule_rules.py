"""Rules for the arguments of the learning rate schedules that are not those of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from limbeck.config.schema.base import Contradiction
from limbeck.config.schema.training import (
    MEGATRON_STYLES,
    SCHEDULER_KWARGS,
    SEQUENTIAL_KWARGS,
    SEQUENTIAL_REQUIRED,
    TrainingArgs,
)

PATH = "student.training_args.lr_scheduler_kwargs"


def schedule_contradictions(training: TrainingArgs, max_steps: int | None) -> Iterator[Contradiction]:
    """Errors in the ``lr_scheduler_kwargs`` of a scheduler. max_steps: of the run; None if epochs limit it."""
    scheduler, kwargs = training.lr_scheduler_type, training.lr_scheduler_kwargs
    if scheduler == "sequential":
        yield from _sequential_contradictions(kwargs)
    elif scheduler == "megatron":
        faults = list(_megatron_contradictions(kwargs))
        yield from faults or _warmup_contradictions(training, max_steps)
    for key in {"min_lr", "warmup_init"}.intersection(SCHEDULER_KWARGS.get(scheduler, ())):
        value = kwargs.get(key)
        if isinstance(value, (int, float)) and value > training.learning_rate:
            yield Contradiction(
                f"{PATH}.{key}", f"= {value:g} must not be above learning_rate = {training.learning_rate:g}"
            )


def _warmup_contradictions(training: TrainingArgs, max_steps: int | None) -> Iterator[Contradiction]:
    """Megatron-LM's schedule decays after the warm-up."""
    given = training.lr_scheduler_kwargs.get("decay_steps")
    decay, end = (max_steps, "max_steps") if given is None else (given, f"{PATH}.decay_steps")
    steps = training.warmup_steps
    warmup = steps or int(training.warmup_ratio * (max_steps or 0) + 0.5)
    if decay is not None and warmup >= decay:
        yield Contradiction(
            f"student.training_args.{'warmup_steps' if steps else 'warmup_ratio'}",
            f"= {steps or f'{training.warmup_ratio:g}, which is {warmup} steps,'} must be below {end} = {decay}, where the "
            "decay ends",
        )


def _megatron_contradictions(kwargs: Mapping[str, Any]) -> Iterator[Contradiction]:
    for key, styles in MEGATRON_STYLES.items():
        if kwargs.get(key, styles[0]) not in styles:
            yield Contradiction(f"{PATH}.{key}", f"= {kwargs[key]} is not one of {', '.join(styles)}")
    for key in ("decay_steps", "wsd_decay_steps"):
        if key in kwargs and not (type(kwargs[key]) is int and kwargs[key] > 0):
            yield Contradiction(f"{PATH}.{key}", f"= {kwargs[key]} must be a whole number of steps above 0")
    for key in ("min_lr", "warmup_init"):
        value = kwargs.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            yield Contradiction(f"{PATH}.{key}", f"= {value} must be a learning rate")
    if kwargs.get("decay_style") == "WSD" and "wsd_decay_steps" not in kwargs:
        yield Contradiction(f"{PATH}.wsd_decay_steps", "is not set; WSD needs the number of steps of its decay")


def _sequential_contradictions(kwargs: Mapping[str, Any]) -> Iterator[Contradiction]:
    schedulers, milestones = kwargs.get("schedulers"), kwargs.get("milestones", []) or []
    if not isinstance(schedulers, list) or not all(isinstance(one, Mapping) for one in schedulers):
        yield Contradiction(
            f"{PATH}.schedulers", "must be a list of sections such as {name: LinearLR, total_iters: 10}"
        )
        return
    for number, one in enumerate(schedulers):
        where, name = f"{PATH}.schedulers[{number}]", one.get("name")
        if name not in SEQUENTIAL_KWARGS:
            yield Contradiction(where, f"has the name {name}, which is not one of {', '.join(SEQUENTIAL_KWARGS)}")
            continue
        known, required = SEQUENTIAL_KWARGS[name], SEQUENTIAL_REQUIRED.get(name)
        for key, value in one.items():
            if key != "name" and key not in known:
                yield Contradiction(f"{where}.{key}", f"is not read by {name}, which reads {', '.join(known)}")
            elif key != "name" and (isinstance(value, bool) or not isinstance(value, (int, float))):
                yield Contradiction(f"{where}.{key}", f"= {value} must be a number")
            elif key in ("total_iters", "T_max", "step_size") and not (type(value) is int and value > 0):
                yield Contradiction(f"{where}.{key}", f"= {value} must be a whole number of steps above 0")
        if required is not None and required not in one:
            yield Contradiction(where, f"needs {required} for {name}; add it")
    whole = isinstance(milestones, list) and all(type(step) is int and step > 0 for step in milestones)
    if not whole or sorted(set(milestones)) != milestones or len(milestones) != len(schedulers) - 1:
        yield Contradiction(
            f"{PATH}.milestones",
            f"= {milestones} must be increasing steps, one for each of the {len(schedulers)} schedulers but the first",
        )
    interval = kwargs.get("interval", 1)
    if type(interval) is not int or interval < 1:
        yield Contradiction(f"{PATH}.interval", f"= {interval} must be a whole number of optimizer steps above 0")
