"""Rules between the keys of on-policy samples of several origins, and of their objectives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from limbeck.config.schema.base import Contradiction
from limbeck.config.schema.objective import OBJECTIVE_KEYS, SAMPLED_OBJECTIVES
from limbeck.config.schema.origin_objectives import for_origin, objective_key, objectives_by_origin
from limbeck.config.schema.origins import ORIGINS
from limbeck.config.schema.schedules import AdaptiveSchedule

if TYPE_CHECKING:
    from limbeck.config.schema.run_fields import RunFields


def mixture_contradictions(config: RunFields) -> Iterator[Contradiction]:
    """Combinations that are errors, with ``config.rollout``."""
    rollout = config.rollout
    assert rollout is not None
    for origin in ("student", "replay"):
        weight = getattr(rollout.objectives, origin).distill_loss_weight
        if weight is not None and weight < 1:
            yield Contradiction(
                f"rollout.objectives.{origin}.distill_loss_weight",
                f"= {weight:g} adds cross-entropy with what the student has written itself; remove it",
            )
    if rollout.off_policy == "teacher":
        if config.teacher.model_args.model_name_or_path is None:
            yield Contradiction(
                "rollout.off_policy", "= teacher needs the teacher's checkpoint to write with; set teacher_pretrain"
            )
        if config.cross_tokenizer != "off":
            yield Contradiction(
                "rollout.off_policy",
                "= teacher writes tokens that the student reads, so it cannot be combined with cross_tokenizer; use dataset",
            )
    if rollout.replay.is_used and rollout.max_staleness > 0:
        yield Contradiction(
            "rollout.replay.fraction",
            "cannot be combined with rollout.max_staleness, because the samples that are being "
            "written are not in the buffer yet; set one of them to 0",
        )
    if rollout.replay.is_used and config.has_policy_gradient:
        yield Contradiction(
            "rollout.replay.fraction",
            "cannot be combined with a policy gradient, which reads the probabilities and rewards of this step; set it to 0",
        )
    if rollout.steps_per_rollout > 1:
        others = {"max_staleness": rollout.max_staleness > 0, "replay.fraction": rollout.replay.is_used}
        for key in (key for key, given in others.items() if given):
            yield Contradiction(
                "rollout.steps_per_rollout",
                f"= {rollout.steps_per_rollout} writes the samples of several steps together and cannot be combined with "
                f"rollout.{key}; set one of them to its default",
            )
    if isinstance(rollout.schedule, AdaptiveSchedule):
        if not config.validation_sources or config.eval_steps == 0:
            yield Contradiction(
                "rollout.on_policy_fraction",
                "has the shape adaptive, which follows the validation; set validation.data_args.file_name and eval_steps",
            )
        if rollout.schedule.metric == "val/kd" and not config.has_teacher:
            yield Contradiction(
                "rollout.on_policy_fraction", "has the metric val/kd, which needs a teacher; use val/loss"
            )
        if rollout.max_staleness > 0:
            yield Contradiction(
                "rollout.max_staleness",
                f"= {rollout.max_staleness} writes before the validation on which an adaptive on_policy_fraction depends; set "
                "it to 0",
            )
    objectives = objectives_by_origin(config)
    if not objectives:
        return
    used = [config, *objectives.values()]
    names = {one.kd_objective for one in used}
    if len(names) > 1 and names & set(SAMPLED_OBJECTIVES):
        yield Contradiction(
            "rollout.objectives",
            f"combine {' and '.join(sorted(names))}, and an objective of the sampled token must be the only one; set one "
            "kd_objective for all",
        )
    one_objective = {
        "objective_faults": bool(config.objective_faults),
        "loss_balance: modelopt": config.loss_balance == "modelopt",
        "kd_objective: taid": any(one.kd_objective == "taid" for one in used),
        "cross_tokenizer": config.cross_tokenizer != "off" and len(set(map(objective_key, objectives.values()))) > 1,
    }
    for key in (key for key, given in one_objective.items() if given):
        yield Contradiction(
            "rollout.objectives" if rollout.objectives.model_fields_set else "distill_loss_weight",
            f"and the origins of the samples give several objectives, and {key} supports only one; set distill_loss_weight: 1 "
            "and no other objectives in rollout.objectives",
        )
    divisors = {one.effective_teacher_temperature for one in used}
    if config.teacher_signal == "top_k" and len(divisors) > 1:
        yield Contradiction(
            "rollout.objectives",
            "have several temperatures of the teacher, and teacher.signal = top_k is sent at one; use hidden_states, or "
            "one temperature",
        )


def unread_mixture_keys(config: RunFields) -> Iterator[tuple[str, str]]:
    """Keys of ``config.rollout`` that have no effect, with the reason."""
    rollout = config.rollout
    assert rollout is not None
    origins = rollout.origins
    if "replay" not in origins:
        reason = "on_policy_fraction is constantly 0 or 1" if rollout.replay.is_used else "fraction is 0"
        yield "rollout.replay.fraction", f"replaces samples that the student does not write, and {reason}"
        yield "rollout.replay.replaces", f"is only read with replay, and {reason}"
        yield "rollout.replay.capacity", f"is only read with replay, and {reason}"
    if not {"dataset", "teacher"} & set(origins):
        yield "rollout.off_policy", "is not read with on_policy_fraction: 1"
        if config.distill_loss_weight < 1:
            reason = "is only read in validation, because answers that the student has written have no cross-entropy"
            yield "distill_loss_weight", reason
    for origin in ORIGINS:
        one, path = for_origin(config, origin), f"rollout.objectives.{origin}"
        given = [key for key, value in getattr(rollout.objectives, origin) if isinstance(value, int | float | str)]
        if origin not in origins and not (origin == "student" and "replay" in origins):
            for key in given:
                yield f"{path}.{key}", f"is for samples of the origin {origin}, and the run has {' and '.join(origins)}"
            continue
        for key in (key for key in given if one.kd_objective not in OBJECTIVE_KEYS.get(key, (one.kd_objective,))):
            yield (
                f"{path}.{key}",
                f"is only read by {' and '.join(OBJECTIVE_KEYS[key])}, and kd_objective is {one.kd_objective}",
            )
