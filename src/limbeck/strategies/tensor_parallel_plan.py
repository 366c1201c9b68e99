"""Plans of tensor parallelism: which matrices of a model are sliced over the ranks, and how.

A plan maps patterns of module names to styles. It comes with the model, or is ``strategy_config.tensor_parallel_plan``: a
mapping of patterns to names of styles, or the dotted path of a mapping in a module, whose values may be styles of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from limbeck.errors import LimbeckError

STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_gather": lambda: ColwiseParallel(input_layouts=Shard(-1), output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
}
"""Styles of matrices."""

PARTIAL = "replicated_with_grad_allreduce"
"""The style of a module that is whole on every rank, each of which computes its own heads with it."""

_VOCABULARY = ("embedding_rowwise", "colwise_gather_output")
"""Styles of embeddings and heads, which are sliced in any case."""

_PLANS = {
    # Transformers' own plan slices experts only. Mamba layers stay whole: every rank computes all of their heads.
    "nemotron_h": {
        **{f"layers.*.mixer.{name}_proj": "colwise" for name in ("q", "k", "v", "up")},
        **{f"layers.*.mixer.{name}_proj": "rowwise" for name in ("o", "down")},
    },
}
"""``model_type`` to a plan beside the model's own."""

GivenPlan = Mapping[str, Any] | str
"""The value of ``tensor_parallel_plan``."""

Plan = dict[str, tuple[str, nn.Module]]
"""Style and module of every path in the body of a model that its plan names, without embeddings."""


def plan_of(trunk: Any, given: GivenPlan | None = None) -> Plan:
    """The plan of the body ``trunk`` of a model.

    Args:
        given: takes the place of the model's own plan. Its patterns may begin with the name of the body (``model.``).
            Embeddings and output head are sliced over the vocabulary, whatever it says about them. Norms between slices keep
            the style that the model's own plan gives them.

    Raises:
        LimbeckError: if ``given`` cannot be imported or has an unknown style.
    """
    config = trunk.config.get_text_config()
    own = {**(getattr(config, "base_model_tp_plan", None) or {}), **_PLANS.get(config.model_type, {})}
    plan = {
        path: (style, module)
        for path, (style, module) in _find(trunk, own).items()
        if not (isinstance(module, nn.Embedding) and style in _VOCABULARY)
    }
    if given is None:
        return plan
    norms = {path: entry for path, entry in plan.items() if entry[0] == PARTIAL}
    plan = {
        path: (_style_name(path, style), module)
        for path, (style, module) in _find(trunk, _patterns(trunk, given)).items()
        if not isinstance(module, nn.Embedding)
    }
    begun = _parents_of_slices(plan)
    return plan | {path: entry for path, entry in norms.items() if _parent(path) in begun and path not in plan}


def check_given_plan(trunk: Any, given: GivenPlan) -> None:
    """Raise LimbeckError if a pattern of ``given`` matches nothing in the whole body ``trunk``, two match the same module, or
    gradients would be wrong.
    """
    matched: dict[str, str] = {}  # path to pattern
    for pattern in _patterns(trunk, given):
        paths = [path for path, _ in trunk.named_modules() if fnmatchcase(path, pattern)]
        for path in paths:
            if matched.setdefault(path, pattern) != pattern:
                raise LimbeckError(
                    f"the patterns {matched[path]} and {pattern} both match {path}; let one of them match."
                )
        if not paths:
            linear = next((path for path, module in trunk.named_modules() if isinstance(module, nn.Linear)), "layers.0")
            raise LimbeckError(
                f"the pattern {pattern} matches no module of {type(trunk).__name__}, whose matrices have names like {linear}; "
                "correct it."
            )
    plan = plan_of(trunk, given)
    for parent in sorted(_parents_of_slices(plan)):
        for name, module in trunk.get_submodule(parent).named_children():
            if f"{parent}.{name}" not in plan and any(True for _ in module.parameters()):
                raise LimbeckError(
                    f"it slices {parent} but not {parent}.{name}, whose gradients would be wrong on each rank; add that with a "
                    f"style of matrices, or with {PARTIAL} if each rank computes its own heads with the whole of it."
                )


def _find(trunk: Any, patterns: Mapping[str, Any]) -> dict[str, tuple[Any, nn.Module]]:
    found = {}
    for path, module in trunk.named_modules():
        style = next((style for pattern, style in patterns.items() if fnmatchcase(path, pattern)), None)
        if style is not None:
            found[path] = (style, module)
    return found


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _parents_of_slices(plan: Plan) -> set[str]:
    """The modules, such as attention, between whose matrices each rank has a slice of the features."""
    return {_parent(path) for path, (style, _) in plan.items() if style == "colwise"}


def _patterns(trunk: Any, given: GivenPlan) -> dict[str, Any]:
    """The patterns of ``given`` as they match in ``trunk``, without that of the output head, which is not in it."""
    prefix = f"{trunk.base_model_prefix}."
    return {pattern.removeprefix(prefix): style for pattern, style in _load(given).items() if pattern != "lm_head"}


def _load(given: GivenPlan) -> Mapping[str, Any]:
    """The mapping itself, or that at a dotted path, where a function may return it."""
    if not isinstance(given, str):
        return given
    module, _, name = given.rpartition(".")
    if not module:
        raise LimbeckError(
            f"{given} is neither a mapping of module names to styles nor the path of one, such as my_plans.plan."
        )
    try:
        found = getattr(import_module(module), name)
        found = found() if callable(found) else found
    except Exception as error:
        raise LimbeckError(
            f"{given} cannot be imported ({type(error).__name__}: {error}); it must be the path of a mapping in a Python "
            "module that PYTHONPATH contains."
        ) from error
    if not isinstance(found, Mapping):
        raise LimbeckError(
            f"{given} is a {type(found).__name__}; it must be a mapping of module names to styles, or a function that returns "
            "one."
        )
    return found


def _style_name(path: str, style: Any) -> str:
    if isinstance(style, ParallelStyle):
        alike = [name for name, make in STYLES.items() if _layouts(make()) == _layouts(style)]
        if alike:
            return alike[0]
        style = f"{type(style).__name__} with these layouts"
    if style != PARTIAL and style not in STYLES:
        raise LimbeckError(
            f"{style} is not a style of {path}; use one of {', '.join((*STYLES, PARTIAL))}, and sequence_parallel: true to "
            "divide the time between slices."
        )
    return str(style)


def _layouts(style: Any) -> tuple[Any, ...]:
    return type(style), getattr(style, "input_layouts", None), getattr(style, "output_layouts", None)
