"""Distillation of large language models.

Names are imported on first use, so that ``import limbeck`` and ``limbeck --help`` are fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck.api import distill
    from limbeck.config import DistillConfig, load_config
    from limbeck.errors import LimbeckError
    from limbeck.objectives import OutputHead, divergence, fused_linear_distillation
    from limbeck.train.loop import DistillPipeline
    from limbeck.train.trackers import register_tracker
    from limbeck.trainer import DistillTrainer

_HOMES = {
    "DistillConfig": "limbeck.config",
    "DistillPipeline": "limbeck.train.loop",
    "DistillTrainer": "limbeck.trainer",
    "LimbeckError": "limbeck.errors",
    "OutputHead": "limbeck.objectives",
    "distill": "limbeck.api",
    "divergence": "limbeck.objectives",
    "fused_linear_distillation": "limbeck.objectives",
    "load_config": "limbeck.config",
    "register_tracker": "limbeck.train.trackers",
}

__all__ = [
    "DistillConfig",
    "DistillPipeline",
    "DistillTrainer",
    "LimbeckError",
    "OutputHead",
    "distill",
    "divergence",
    "fused_linear_distillation",
    "load_config",
    "register_tracker",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
