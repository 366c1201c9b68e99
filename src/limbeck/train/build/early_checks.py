"""What a run checks before it loads anything."""

from __future__ import annotations

from collections.abc import Callable

from limbeck.config import DistillConfig
from limbeck.strategies.world import World
from limbeck.train.build.sources import refuse_missing_files
from limbeck.train.metrics import check_best_metric
from limbeck.train.push import check_token
from limbeck.train.saving import find_checkpoint
from limbeck.train.trackers import check_trackers


def early_checks(config: DistillConfig, world: World) -> list[Callable[[], object]]:
    """Functions of which each raises LimbeckError if the run would fail. None uses the network. Collective."""
    of_main: list[Callable[[], object]] = [
        lambda: check_token(config.checkpoint_config.save_to_hub),
        lambda: check_trackers(config.trackers),
    ]
    return [
        lambda: check_best_metric(config, world),
        lambda: refuse_missing_files(config),
        *(of_main if world.is_main else []),
        lambda: find_checkpoint(config),
    ]
