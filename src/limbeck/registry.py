"""Every kind of extension, and the built-in implementations of each.

A registry maps a name from the configuration to an implementation. Built-in ones are given as ``module:attribute`` and
imported when they are first used, so only the run that needs a heavy library pays for it. A file that ``plugins`` names
adds its own with ``REGISTRY.register("name")``. Names are compared here and nowhere else.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from limbeck.errors import LimbeckError

T = TypeVar("T")


class Registry(Generic[T]):
    """Implementations of one kind of extension, by name.

    Args:
        kind: what an entry is called in error messages, such as ``"strategy"``.
        builtin: name to ``"module:attribute"``; imported by ``get``.
        traits: name to facts about a built-in implementation that are needed before it is imported.
        members: name to the methods and attributes that an object registered under it must have. By default an
            implementation is a function.
    """

    def __init__(
        self,
        kind: str,
        builtin: Mapping[str, str],
        traits: Mapping[str, frozenset[str]] | None = None,
        members: Callable[[str], Iterable[str]] | None = None,
    ) -> None:
        self.kind = kind
        self._members = members
        self._builtin = dict(builtin)
        self._registered: dict[str, T] = {}
        self._traits = dict(traits or {})

    def register(self, name: str, *traits: str) -> Callable[[T], T]:
        """Decorator that registers an implementation under ``name``, with its ``traits``.

        Raises:
            LimbeckError: if another implementation has the name, or this one is incomplete.
        """

        def decorate(implementation: T) -> T:
            self._check(name, implementation)
            known = self._registered.get(name)
            if name in self._builtin or (known is not None and _origin(known) != _origin(implementation)):
                raise LimbeckError(f"a {self.kind} named {name} exists already; register yours under another name.")
            self._registered[name] = implementation
            self._traits[name] = frozenset(traits)
            return implementation

        return decorate

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted({*self._builtin, *self._registered})

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._registered

    def has_trait(self, name: object, trait: str) -> bool:
        """Whether the implementation ``name`` has ``trait``; False for an unknown name."""
        return isinstance(name, str) and trait in self._traits.get(name, ())

    def explain_unknown(self, name: str) -> str:
        """The end of a sentence about an unknown name: "is not a known strategy; did you mean …?"."""
        close = difflib.get_close_matches(name, self.names(), n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(self.names())}"
        return f"is not a known {self.kind}; {hint}"

    def get(self, name: str) -> T:
        """The implementation registered under ``name``.

        Raises:
            LimbeckError: if there is none.
        """
        if name in self._registered:
            return self._registered[name]
        if name not in self._builtin:
            raise LimbeckError(f"{name} {self.explain_unknown(name)}")
        module, _, attribute = self._builtin[name].partition(":")
        implementation: T = getattr(import_module(module), attribute)
        return implementation

    def _check(self, name: str, implementation: T) -> None:
        if self._members is None:
            if not callable(implementation):
                raise LimbeckError(
                    f"the {self.kind} {name} is a {type(implementation).__name__}; register a function or a class."
                )
        elif isinstance(implementation, type):
            raise LimbeckError(
                f"the {self.kind} {name} is the class {implementation.__name__}; register an object of it."
            )
        else:
            check_members(f"the {self.kind} {name}", implementation, self._members(name))


def check_members(what: str, implementation: object, members: Iterable[str]) -> None:
    """Raise LimbeckError unless the plug-in object ``implementation`` has all ``members``.

    Args:
        what: the object in the error message, such as ``"the strategy sgd_train"``.
    """
    kind = type(implementation)
    # The class first, so that no property is computed.
    missing = [name for name in members if not hasattr(kind, name) and not hasattr(implementation, name)]
    if missing:
        them = "it" if len(missing) == 1 else "them"
        raise LimbeckError(f"{what} lacks {', '.join(missing)}; define {them} in the class {kind.__name__}.")


def _origin(implementation: Any) -> tuple[str, str]:
    """Module and name: the same file run twice registers the same implementation."""
    kind = implementation if hasattr(implementation, "__qualname__") else type(implementation)
    return kind.__module__, kind.__qualname__


_DIVERGENCES = (
    *("adaptive_kl", "alpha_beta", "cross_entropy", "forward_kl", "js_divergence", "mixed_kl", "reverse_kl"),
    *("skewed_forward_kl", "skewed_reverse_kl", "symmetric_kl", "taid", "tvd"),
)

DIVERGENCES: Registry[Any] = Registry(
    "divergence", {name: f"limbeck.objectives.divergences:{name}" for name in _DIVERGENCES}
)
"""``kd_objective`` to a function ``(**parameters) -> limbeck.objectives.divergences.DivergenceFn``."""

OFFLOADS = "offloads"
"""Trait of a strategy whose engines and frozen models move to host memory and back between steps."""

READS_DEEPSPEED_BLOCK = "reads_deepspeed_block"
"""Trait of a strategy that reads ``strategy_config.deepspeed``."""

READS_MEGATRON_KEYS = "reads_megatron_keys"
"""Trait of a strategy that reads ``strategy_config.megatron``."""

HAS_OWN_DEVICES = "has_own_devices"
"""Trait of a generator that runs on ``rollout.device_mapping``."""

NEEDS_NO_MODEL = "needs_no_model"
"""Trait of a teacher source that reads no checkpoint, so that ``teacher_pretrain`` may be unset."""


def _strategy_members(name: str) -> tuple[str, ...]:
    build = "build_teacher" if name.endswith("_infer") else "build_student"
    return "dims", "check", "check_model", build


STRATEGIES: Registry[Any] = Registry(
    "strategy",
    {
        "hf_infer": "limbeck.strategies.hf:STRATEGY",
        "fsdp2_train": "limbeck.strategies.fsdp2:STRATEGY",
        "fsdp2_infer": "limbeck.strategies.fsdp2:STRATEGY",
        "deepspeed_train": "limbeck.strategies.deepspeed.strategy:STRATEGY",
        "deepspeed_infer": "limbeck.strategies.deepspeed.strategy:STRATEGY",
        "megatron_train": "limbeck.strategies.megatron.strategy:STRATEGY",
        "megatron_infer": "limbeck.strategies.megatron.strategy:STRATEGY",
    },
    {
        **dict.fromkeys(("hf_infer", "fsdp2_train", "fsdp2_infer"), frozenset({OFFLOADS})),
        **dict.fromkeys(("deepspeed_train", "deepspeed_infer"), frozenset({READS_DEEPSPEED_BLOCK})),
        **dict.fromkeys(("megatron_train", "megatron_infer"), frozenset({READS_MEGATRON_KEYS})),
    },
    _strategy_members,
)
"""``strategy_name`` to ``limbeck.strategies.base.Strategy``. A name ends in ``_train`` or ``_infer``."""

TEACHERS: Registry[Any] = Registry(
    "teacher source",
    {
        "model": "limbeck.teachers.local:load_teacher",
        "ray": "limbeck.teachers.ray_workers:connect_to_workers",
        "student_initial": "limbeck.teachers.student_weights:load_initial",
        "student_average": "limbeck.teachers.student_weights:load_averaged",
    },
    dict.fromkeys(("student_initial", "student_average"), frozenset({NEEDS_NO_MODEL})),
)
"""``teacher.source`` to a function ``(limbeck.teachers.protocol.TeacherContext) ->
limbeck.teachers.protocol.Teacher``.
"""

STEP_SOURCES: Registry[Any] = Registry(
    "step source",
    {
        "dataset": "limbeck.train.step_source:DatasetSource",
        "rollout": "limbeck.train.rollout_source:RolloutSource",
    },
)
"""``step_source`` to a function ``(config, world, data) -> limbeck.train.step_source.StepSource``."""

GENERATORS: Registry[Any] = Registry(
    "generator",
    {
        "hf": "limbeck.rollout.hf:make_generator",
        "vllm": "limbeck.rollout.vllm_engines:make_generator",
    },
    {"vllm": frozenset({HAS_OWN_DEVICES})},
)
"""Name to a function ``(config, world) -> limbeck.rollout.generator.Generator``; called by step sources."""

ENVIRONMENTS: Registry[Any] = Registry(
    "environment",
    {
        "math": "limbeck.rollout.environments:make_math",
        "exact": "limbeck.rollout.environments:make_exact",
    },
)
"""Name to a function ``(**arguments) -> limbeck.rollout.environments.Environment``; called by step sources."""

TRACKERS: Registry[Any] = Registry(
    "tracker",
    {
        "tensorboard": "limbeck.train.trackers.tensorboard:TensorBoard",
        "wandb": "limbeck.train.trackers.wandb:WandB",
        "mlflow": "limbeck.train.trackers.mlflow:MLflow",
        "swanlab": "limbeck.train.trackers.swanlab:SwanLab",
        "stdout": "limbeck.train.trackers:make_nothing",
        "none": "limbeck.train.trackers:make_nothing",
    },
)
"""``track_with`` to a function ``(log_dir, tracker_kwargs) -> limbeck.train.trackers.Tracker | None``."""

DIALECTS: Registry[Any] = Registry(
    "dialect",
    {
        "limbeck": "limbeck.config.dialects.native:DIALECT",
        "nemo_rl": "limbeck.config.dialects.nemo_rl:DIALECT",
        "roll": "limbeck.config.dialects.roll:DIALECT",
        "hyperpod": "limbeck.config.dialects.hyperpod:DIALECT",
        "distillkit": "limbeck.config.dialects.distillkit:DIALECT",
        "megatron": "limbeck.config.dialects.megatron:DIALECT",
    },
    members=lambda name: ("name", "system", "recognises", "translate"),
)
"""``--dialect`` to ``limbeck.config.dialects.base.Dialect``."""
