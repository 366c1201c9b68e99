"""What the student is compared with the teacher by."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from limbeck.config.schema.base import Section

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


Tail = Literal["renormalize", "bucket", "drop", "uniform", "zero"]


FAULTS = (
    "unshifted_mask",
    "every_token",
    "base_vocabulary",
    "zero_padded_vocabulary",
    "mean_over_vocabulary",
    "mean_of_micro_batches",
)
"""What other systems do wrong and ``objective_faults`` does again; see docs/objectives.md."""


OBJECTIVE_KEYS: dict[str, tuple[str, ...]] = {
    "adaptive_kl_alpha": ("adaptive_kl",),
    "skew_lambda": ("skewed_forward_kl", "skewed_reverse_kl"),
    "js_beta": ("js_divergence",),
}
"""Which objectives read which of the keys that shape one."""

OBJECTIVE_KWARGS: dict[str, tuple[str, ...]] = {
    "adaptive_kl": ("head",),
    "js_divergence": ("smoothing",),
    "mixed_kl": ("forward",),
    "alpha_beta": ("alpha", "beta"),
    "taid": ("t_start", "t_end", "rate", "momentum"),
}
"""Per objective of the package, the kd_objective_kwargs that it reads; one that is not listed reads none."""


FEATURE_LOSSES = ("cosine", "mse", "l1", "smooth_l1")


def _known_objective(name: str) -> str:
    if name not in OBJECTIVES:
        # Only a name that does not come with the package is worth the time that importing torch takes.
        from limbeck.objectives.divergences import names

        if name not in names():
            near = difflib.get_close_matches(name, names(), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"is not one of {', '.join(names())}{hint}")
    return name


def _feature_pair(entry: list[str]) -> list[str]:
    if len(entry) not in (2, 3) or not all(entry):
        raise ValueError("is not a pair; write [student submodule, teacher submodule] or [student, teacher, loss]")
    if len(entry) == 3 and entry[2] not in FEATURE_LOSSES:
        near = difflib.get_close_matches(entry[2], FEATURE_LOSSES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"has a loss that is none of {', '.join(FEATURE_LOSSES)}{hint}")
    return entry


def _two_names(names: list[str]) -> list[str]:
    if len(names) != 2 or not all(names):
        raise ValueError("must name two output heads: [the student's, the teacher's]")
    return names


Objective = Annotated[str, AfterValidator(_known_objective)]
FeaturePair = Annotated[list[str], AfterValidator(_feature_pair)]
TwoNames = Annotated[list[str], AfterValidator(_two_names)]


class FeaturesConfig(Section):
    """Which inner states of student and teacher are compared beside their logits."""

    pairs: list[FeaturePair] = Field(
        default_factory=list,
        description="Submodules whose outputs are compared: a list of [student, teacher] (cosine) or [student, teacher, "
        f"loss], loss being one of {', '.join(FEATURE_LOSSES)}; a * in both names stands for the number of a layer.",
    )
    weight: float = Field(
        default=1.0, gt=0, description="What multiplies the mean of the pairs' losses before it joins the loss."
    )
    projection: Literal["per_pair", "shared"] = Field(
        default="per_pair",
        description="Where a pair's widths differ, a linear projection is trained: one for each such pair, or one shared "
        "by all of them.",
    )
    mask: Literal["tokens", "supervised"] = Field(
        default="tokens",
        description="Where features are compared: at every token that is not padding, or at supervised positions only.",
    )
    logit_layers: TwoNames | None = Field(
        default=None,
        description="ModelOpt's names of the output heads of student and teacher, checked against the models; unset, they "
        "are found.",
    )
