"""Load a model and its tokenizer by path or hub name, or make a model from a configuration alone."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from limbeck.errors import LimbeckError
from limbeck.folders import check_folder
from limbeck.models.hub import offline_if_unreachable
from limbeck.models.memory import available_memory
from limbeck.models.varlen_attention import BY_DOCUMENT

_ATTENTION = {"auto": None, "fa2": "flash_attention_2"}


def load_model(
    name_or_path: str | None,
    *,
    dtype: torch.dtype,
    attn_implementation: str = "auto",
    from_scratch: bool = False,
    config_kwargs: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    role: str = "model",
) -> Any:
    """An ``AutoModelForCausalLM`` in ``dtype`` on the CPU.

    from_scratch: only the configuration is read and the weights are drawn from ``seed``; without a path ``config_kwargs`` is
    the whole configuration and must name its ``model_type``. Otherwise ``config_kwargs`` override the checkpoint's
    configuration. Raises LimbeckError with ``role`` in the sentence when there is nothing to load, or no room for it.
    """
    _check_name(name_or_path, role)
    changes = dict(config_kwargs or {})
    attention = _ATTENTION.get(attn_implementation, attn_implementation)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        common["revision"] = revision
    try:
        if name_or_path is None:
            if not from_scratch or "model_type" not in changes:
                raise LimbeckError(
                    f"the {role} has no checkpoint: set {role}_pretrain to a folder or hub name, or for a new model "
                    f"{role}.model_args.from_scratch: true with model_config_kwargs that name a model_type."
                )
            config = AutoConfig.for_model(**changes)
        else:
            config = _changed(_from_pretrained(AutoConfig, name_or_path, **common), changes)
        if not trust_remote_code:  # a stranger's class may not know how to be made without numbers
            _refuse_too_large(config, dtype, name_or_path, role)
        if from_scratch:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
                )
        else:
            model = _from_pretrained(
                AutoModelForCausalLM,
                name_or_path,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                **common,
            )
        if attention == "flex_attention":  # whose counterpart takes what autocast leaves, with packing or without
            model.set_attn_implementation(BY_DOCUMENT[attention])
        return model
    except (SafetensorError, json.JSONDecodeError) as error:
        raise LimbeckError(
            f"the {role} {name_or_path!r} is incomplete or damaged ({_first_line(error).rstrip('.')}); copy or download it "
            "again."
        ) from error
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        hint = _hint(name_or_path, error)
        raise LimbeckError(f"cannot load the {role} {name_or_path!r}: {_first_line(error)}{hint}") from error


def model_outline(
    name_or_path: str | None,
    *,
    dtype: torch.dtype,
    config_kwargs: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    role: str = "model",
) -> Any:
    """The model that ``load_model`` would give, on the meta device: shapes without numbers, of which only the configuration
    is read. Raises LimbeckError with ``role`` in the sentence when that cannot be read."""
    _check_name(name_or_path, role)
    changes = dict(config_kwargs or {})
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        common["revision"] = revision
    try:
        if name_or_path is None:
            config = AutoConfig.for_model(**changes)
        else:
            config = _changed(_from_pretrained(AutoConfig, name_or_path, **common), changes)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        hint = _hint(name_or_path, error)
        raise LimbeckError(
            f"cannot read the configuration of the {role} {name_or_path!r}: {_first_line(error)}{hint}"
        ) from error


def model_limits(
    name_or_path: str, *, config_kwargs: Mapping[str, Any], revision: str | None = None, trust_remote_code: bool = False
) -> tuple[int | None, int | None]:
    """How many positions and how many tokens a checkpoint knows, by its configuration; None where that names no limit."""
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        common["revision"] = revision
    try:
        config = _changed(_from_pretrained(AutoConfig, name_or_path, **common), dict(config_kwargs))
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        hint = _hint(name_or_path, error)
        raise LimbeckError(f"cannot read the configuration of {name_or_path!r}: {_first_line(error)}{hint}") from error
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None), getattr(text, "vocab_size", None)


def _refuse_too_large(config: Any, dtype: torch.dtype, name: str | None, role: str) -> None:
    """Raise LimbeckError if the parameters alone exceed the memory that is left, instead of being killed on the way."""
    left = available_memory()
    if (
        left is None or getattr(config, "quantization_config", None) is not None
    ):  # whose weights are smaller than they look
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    needed = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    if needed > left:
        precision = "" if dtype.itemsize < 4 else f" a {role}.model_args.dtype of two bytes,"
        raise LimbeckError(
            f"the {role} {name!r} takes {needed / 1e9:,.1f} GB of memory to load, and {left / 1e9:,.1f} GB are left on "
            f"{platform.node()}; use{precision} a smaller model, fewer processes on a machine, or one with more memory."
        )


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """``config`` with other values, made anew so that what is derived from them (a type per layer, say) follows."""
    if not changes:
        return config
    values = {**config.to_dict(), **changes}
    if "num_hidden_layers" in changes and "layer_types" not in changes:
        values.pop("layer_types", None)
    return type(config).from_dict(values)


def recompute_activations(model: Any, *, use_reentrant: bool = False) -> None:
    """Keep only the layers' inputs in the forward pass and compute the rest again in the backward pass."""
    settings = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):  # the newer name of the same thing
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def load_tokenizer(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The fast tokenizer of a checkpoint; one without a padding token pads with its end token."""
    _check_name(name_or_path, "tokenizer", holds=None)
    try:
        extra = {} if revision is None else {"revision": revision}
        tokenizer = _from_pretrained(AutoTokenizer, name_or_path, trust_remote_code=trust_remote_code, **extra)
    except (OSError, ValueError, ImportError) as error:
        hint = _hint(name_or_path, error)
        raise LimbeckError(f"cannot load a tokenizer from {name_or_path!r}: {_first_line(error)}{hint}") from error
    if tokenizer.eos_token_id is None:
        raise LimbeckError(
            f"the tokenizer of {name_or_path!r} has no end-of-sequence token; set eos_token in its config."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_name(name_or_path: str | None, role: str, holds: str | None = "config.json") -> None:
    """Raise LimbeckError for a folder without a checkpoint."""
    check_folder(name_or_path, role, holds)


def _from_pretrained(auto_class: Any, name_or_path: str | None, **options: Any) -> Any:
    with offline_if_unreachable(name_or_path):
        return auto_class.from_pretrained(name_or_path, **options)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return first.rstrip(".") + "."


def _hint(name_or_path: str | None, error: Exception) -> str:
    if name_or_path is None or isinstance(error, ImportError):
        return ""
    if not Path(name_or_path).is_dir():
        return " It is not a folder here; check the path, or the hub name and the network."
    if isinstance(error, (OSError, StrictDataclassError)):
        return " Check the files in that folder, or copy the checkpoint again."
    return ""
