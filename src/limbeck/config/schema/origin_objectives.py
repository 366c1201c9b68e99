"""The objectives of on-policy samples: the run's, with what ``rollout.objectives`` changes for an origin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from limbeck.config.schema.origins import OriginObjective

if TYPE_CHECKING:
    from limbeck.config.schema.run_fields import RunFields

_WRITTEN_BY_THE_STUDENT = ("student", "replay")

Config = TypeVar("Config", bound="RunFields")


def for_origin(config: Config, origin: str) -> Config:
    """``config`` with the keys of the objective as they are for the samples of ``origin``."""
    changes: dict[str, Any] = {}
    for section in _sections(config, origin):
        given = {key: value for key, value in section if value is not None and key != "weight"}
        current = changes.get("kd_objective", config.kd_objective)
        if given.get("kd_objective", current) != current:
            changes["kd_objective_kwargs"] = {}
        changes |= given
    if origin in _WRITTEN_BY_THE_STUDENT:
        changes["distill_loss_weight"] = 1.0
    return config.model_copy(update=changes)


def weight_of_origin(config: RunFields, origin: str) -> float:
    """The factor of the loss of the samples of ``origin``."""
    given = [section.weight for section in _sections(config, origin) if section.weight is not None]
    return given[-1] if given else 1.0


def objective_key(config: RunFields) -> tuple[Any, ...]:
    """What the objective of ``config`` depends on, of the keys that can differ between origins; it can be compared."""
    keys = (key for key in OriginObjective.model_fields if key != "weight")
    return tuple(
        tuple(sorted(value.items())) if isinstance(value := getattr(config, key), dict) else value for key in keys
    )


def objectives_by_origin(config: Config) -> dict[str, Config]:
    """``config`` for each origin that the run has, if they do not all have the objective of the run; otherwise empty."""
    if config.rollout is None or config.effective_step_source != "rollout":
        return {}
    found = {origin: for_origin(config, origin) for origin in config.rollout.origins}
    return found if any(objective_key(one) != objective_key(config) for one in found.values()) else {}


def distils(config: RunFields) -> bool:
    """Whether the objective of any sample has a distillation term."""
    return any(one.distill_loss_weight > 0 for one in objectives_by_origin(config).values() or (config,))


def _sections(config: RunFields, origin: str) -> list[OriginObjective]:
    """The sections that set the objective of ``origin``; later ones replace earlier ones."""
    assert config.rollout is not None
    names = ("student", "replay") if origin == "replay" else (origin,)
    return [getattr(config.rollout.objectives, name) for name in names]
