"""Keys of ``strategy_config.megatron`` that have no effect in a combination."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from limbeck.config.schema.run_fields import RunFields


def unread_megatron_keys(config: RunFields) -> Iterator[tuple[str, str]]:
    """Keys of recomputation that have no effect, with the reason."""
    path = "strategy_args.strategy_config.megatron.recompute"
    for key in ("granularity", "method", "num_layers", "modules"):
        yield f"teacher.{path}_{key}", "is not read by a teacher, which has no backward pass"
    granularity = config.student.strategy_args.strategy_config.megatron.recompute_granularity
    if granularity != "selective":
        yield f"student.{path}_modules", "is only read with recompute_granularity: selective"
    # If unset, full recomputation may follow from this key of all strategies.
    if granularity == "selective" or (
        granularity is None and config.student.model_args.disable_gradient_checkpointing is True
    ):
        for key in ("method", "num_layers"):
            yield f"student.{path}_{key}", "is only read with recompute_granularity: full"
