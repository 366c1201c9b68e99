"""LoRA through peft: adds adapters, and merges them into an ordinary state dict without changing the trained weights."""

from __future__ import annotations

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


def merged_state_dict(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state dict of the plain model with every adapter merged: W + (α/r) · B A, computed in float32.

    state: the full (gathered) state dict of the wrapped ``model``.
    """
    merged: dict[str, Tensor] = {}
    prefix = "base_model.model."
    adapter = model.active_adapter
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and adapter in scaling:
            a, b = (state[f"{name}.lora_{x}.{adapter}.weight"].float() for x in "AB")
            delta = scaling[adapter] * (b @ a)
            delta = delta.T if module.fan_in_fan_out else delta
            weight = state[f"{name}.base_layer.weight"]
            merged[f"{name}.weight".removeprefix(prefix)] = (weight.float() + delta).to(weight.dtype)
    for key, value in state.items():
        plain = key.removeprefix(prefix)
        if ".lora_" in plain or ".original_module." in plain:
            continue
        plain = plain.replace(".base_layer.", ".").replace(f".modules_to_save.{adapter}.", ".")
        merged.setdefault(plain, value)
    return merged
