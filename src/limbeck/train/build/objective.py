"""Builds the objective and the loss settings of a run from its configuration."""

from __future__ import annotations

from typing import Any

import torch

from limbeck.config import DistillConfig
from limbeck.config.schema.origin_objectives import objective_key, objectives_by_origin
from limbeck.errors import LimbeckError
from limbeck.objectives import Objective, TaidSchedule, compiler_found
from limbeck.teachers.signals import SignalSpec

_WORTH_COMPILING = 1 << 32  # logits in a run; compiling saves some 5 ns on each and costs some 10 s


def make_objective(config: DistillConfig, device: torch.device) -> tuple[Objective, TaidSchedule | None]:
    """The objective, and the schedule that changes it if it is TAID."""
    parameters: dict[str, Any] = dict(config.kd_objective_kwargs)
    schedule = None
    if config.kd_objective == "taid":
        try:
            schedule = TaidSchedule(**parameters, device=device)
        except TypeError as error:
            raise LimbeckError(f"kd_objective_kwargs must be numbers for taid: {error}.") from error
        parameters = {"t": schedule.t}
    elif config.kd_objective == "adaptive_kl":
        parameters["alpha"] = config.adaptive_kl_alpha
    elif config.kd_objective in ("skewed_forward_kl", "skewed_reverse_kl"):
        parameters["skew"] = config.skew_lambda
    elif config.kd_objective == "js_divergence":
        parameters["beta"] = config.js_beta
    objective = Objective.of(
        config.kd_objective,
        kd_weight=config.distill_loss_weight,
        temperature=config.kd_temperature,
        teacher_temperature=config.effective_teacher_temperature,
        squared=config.temperature_squared,
        topk=config.logits_topk,
        tail=config.logits_topk_tail,
        topk_from=config.topk_from,
        parameters=parameters,
    )
    return objective, schedule


def objective_indices(config: DistillConfig) -> dict[str, int]:
    """Origin of a sample → index of its objective among ``make_objectives``; empty if all have the run's objective."""
    indices: dict[Any, int] = {}
    return {
        origin: indices.setdefault(objective_key(one), len(indices))
        for origin, one in objectives_by_origin(config).items()
    }


def make_objectives(config: DistillConfig, device: torch.device) -> tuple[Objective, ...]:
    """The objectives that ``objective_indices`` counts."""
    origins = {index: origin for origin, index in objective_indices(config).items()}
    by_origin = objectives_by_origin(config)
    return tuple(make_objective(by_origin[origins[index]], device)[0] for index in range(len(origins)))


def signal_spec(config: DistillConfig, vocab: int) -> SignalSpec:
    """The signal that a teacher in other processes sends; ``vocab`` is the shared vocabulary."""
    return SignalSpec(config.teacher_signal, config.logits_topk, vocab, config.effective_teacher_temperature)


def compile_loss(config: DistillConfig, supervised_tokens: float, vocab: int) -> bool:
    """Whether to compile the loss of a run over ``supervised_tokens``: a function of configuration and data only, so
    that a resumed run decides the same.
    """
    if config.compile_loss == "auto":
        return supervised_tokens * vocab >= _WORTH_COMPILING and compiler_found()
    return config.compile_loss
