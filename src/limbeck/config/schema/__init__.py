"""Every key of a configuration with its type, default and description, and the rules between keys.

Keys are named after those of ROLL's distillation pipeline where it has them.
"""

from limbeck.config.schema.base import Contradiction, ContradictionError, Section, walk_keys
from limbeck.config.schema.data import DataArgs, SourceArgs, ValidationConfig, ValidationDataArgs, sources_of_name
from limbeck.config.schema.distill import DistillConfig
from limbeck.config.schema.megatron import MegatronConfig
from limbeck.config.schema.models import (
    ModelArgs,
    StrategyArgs,
    StrategyConfig,
    StudentModelArgs,
    reads_deepspeed_block,
    reads_megatron_keys,
)
from limbeck.config.schema.named_datasets import NAMED_DATASETS
from limbeck.config.schema.objective import FAULTS, FEATURE_LOSSES, OBJECTIVES
from limbeck.config.schema.rules import unread_keys
from limbeck.config.schema.training import SEQUENTIAL_KWARGS, TRACKER_KWARGS, HubConfig, TrainingArgs
from limbeck.config.schema.workers import SERVICE_NAME, StudentConfig, TeacherConfig, WorkerConfig

__all__ = [
    "FAULTS",
    "FEATURE_LOSSES",
    "NAMED_DATASETS",
    "OBJECTIVES",
    "SEQUENTIAL_KWARGS",
    "SERVICE_NAME",
    "TRACKER_KWARGS",
    "Contradiction",
    "ContradictionError",
    "DataArgs",
    "DistillConfig",
    "HubConfig",
    "MegatronConfig",
    "ModelArgs",
    "Section",
    "SourceArgs",
    "StrategyArgs",
    "StrategyConfig",
    "StudentConfig",
    "StudentModelArgs",
    "TeacherConfig",
    "TrainingArgs",
    "ValidationConfig",
    "ValidationDataArgs",
    "WorkerConfig",
    "reads_deepspeed_block",
    "reads_megatron_keys",
    "sources_of_name",
    "unread_keys",
    "walk_keys",
]
