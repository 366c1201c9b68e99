"""LoRA through peft: adds adapters, and merges them into an ordinary state dict without changing the trained weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from limbeck.errors import LimbeckError


def add_lora(
    model: Any, *, target: str, rank: int, alpha: int | None, dropout: float, additional_target: str | None
) -> Any:
    """Wraps ``model`` with trainable adapters and freezes everything else.

    target: ``all-linear`` (every linear layer except the output head), a comma-separated list of module names, or one regular
    expression. alpha: 2 · rank if None. additional_target: comma-separated modules that are trained in full.
    Raises LimbeckError if peft is missing, a target matches nothing, or an additional target has tied weights.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise LimbeckError("lora_target is set but peft is not installed; pip install 'limbeck[lora]'.") from error
    whole = [part.strip() for part in additional_target.split(",")] if additional_target else None
    if whole and model.config.get_text_config().tie_word_embeddings:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        tied = {name.rpartition(".")[2] for name, module in model.named_modules() if module in ends}
        if tied & set(whole):
            raise LimbeckError(
                f"student.model_args.additional_target names {', '.join(sorted(tied & set(whole)))}, but this model ties its "
                "embeddings to its output head, and LoRA would untie them; leave them out."
            )
    listed = [part.strip() for part in target.split(",") if part.strip()]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=listed[0] if len(listed) == 1 and _is_pattern(listed[0]) else listed,
        modules_to_save=whole,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise LimbeckError(f"student.model_args.lora_target = {target!r} does not fit this model: {error}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # updates would be lost to rounding in half precision
            parameter.data = parameter.data.float()
    return adapted


def _is_pattern(target: str) -> bool:
    return target == "all-linear" or any(mark in target for mark in "*+?[]()|^$\\")


def has_lora(model: Any) -> bool:
    """Returns whether ``model`` has adapters."""
    return hasattr(model, "peft_config")


def iter_merged(model: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights of the plain model with every adapter merged, W + (α/r) · B A, computed in float32.

    One at a time: a merged matrix follows when its three parts have come.

    weights: names and full tensors of the wrapped ``model``.
    """
    adapter, prefix = model.active_adapter, "base_model.model."
    merged_of: dict[str, tuple[str, str]] = {}  # name of a part: the module, and which of its parts
    modules = {}
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and adapter in scaling:
            modules[name] = module
            merged_of[f"{name}.base_layer.weight"] = (name, "weight")
            merged_of |= {f"{name}.lora_{x}.{adapter}.weight": (name, x) for x in "AB"}
    waiting: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
    for key, value in weights:
        if key in merged_of:
            name, part = merged_of[key]
            waiting[name][part] = value
            if len(waiting[name]) == len(("weight", "A", "B")):
                parts, module = waiting.pop(name), modules[name]
                delta = module.scaling[adapter] * (parts["B"].float() @ parts["A"].float())
                delta = delta.T if module.fan_in_fan_out else delta
                weight = parts["weight"]
                yield f"{name}.weight".removeprefix(prefix), (weight.float() + delta).to(weight.dtype)
        elif ".lora_" not in key and ".original_module." not in key:
            plain = key.removeprefix(prefix).replace(".base_layer.", ".")
            yield plain.replace(f".modules_to_save.{adapter}.", "."), value
