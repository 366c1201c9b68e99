"""Divergences, and the comparison of intermediate features."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from limbeck.config.schema.base import Section
from limbeck.registry import DIVERGENCES

OBJECTIVES = (
    "forward_kl",
    "reverse_kl",
    "adaptive_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "js_divergence",
    "mixed_kl",
    "symmetric_kl",
    "tvd",
    "alpha_beta",
    "taid",
    "cross_entropy",
)

SAMPLED_OBJECTIVES = ("k2", "k3", "policy_gradient")
"""Objectives on the one token that the student has sampled at each position."""


Tail = Literal["renormalize", "bucket", "drop", "uniform", "zero"]


FAULTS = (
    "unshifted_mask",
    "every_token",
    "base_vocabulary",
    "zero_padded_vocabulary",
    "mean_over_vocabulary",
    "mean_of_micro_batches",
    "trained_padding",
)
"""Quirks of other systems that ``objective_faults`` reproduces; see docs/objectives.md."""


OBJECTIVE_KEYS: dict[str, tuple[str, ...]] = {
    "adaptive_kl_alpha": ("adaptive_kl",),
    "skew_lambda": ("skewed_forward_kl", "skewed_reverse_kl"),
    "js_beta": ("js_divergence",),
}
"""Top-level keys that only some objectives read."""

OBJECTIVE_KWARGS: dict[str, tuple[str, ...]] = {
    "adaptive_kl": ("head",),
    "js_divergence": ("smoothing",),
    "mixed_kl": ("forward",),
    "alpha_beta": ("alpha", "beta"),
    "taid": ("t_start", "t_end", "rate", "momentum"),
}
"""The kd_objective_kwargs that each built-in objective reads; one that is not listed reads none."""


FEATURE_LOSSES = ("cosine", "mse", "l1", "smooth_l1")


def _known_objective(name: str) -> str:
    if name == "k1":
        raise ValueError(
            "has an expected gradient of 0 as a loss; use k2, whose gradient is that of the reverse KL, or "
            "policy_gradient"
        )
    if name not in (*OBJECTIVES, *SAMPLED_OBJECTIVES):
        names = [*DIVERGENCES.names(), *SAMPLED_OBJECTIVES]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"is not one of {', '.join(names)}{hint}")
    return name


def _feature_pair(entry: list[str]) -> list[str]:
    if len(entry) not in (2, 3) or not all(entry):
        raise ValueError("is not a pair; write [student submodule, teacher submodule] or [student, teacher, loss]")
    if len(entry) == 3 and entry[2] not in FEATURE_LOSSES:
        near = difflib.get_close_matches(entry[2], FEATURE_LOSSES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"has an unknown loss; use one of {', '.join(FEATURE_LOSSES)}{hint}")
    return entry


def _two_names(names: list[str]) -> list[str]:
    if len(names) != 2 or not all(names):
        raise ValueError("must name two output heads: [student's, teacher's]")
    return names


Objective = Annotated[str, AfterValidator(_known_objective)]
FeaturePair = Annotated[list[str], AfterValidator(_feature_pair)]
TwoNames = Annotated[list[str], AfterValidator(_two_names)]


class FeaturesConfig(Section):
    """Intermediate features of student and teacher that enter the loss."""

    pairs: list[FeaturePair] = Field(
        default_factory=list,
        description="Submodules whose outputs are compared: a list of [student, teacher] (cosine loss) or [student, teacher, "
        f"loss] with one of {', '.join(FEATURE_LOSSES)}. A * in both names stands for every layer number.",
    )
    weight: float = Field(default=1.0, gt=0, description="Factor of the mean loss of the pairs.")
    projection: Literal["per_pair", "shared"] = Field(
        default="per_pair",
        description="Pairs of different widths get a trained linear projection: one for each pair, or one shared by all.",
    )
    mask: Literal["tokens", "supervised"] = Field(
        default="tokens",
        description="Positions at which features are compared: all tokens except padding, or only supervised tokens.",
    )
    adapt_to_stages: list[Literal["loss_balance", "projection"]] = Field(
        default_factory=list,
        description="Which of loss_balance: modelopt and projection: shared become weighted and per_pair, with a notice, where "
        "the pairs lie on pipeline stages for which they are not built. Others are an error there. ModelOpt's configuration "
        "sets this to those of the two that are not set.",
    )
    logit_layers: TwoNames | None = Field(
        default=None,
        description="Names of the output heads of student and teacher in ModelOpt's configuration, checked against the "
        "models. If unset, they are detected.",
    )
