"""The ModelOpt dialect: Megatron-LM's distillation YAML (its ``--export-kd-cfg``), inline or as a file, in our words.

    distillation_config: distill.yaml        # or the same keys as a section

Only the keys are known here, not what carries them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from limbeck.config.mistakes import shown
from limbeck.config.places import Place, read_places
from limbeck.config.roll import Translation
from limbeck.errors import LimbeckError

KEY = "distillation_config"

MOVED = {
    "logit_layers": "features.logit_layers",
    "intermediate_layer_pairs": "features.pairs",
    "logit_kl_temperature": "kd_temperature",
    "logit_kl_topk": "logits_topk",
}
"""Keys that have a counterpart."""

AS_THERE = {"features.mask": "supervised", "features.projection": "shared", "loss_balance": "modelopt"}
"""What ModelOpt does without being asked, unless a key of ours says otherwise."""

SPELLINGS = {"hidden_cosine": "cosine"}
"""Losses of intermediate pairs that had another name."""

ONLY_UNSET = {
    "criterion": "is set by a program, not by a file; take it out",
    "loss_balancer": "is set by a program, not by a file; take it out",
}
"""Keys that can only be null in a file, each with a sentence's end."""

READ = (*MOVED, "skip_lm_loss", "kd_loss_scale", *ONLY_UNSET)


def translate(result: Translation, places: dict[str, Place]) -> None:
    """Replace the ModelOpt section of a configuration by our keys; ``places`` learns where the keys of its file stand.

    Raises LimbeckError if it names a file that cannot be read.
    """
    given = result.values.pop(KEY, None)
    if given is None:
        return
    if isinstance(given, str):
        given = _read(Path(given), places)
    if not isinstance(given, Mapping):
        result.refuse(KEY, f"= {shown(given)} is neither a file nor a section of ModelOpt's keys")
        return
    keys = dict(given)
    for key in [key for key in keys if key not in READ]:
        keys.pop(key)
        result.refuse(
            f"{KEY}.{key}", f"is not a key of ModelOpt's distillation configuration, which has {', '.join(READ)}"
        )
    for key, sentence in ONLY_UNSET.items():
        if keys.pop(key, None) is not None:
            result.refuse(f"{KEY}.{key}", sentence)
    if keys.get("logit_kl_topk", 0) is None:
        keys["logit_kl_topk"] = 0
    pairs = keys.get("intermediate_layer_pairs")
    if isinstance(pairs, list):
        keys["intermediate_layer_pairs"] = [_pair(entry) for entry in pairs]
    _translate_weight(result, keys)
    for foreign, ours in MOVED.items():
        if keys.get(foreign) is not None:
            _set(result, ours, keys[foreign], foreign)
    for ours, value in AS_THERE.items():
        read = pairs or not ours.startswith("features.")
        if read and _get(result.values, ours) is None:
            result.put(ours, value, KEY)


def _translate_weight(result: Translation, keys: Mapping[str, Any]) -> None:
    """total = LM + s · KD is, up to its size, (1 − w) LM + w KD with w = s / (1 + s); without LM it is w = 1."""
    skip, scale = keys.get("skip_lm_loss"), keys.get("kd_loss_scale")
    if skip is not None and not isinstance(skip, bool):
        result.refuse(f"{KEY}.skip_lm_loss", f"= {shown(skip)} must be true or false")
        return
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < 1e9):
        result.refuse(f"{KEY}.kd_loss_scale", f"= {shown(scale)} must be a number above 0 (and below 1e9)")
        return
    if skip is False:
        s = 1.0 if scale is None else float(scale)
        _set(result, "distill_loss_weight", s / (1 + s), "skip_lm_loss" if scale is None else "kd_loss_scale")
        return
    if skip is True:
        _set(result, "distill_loss_weight", 1.0, "skip_lm_loss")
    elif _get(result.values, "distill_loss_weight") is None:
        result.put("distill_loss_weight", 1.0, KEY)
    if scale is not None:
        result.notices.append(f"{KEY}.kd_loss_scale has no effect: it is read with skip_lm_loss: false only.")


def _pair(entry: Any) -> Any:
    if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], str):
        return [*entry[:2], SPELLINGS.get(entry[2], entry[2])]
    return entry


def _read(file: Path, places: dict[str, Place]) -> Any:
    if not file.is_file():
        raise LimbeckError(f"{KEY} = {file} is not a file; name ModelOpt's YAML, or write its keys below {KEY}.")
    places.update(read_places(file, str(file), KEY))
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise LimbeckError(f"{file}: this is not YAML: {' '.join(str(error).split())}.") from error


def _get(values: Mapping[str, Any], path: str) -> Any:
    here: Any = values
    for part in path.split("."):
        here = here.get(part) if isinstance(here, Mapping) else None
    return here


def _set(result: Translation, ours: str, value: Any, foreign: str) -> None:
    present = _get(result.values, ours)
    if present is not None and present != value:
        result.refuse(f"{KEY}.{foreign}", f"= {shown(value)} contradicts {ours} = {shown(present)}; keep one of them")
        return
    result.put(ours, value, f"{KEY}.{foreign}")
