"""``distillation_config``: ModelOpt's distillation YAML (Megatron-LM's ``--export-kd-cfg``) as a file or a section.

distillation_config: distill.yaml        # or the same keys as a section
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from limbeck.config.locations import SourceLocation, read_locations
from limbeck.config.translation import Translation
from limbeck.config.validation_errors import format_value
from limbeck.config.yaml_values import load_yaml
from limbeck.errors import LimbeckError

KEY = "distillation_config"

MOVED = {
    "logit_layers": "features.logit_layers",
    "intermediate_layer_pairs": "features.pairs",
    "logit_kl_temperature": "kd_temperature",
    "logit_kl_topk": "logits_topk",
}
"""ModelOpt's keys and Limbeck's keys with the same meaning."""

DEFAULTS = {"features.mask": "supervised", "features.projection": "shared", "loss_balance": "modelopt"}
"""ModelOpt's behaviour, for keys of Limbeck that the configuration does not set."""

SPELLINGS = {"hidden_cosine": "cosine"}
"""Former names of the losses of intermediate pairs."""

ONLY_UNSET = {
    "criterion": "can only be set in Python; remove it",
    "loss_balancer": "can only be set in Python; remove it",
}
"""Keys that must be null in a file, with the end of the error message."""

KEYS = (*MOVED, "skip_lm_loss", "kd_loss_scale", *ONLY_UNSET)


def translate(translation: Translation, locations: dict[str, SourceLocation]) -> None:
    """Replace ``distillation_config`` by Limbeck's keys. ``locations`` gets the keys of its file.

    Raises:
        LimbeckError: if it names a file that cannot be read.
    """
    given = translation.values.pop(KEY, None)
    if given is None:
        return
    if isinstance(given, str):
        given = _read(Path(given), locations)
    if not isinstance(given, Mapping):
        translation.refuse(KEY, f"= {format_value(given)} is neither a file nor a section of ModelOpt's keys")
        return
    keys = dict(given)
    for key in [key for key in keys if key not in KEYS]:
        keys.pop(key)
        translation.refuse(
            f"{KEY}.{key}", f"is not a key of ModelOpt's distillation configuration, which has {', '.join(KEYS)}"
        )
    for key, sentence in ONLY_UNSET.items():
        if keys.pop(key, None) is not None:
            translation.refuse(f"{KEY}.{key}", sentence)
    if keys.get("logit_kl_topk") == 0:
        translation.refuse(
            f"{KEY}.logit_kl_topk", f"= {keys.pop('logit_kl_topk')} must be above 0; null is the whole vocabulary"
        )
    elif "logit_kl_topk" in keys and keys["logit_kl_topk"] is None:
        keys["logit_kl_topk"] = 0  # which is the whole vocabulary in logits_topk
    pairs = keys.get("intermediate_layer_pairs")
    if isinstance(pairs, list):
        keys["intermediate_layer_pairs"] = [_pair(entry) for entry in pairs]
    _translate_weight(translation, keys)
    for foreign, ours in MOVED.items():
        if keys.get(foreign) is not None:
            _set(translation, ours, keys[foreign], foreign)
    adaptable = [ours for ours in ("loss_balance", "features.projection") if translation.get(ours) is None]
    for ours, value in DEFAULTS.items():
        if pairs or not ours.startswith("features."):
            translation.default(ours, value, KEY)
    if pairs and adaptable:
        translation.default("features.adapt_to_stages", [ours.rpartition(".")[2] for ours in adaptable], KEY)
    can_be_weighted = translation.get("loss_balance") == "weighted" or "loss_balance" in adaptable
    if pairs and can_be_weighted and keys.get("skip_lm_loss") is False:  # s multiplies the divergence and the pairs
        translation.default("features.weight", translation.get("distill_loss_weight"), f"{KEY}.kd_loss_scale")


def _translate_weight(translation: Translation, keys: Mapping[str, Any]) -> None:
    """Set the loss weight w: LM + s · KD is proportional to (1 − w) LM + w KD with w = s / (1 + s); without LM, w = 1."""
    skip, scale = keys.get("skip_lm_loss"), keys.get("kd_loss_scale")
    if skip is not None and not isinstance(skip, bool):
        translation.refuse(f"{KEY}.skip_lm_loss", f"= {format_value(skip)} must be true or false")
        return
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < 1e9):
        translation.refuse(f"{KEY}.kd_loss_scale", f"= {format_value(scale)} must be a number above 0 (and below 1e9)")
        return
    if skip is False:
        s = 1.0 if scale is None else float(scale)
        key = "skip_lm_loss" if scale is None else "kd_loss_scale"
        _set(translation, "distill_loss_weight", s / (1 + s), key, written=skip if scale is None else scale)
        return
    if skip is True:
        _set(translation, "distill_loss_weight", 1.0, "skip_lm_loss", written=skip)
    elif translation.get("distill_loss_weight") is None:
        translation.put("distill_loss_weight", 1.0, KEY)
    if scale is not None:
        translation.notices.append(f"{KEY}.kd_loss_scale has no effect: it is only read with skip_lm_loss: false.")


def _pair(entry: Any) -> Any:
    if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], str):
        return [*entry[:2], SPELLINGS.get(entry[2], entry[2])]
    return entry


def _read(file: Path, locations: dict[str, SourceLocation]) -> Any:
    if not file.is_file():
        raise LimbeckError(f"{KEY} = {file} is not a file; set it to a ModelOpt YAML file, or write its keys below it.")
    locations.update(read_locations(file, str(file), KEY))
    try:
        return load_yaml(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise LimbeckError(f"{file}: this is not YAML: {' '.join(str(error).split())}.") from error


def _set(translation: Translation, ours: str, value: Any, foreign: str, written: Any = None) -> None:
    """Set ``ours`` to ``value``. ``written`` is what the file has, if the value was computed from it."""
    present = translation.get(ours)
    if present is not None and present != value:
        computed = "" if written is None else f" ({ours} = {value:.4g})"
        translation.refuse(
            f"{KEY}.{foreign}",
            f"= {format_value(value if written is None else written)}{computed} contradicts {ours} = {format_value(present)}; "
            "keep one of them",
        )
        return
    translation.put(ours, value, f"{KEY}.{foreign}")
