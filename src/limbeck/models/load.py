"""Loads a model and its tokenizer by path or hub name, or makes a model from a configuration."""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import is_flash_attn_2_available

from limbeck.config.schema import ModelArgs
from limbeck.data.tokenizers import GPT2, NUMBERS, gpt2_tokenizer, number_tokenizer
from limbeck.errors import LimbeckError
from limbeck.folders import check_folder, is_megatron_checkpoint
from limbeck.models import megatron_hybrid_config
from limbeck.models.hub import offline_if_unreachable
from limbeck.models.megatron_checkpoint import load_weights, open_checkpoint
from limbeck.models.megatron_config import canonical, check_names, hf_config, is_hybrid, scale_output_projections
from limbeck.models.memory import available_memory
from limbeck.models.varlen_attention import BY_DOCUMENT

_ATTENTION = {"auto": None, "fa2": "flash_attention_2"}


@dataclass(frozen=True)
class ModelSource:
    """Which checkpoint to load, and how: a role's ``model_args``.

    name_or_path: folder or hub name, or None for a model that ``config_kwargs`` or ``megatron_arguments`` describe.
    config_kwargs: override the checkpoint's configuration. megatron_arguments: override those in a checkpoint of Megatron-LM.
    from_scratch: draw the weights instead of reading them. role: for error messages.
    """

    name_or_path: str | None
    role: str = "model"
    attn_implementation: str = "auto"
    config_kwargs: Mapping[str, Any] = field(default_factory=dict)
    from_scratch: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    megatron_arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_args(cls, args: ModelArgs, role: str) -> ModelSource:
        """The source that ``model_args`` describe."""
        return cls(
            args.model_name_or_path,
            role,
            args.attn_implementation,
            args.model_config_kwargs,
            args.from_scratch,
            args.revision,
            args.trust_remote_code,
            args.megatron_arguments,
        )

    @property
    def name(self) -> str:
        """What to call the model in a sentence."""
        return self.name_or_path or f"the {self.role}"

    @property
    def of_megatron(self) -> bool:
        """Whether arguments of Megatron-LM describe the model."""
        return bool(self.megatron_arguments) or is_megatron_checkpoint(self.name_or_path)

    @property
    def draws_weights(self) -> bool:
        """Whether the weights are random."""
        return self.from_scratch or (self.name_or_path is None and bool(self.megatron_arguments))

    @property
    def hub_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of every ``from_pretrained``."""
        revision = {} if self.revision is None else {"revision": self.revision}
        return {"trust_remote_code": self.trust_remote_code, **revision}


def load_model(source: ModelSource, dtype: torch.dtype, seed: int = 0) -> Any:
    """An ``AutoModelForCausalLM`` in ``dtype`` on the CPU. ``seed``: of weights that are drawn from scratch.

    Raises LimbeckError if there is nothing to load, or no room for it.
    """
    name, role = source.name_or_path, source.role
    check_folder(name, role, holds="config.json")
    attention = _attention(source)
    try:
        described = source.megatron_arguments or (source.from_scratch and "model_type" in source.config_kwargs)
        if name is None and not described:
            raise LimbeckError(
                f"the {role} has no checkpoint: set {role}_pretrain to a folder or hub name, or for a new model "
                f"{role}.model_args.from_scratch: true with model_config_kwargs that name a model_type."
            )
        config = _load_config(source)
        if not source.trust_remote_code:  # a class from the hub may not support the meta device
            _refuse_too_large(config, dtype, name, role)
        if source.draws_weights:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=attention, trust_remote_code=source.trust_remote_code
                )
            if source.of_megatron:
                hybrid = config.model_type == megatron_hybrid_config.MODEL_TYPE
                (megatron_hybrid_config.initialize if hybrid else scale_output_projections)(model)
        elif source.of_megatron:
            weights = load_weights(open_checkpoint(str(name)), config, dtype)
            with torch.device("meta"):
                of_model = type(AutoModelForCausalLM.from_config(config))  # the automatic class takes no state_dict
            model = of_model.from_pretrained(
                None, config=config, state_dict=weights, dtype=dtype, attn_implementation=attention
            )
            model.config.name_or_path = model.name_or_path = str(name)
            # It lists the conversions of loading, of which these names needed none. Without it, saving writes the hub's names.
            model._weight_conversions = None
        else:
            options = {"config": config, "dtype": dtype, "attn_implementation": attention, **source.hub_kwargs}
            model = _from_pretrained(AutoModelForCausalLM, name, options)
        if attention == "flex_attention":  # its variant by document also takes what autocast leaves
            model.set_attn_implementation(BY_DOCUMENT[attention])
        return model
    except (SafetensorError, json.JSONDecodeError) as error:
        raise LimbeckError(
            f"the {role} {name!r} is incomplete or damaged ({_first_line(error).rstrip('.')}); copy or download it again."
        ) from error
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        which = f"new {role}" if name is None else f"{role} {name!r}"
        raise LimbeckError(f"cannot load the {which}{_reason(name, error)}") from error


def _attention(source: ModelSource) -> str | None:
    """The attention implementation for ``transformers``, which chooses one if it is None."""
    wanted = _ATTENTION.get(source.attn_implementation, source.attn_implementation)
    if wanted != "flash_attention_2" or is_flash_attn_2_available():
        return wanted
    warnings.warn(
        "attn_implementation = flash_attention_2 needs a GPU and the package flash-attn; without them PyTorch's own attention "
        "is used, which includes flash attention on GPUs.",
        stacklevel=2,
    )
    return None


def model_outline(source: ModelSource, dtype: torch.dtype) -> Any:
    """The model that ``load_model`` returns, on the meta device: shapes without values; only the configuration is read.

    Raises LimbeckError if that cannot be read.
    """
    check_folder(source.name_or_path, source.role, holds="config.json")
    with _unreadable(f"the {source.role} {source.name_or_path!r}", source.name_or_path):
        config = _load_config(source)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=source.trust_remote_code)


def model_limits(source: ModelSource) -> tuple[int | None, int | None]:
    """Number of positions and of tokens of a checkpoint by its configuration; None where that sets no limit."""
    with _unreadable(repr(source.name_or_path), source.name_or_path):
        text = _load_config(source).get_text_config()
    return getattr(text, "max_position_embeddings", None), getattr(text, "vocab_size", None)


def end_token_ids(source: ModelSource) -> set[int]:
    """The tokens with which a checkpoint ends what it generates, by its generation configuration or else its configuration.

    Raises LimbeckError if neither can be read.
    """
    found = None
    if source.name_or_path is not None:
        with suppress(OSError):  # not every checkpoint has the file
            found = _from_pretrained(
                GenerationConfig, source.name_or_path, {"revision": source.revision or "main"}
            ).eos_token_id
    if found is None:
        with _unreadable(f"the {source.role} {source.name_or_path!r}", source.name_or_path):
            found = getattr(_load_config(source).get_text_config(), "eos_token_id", None)
    return set() if found is None else {found} if isinstance(found, int) else set(found)


def checkpoint_dtype(source: ModelSource) -> torch.dtype:
    """The precision that a checkpoint's configuration names, else bfloat16."""
    check_folder(source.name_or_path, source.role, holds="config.json")
    with _unreadable(f"the {source.role} {source.name_or_path!r}", source.name_or_path):
        dtype = _load_config(source).get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _load_config(source: ModelSource) -> Any:
    changes = dict(source.config_kwargs)
    if source.of_megatron:
        return _changed(_megatron_config(source), changes)
    if source.name_or_path is None:
        return AutoConfig.for_model(**changes)
    return _changed(_from_pretrained(AutoConfig, source.name_or_path, source.hub_kwargs), changes)


def _megatron_config(source: ModelSource) -> Any:
    """The configuration that Megatron's arguments describe, with the vocabulary and the end token of the tokenizer."""
    given, where = source.megatron_arguments, f"{source.role}.model_args.megatron_arguments"
    check_names(given, where)
    arguments, dtype, tokenizer, size = dict(given), None, None, 0
    if source.name_or_path is not None:
        if not is_megatron_checkpoint(source.name_or_path):
            raise LimbeckError(
                f"{where} are only read with a checkpoint of Megatron-LM, and {source.name_or_path!r} is none; use "
                f"{source.role}.model_args.model_config_kwargs."
            )
        stored = open_checkpoint(source.name_or_path)
        arguments, where = {**canonical(stored.arguments), **canonical(given)}, stored.where
        dtype = stored.arguments.get("params_dtype")
        if stored.has_mamba:
            arguments["is_hybrid_model"] = True
    if (name := given.get("tokenizer_model")) is not None:
        tokenizer = load_tokenizer(ModelSource(str(name), "tokenizer", trust_remote_code=source.trust_remote_code))
        size = 1 + max(tokenizer.get_vocab().values())
        # A new model has the rows that are given; a checkpoint may store more than those of its tokenizer.
        padded = source.name_or_path is None and given.get("padded_vocab_size") is not None
        if arguments.get("vocab_size") is None and not padded:
            arguments |= {"vocab_size": size, "tokenizer_type": None}
    config = (megatron_hybrid_config.hf_config if is_hybrid(arguments) else hf_config)(arguments, where)
    # A vocab_size in a checkpoint may be less than what the tokenizer can name, as for published models.
    rows = config.vocab_size if "vocab_size" in given else arguments.get("padded_vocab_size") or config.vocab_size
    if size > rows:
        raise LimbeckError(
            f"{where}: the tokenizer {name} has {size} tokens, and the vocabulary of the model has {rows} rows; set the "
            "tokenizer of this model."
        )
    if tokenizer is not None:
        config.eos_token_id = tokenizer.eos_token_id
    if isinstance(dtype, torch.dtype):
        config.dtype = dtype
    return config


@contextmanager
def _unreadable(what: str, name: str | None) -> Iterator[None]:
    """Turn the exceptions of a configuration that cannot be read into one sentence."""
    try:
        yield
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        raise LimbeckError(f"cannot read the configuration of {what}{_reason(name, error)}") from error


def _refuse_too_large(config: Any, dtype: torch.dtype, name: str | None, role: str) -> None:
    """Raise LimbeckError if the parameters exceed the free memory; the process would be killed while loading."""
    left = available_memory()
    if left is None or getattr(config, "quantization_config", None) is not None:  # quantized weights are smaller
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
    """``config`` with other values, built again so that derived values (such as a type per layer) follow."""
    if not changes:
        return config
    values = {**config.to_dict(), **changes}
    if "num_hidden_layers" in changes and "layer_types" not in changes:
        values.pop("layer_types", None)
    return type(config).from_dict(values)


def load_tokenizer(source: ModelSource) -> Any:
    """The fast tokenizer of a checkpoint, or for one of Megatron-LM that of ``megatron_arguments``; or ``null:N`` or
    ``gpt2:VOCAB,MERGES``.

    One without a padding token pads with its end token.
    """
    name = str(source.megatron_arguments.get("tokenizer_model") or source.name_or_path)
    if name.startswith(NUMBERS):
        return number_tokenizer(name)
    if name.startswith(GPT2):
        return gpt2_tokenizer(name)
    check_folder(name, "tokenizer")
    if is_megatron_checkpoint(name) and not any(Path(name).glob("tokenizer*")):
        raise LimbeckError(
            f"{name} is a checkpoint of Megatron-LM, which holds no tokenizer; set tokenizer to the folder or hub id of one."
        )
    try:
        tokenizer = _from_pretrained(AutoTokenizer, name, source.hub_kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise LimbeckError(f"cannot load a tokenizer from {name!r}{_reason(name, error)}") from error
    if tokenizer.eos_token_id is None:
        raise LimbeckError(f"the tokenizer of {name!r} has no end-of-sequence token; set eos_token in its config.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _from_pretrained(auto_class: Any, name: str | None, options: Mapping[str, Any]) -> Any:
    with offline_if_unreachable(name):
        return auto_class.from_pretrained(name, **options)


def _first_line(error: BaseException) -> str:
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:  # its own words name a validator
        error = error.__cause__
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return first.rstrip(".") + "."


def _reason(name_or_path: str | None, error: Exception) -> str:
    """The end of the sentence that something cannot be loaded from ``name_or_path``."""
    reason = _first_line(error)
    if name_or_path is None or isinstance(error, ImportError):
        return f": {reason}"
    if not Path(name_or_path).is_dir():
        return (
            f", which is not a folder here and cannot be loaded from the hub ({reason.rstrip('.')}); check the path, or the "
            "hub name and the network."
        )
    if isinstance(error, (OSError, StrictDataclassError)):
        return f": {reason} Check the files in that folder, or copy the checkpoint again."
    return f": {reason}"
