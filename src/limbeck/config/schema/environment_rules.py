"""Rules for environments, validation by writing, and the choice of the best checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from limbeck.config.schema.base import Contradiction
from limbeck.config.schema.rollout import ENVIRONMENT_KWARGS

if TYPE_CHECKING:
    from limbeck.config.schema.run_fields import RunFields

_HIGHER_IS_BETTER = ("val/accuracy", "rollout/reward", "val/top1_agreement", "train/top1_agreement")


def environment_contradictions(config: RunFields) -> Iterator[Contradiction]:
    """Errors in these keys."""
    rollout, writing = config.rollout, config.effective_validation.rollout
    environment = rollout.environment if rollout is not None else None
    if rollout is not None and environment is None and rollout.environment_kwargs:
        yield Contradiction("rollout.environment_kwargs", "needs an environment; set rollout.environment")
    known = ENVIRONMENT_KWARGS.get(environment or "", ())
    for key, value in rollout.environment_kwargs.items() if rollout is not None and known else ():
        if key not in known:  # an environment from a plug-in checks its own arguments
            yield Contradiction(
                f"rollout.environment_kwargs.{key}",
                f"is not read by environment = {environment}, which reads {', '.join(known)}",
            )
        elif fault := _fault_of_argument(key, value):
            yield Contradiction(f"rollout.environment_kwargs.{key}", fault)
    if rollout is not None and environment is None and rollout.max_turns > 1:
        yield Contradiction(
            "rollout.max_turns", f"= {rollout.max_turns} needs an environment that replies; set rollout.environment"
        )
    if rollout is not None and known and rollout.max_turns > 1:
        yield Contradiction(
            "rollout.max_turns",
            f"= {rollout.max_turns} needs an environment that replies, and {environment} does not; set it to 1, or use an "
            "environment with turns",
        )
    if writing is not None and (environment is None or config.effective_step_source != "rollout"):
        yield Contradiction(
            "validation.rollout",
            "needs a generator and an environment; set rollout.environment (with rollout.on_policy_fraction: 0 the student "
            "writes in validation only)",
        )
    if writing is not None and not config.validation_sources:
        yield Contradiction("validation.rollout", "needs validation files; set validation.data_args.file_name")
    best = config.checkpoint_config
    if best.best_metric in _HIGHER_IS_BETTER and best.best_mode == "min":
        yield Contradiction(
            "checkpoint_config.best_mode",
            f"= min selects the lowest {best.best_metric}, which is the worst; set it to max",
        )


def _fault_of_argument(key: str, value: object) -> str | None:
    """What is wrong with an argument of a built-in environment, or None."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
    if key == "workers" and not (isinstance(number, int) and number >= 1):
        return f"= {value} is not a whole number of at least 1"
    if key == "seconds" and not 0 < number < float("inf"):
        return f"= {value} is not a number greater than 0"
    if key == "answer_key" and not (isinstance(value, str) and value):
        return f"= {value} is not the name of a column"
    return None


def unread_environment_keys(config: RunFields) -> Iterator[tuple[str, str]]:
    """Keys that have no effect in this combination, with the reason."""
    if config.rollout is not None and config.rollout.environment in (None, *ENVIRONMENT_KWARGS):
        yield "rollout.environment_seconds", "is only read with an environment that a plug-in registers"
    if config.validation is not None and (config.eval_steps == 0 or not config.validation_sources):
        for key in ("at_start", "at_end"):
            yield f"validation.{key}", "is only read with validation files and eval_steps above 0"
    if config.checkpoint_config.best_metric is None or config.max_ckpt_to_keep == 0:
        yield "checkpoint_config.keep_best", "is only read with max_ckpt_to_keep above 0 and a best_metric"
