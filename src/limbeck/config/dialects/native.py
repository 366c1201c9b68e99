"""Limbeck's own dialect, and the abbreviations that every dialect may use.

The abbreviations are other spellings of a value, DeepSpeed keys in ``strategy_config``, ModelOpt's ``distillation_config``,
Spectrum's file and ``objective_preset``. They are expanded after the translation of any dialect.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from limbeck.config import deepspeed
from limbeck.config.dialects import modelopt, presets, spectrum
from limbeck.config.dialects.base import NATIVE, Source
from limbeck.config.locations import SourceLocation
from limbeck.config.schema import MegatronConfig, ModelArgs, StrategyConfig, reads_deepspeed_block, reads_megatron_keys
from limbeck.config.translation import Translation
from limbeck.errors import LimbeckError

DTYPES: dict[object, object] = {
    **dict.fromkeys(("float32", "float", "torch.float32", "torch.float"), "fp32"),
    **dict.fromkeys(("bfloat16", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("float16", "half", "torch.float16", "torch.half"), "fp16"),
}

SPELLINGS: dict[str, dict[str, dict[object, object]]] = {
    "run": {
        "track_with": {"": "none", None: "none"},
        "max_steps": {-1: None},
        "save_steps": {-1: 0},
        "eval_steps": {-1: 0},
        "resume_from_checkpoint": {None: False, "": False},
    },
    "model_args": {"dtype": DTYPES, "attn_implementation": {"fa2": "flash_attention_2", None: "auto"}},
    "strategy_config": {
        "param_dtype": DTYPES,
        "reduce_dtype": {**DTYPES, None: "fp32"},
        "sequence_parallel": {None: False},
        **{f"{kind}_parallel_size": {None: 1} for kind in ("tensor_model", "context", "pipeline_model")},
    },
}
"""Other spellings of a value, by kind of section and key."""

RENAMED = {"steps_per_turn": "offload_interval"}
"""Former names of keys."""

DEFINITIONS = ("deepspeed_zero", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_cpuoffload")
"""Top-level blocks of examples/config. They exist so that ``${deepspeed_zero3}`` can refer to them."""


class LimbeckDialect:
    """A file that already uses Limbeck's keys."""

    name = NATIVE
    system = "Limbeck"

    def recognises(self, source: Source) -> bool:
        """False: this dialect is used when no other recognises the source."""
        return False

    def translate(self, source: Source, locations: dict[str, SourceLocation]) -> Translation:
        if not isinstance(source, Mapping):
            raise LimbeckError("the dialect limbeck reads YAML files, not arguments; use --dialect with another name.")
        return Translation(copy.deepcopy(dict(source)))


DIALECT = LimbeckDialect()


def expand(translation: Translation, locations: dict[str, SourceLocation]) -> None:
    """Expand all abbreviations in place. ``locations`` gets the keys of a ModelOpt file."""
    normalise(translation)
    modelopt.translate(translation, locations)
    spectrum.read(translation, locations)
    presets.apply(translation)


def normalise(translation: Translation) -> None:
    """Replace other spellings and gather DeepSpeed keys. Doing it twice changes nothing."""
    for name in DEFINITIONS:
        translation.values.pop(name, None)
    for former, key in RENAMED.items():
        translation.move(former, key)
    respell(translation, SPELLINGS)
    _gather_deepspeed(translation)
    _gather_megatron(translation)


def respell(translation: Translation, spellings: dict[str, dict[str, dict[object, object]]]) -> None:
    """Replace values by Limbeck's spelling of them; ``spellings`` is a table such as ``SPELLINGS``."""
    for kind, keys in spellings.items():
        for _, section in translation.sections(kind):
            for key, values in keys.items():
                if key in section:
                    section[key] = respelled(section[key], values)


def respelled(value: Any, spellings: dict[object, object]) -> Any:
    """Limbeck's spelling of a value; a value without another spelling is returned unchanged."""
    if isinstance(value, (str, int, type(None))):
        for foreign, ours in spellings.items():
            if type(foreign) is type(value) and foreign == value:  # True is not 1
                return ours
    return value


def _gather_megatron(translation: Translation) -> None:
    """Move Megatron's keys of ``strategy_config`` to ``strategy_config.megatron``; 1 virtual stage is none."""
    for path, section in translation.sections("strategy_args"):
        given = section.get("strategy_config")
        if not reads_megatron_keys(section.get("strategy_name")) or not isinstance(given, dict):
            continue
        config = f"{path}strategy_config"
        for key in given.keys() & MegatronConfig.model_fields.keys():
            value = given.pop(key)
            if key == "virtual_pipeline_model_parallel_size" and value == 1:
                value = None
            if value is not None:  # ROLL's spelling of the default
                translation.set(f"{config}.megatron.{key}", value, f"{config}.{key}")


def dtype_of(translation: Translation, role: str) -> object:
    """The ``model_args.dtype`` of a role."""
    return (translation.section(f"{role}.model_args") or {}).get("dtype", ModelArgs.model_fields["dtype"].default)


def _gather_deepspeed(translation: Translation) -> None:
    """Move DeepSpeed keys of ``strategy_config`` to ``strategy_config.deepspeed``; use FSDP2 where ZeRO shards nothing."""
    for path, section in translation.sections("strategy_args"):
        name = section.get("strategy_name")
        given = section.get("strategy_config") or {}
        if not reads_deepspeed_block(name) or not isinstance(given, dict):
            continue
        config, beside = f"{path}strategy_config", given.get("deepspeed") or {}
        if not isinstance(beside, dict):
            continue
        ours = {key: value for key, value in given.items() if key in StrategyConfig.model_fields and key != "deepspeed"}
        foreign = {key: value for key, value in given.items() if key not in StrategyConfig.model_fields}
        dtype = dtype_of(translation, path.partition(".")[0])
        translation.contradictions.extend(deepspeed.contradictions(foreign, config, dtype))
        translation.contradictions.extend(deepspeed.contradictions(beside, f"{config}.deepspeed", dtype))
        block = {**foreign, **beside}
        section["strategy_config"] = ours
        stage, trained = deepspeed.stage_of(block), str(name).endswith("_train")
        if stage == 3 or (stage > 0 and trained):
            passed = deepspeed.passed_on(block)
            if foreign:
                translation.put(f"{config}.deepspeed", passed, config)
            else:
                ours["deepspeed"] = passed
            continue
        # A model that ZeRO does not shard is a whole copy on every rank, which does not need DeepSpeed.
        if trained:
            section["strategy_name"] = "fsdp2_train"
            translation.put(f"{config}.replicate", True, config)
        else:
            section["strategy_name"] = "hf_infer"
        translation.notices.append(
            f"{path}strategy_name = {name} with ZeRO stage {stage} keeps a whole copy on every rank; it runs as "
            f"{section['strategy_name']}, which computes the same."
        )
