"""Every key that a run understands, with its type, its default, its meaning and the combinations that contradict.

The names are those of ROLL's distillation pipeline wherever it has one; spellings that only ROLL knows are translated
before they reach this package (`roll.py`). Nothing here reads files or knows how any key is carried out.
"""

from limbeck.config.schema.base import Contradiction, ContradictionError, Section, walk_keys
from limbeck.config.schema.data import DataArgs, SourceArgs
from limbeck.config.schema.distill import DistillConfig
from limbeck.config.schema.models import ModelArgs, StrategyArgs, StrategyConfig, StudentModelArgs
from limbeck.config.schema.objective import FAULTS, FEATURE_LOSSES, OBJECTIVES
from limbeck.config.schema.rules import unread_keys
from limbeck.config.schema.training import TRACKER_KWARGS, TrainingArgs
from limbeck.config.schema.workers import SERVICE_NAME, StudentConfig, TeacherConfig, WorkerConfig

__all__ = [
    "FAULTS",
    "FEATURE_LOSSES",
    "OBJECTIVES",
    "SERVICE_NAME",
    "TRACKER_KWARGS",
    "Contradiction",
    "ContradictionError",
    "DataArgs",
    "DistillConfig",
    "ModelArgs",
    "Section",
    "SourceArgs",
    "StrategyArgs",
    "StrategyConfig",
    "StudentConfig",
    "StudentModelArgs",
    "TeacherConfig",
    "TrainingArgs",
    "WorkerConfig",
    "unread_keys",
    "walk_keys",
]
