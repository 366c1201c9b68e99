"""Whole copies: every rank, or every model-parallel group of ranks, runs the Hugging Face model as it is.

Registered as ``hf_infer``. For teachers only: a student whose copies average gradients is ``fsdp2_train`` with ``replicate``.
"""

from __future__ import annotations

from limbeck.errors import LimbeckError
from limbeck.strategies.base import Engine, StudentSpec
from limbeck.strategies.fsdp2 import Fsdp2Strategy
from limbeck.strategies.world import World


class HfStrategy(Fsdp2Strategy):
    """As ``Fsdp2Strategy``, without sharding."""

    shards = False

    def build_student(self, spec: StudentSpec, world: World) -> Engine:
        raise LimbeckError(
            "student.strategy_args.strategy_name = hf_infer does not train; use fsdp2_train, with strategy_config.replicate: "
            "true for whole copies."
        )


STRATEGY = HfStrategy()
