"""``objective_preset``: the objective of another system as Limbeck's keys, to reproduce its loss values.

A key that the configuration sets takes precedence over the preset.
"""

from __future__ import annotations

from typing import Any

from limbeck.config.translation import Translation

KEY = "objective_preset"

PRESETS: dict[str, dict[str, Any]] = {
    # both sides renormalised over the teacher's 64 most likely tokens; the teacher's temperature on top of the student's; no τ²
    "roll": {
        "kd_objective": "forward_kl",
        "logits_topk": 64,
        "logits_topk_tail": "renormalize",
        "temperature_convention": "roll",
        "temperature_squared": False,
    },
    # divergence alone, half forward and half reverse, over the teacher's 64 most likely tokens
    "nemo_rl": {
        "kd_objective": "mixed_kl",
        "kd_objective_kwargs": {"forward": 0.5},
        "logits_topk": 64,
        "logits_topk_tail": "renormalize",
        "distill_loss_weight": 1.0,
        "temperature_squared": False,
    },
    # α KL τ² + (1 − α) CE over whole vocabularies, α = ½, τ = 2
    "hyperpod": {
        "kd_objective": "forward_kl",
        "logits_topk": 0,
        "kd_temperature": 2.0,
        "temperature_squared": True,
        "distill_loss_weight": 0.5,
    },
    # divergence alone, whole vocabularies, no τ² (as on Megatron)
    "modelopt": {
        "kd_objective": "forward_kl",
        "logits_topk": 0,
        "temperature_squared": False,
        "distill_loss_weight": 1.0,
    },
    # GKDTrainer: generalised Jensen-Shannon alone; its temperature is that of sampling and does not enter the loss
    "trl": {
        "kd_objective": "js_divergence",
        "js_beta": 0.5,
        "logits_topk": 0,
        "kd_temperature": 1.0,
        "temperature_squared": False,
        "distill_loss_weight": 1.0,
    },
}


_DIVERGENCE_KEYS = ("kd_objective_kwargs", "js_beta")  # other divergences do not read them


def apply(translation: Translation) -> None:
    """Fill in the keys of the preset that the configuration names. The schema refuses an unknown name."""
    name = translation.values.get(KEY)
    preset = PRESETS.get(name, {}) if isinstance(name, str) else {}
    other_divergence = translation.values.get("kd_objective") not in (None, preset.get("kd_objective"))
    for key, value in preset.items():
        if translation.values.get(key) is None and not (other_divergence and key in _DIVERGENCE_KEYS):
            translation.put(key, value, KEY)
