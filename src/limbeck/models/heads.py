"""Splits a causal language model into a body that returns hidden states and an output head that returns logits.

The body is Hugging Face's ``base_model``. Whatever follows the head's matrix product (soft-cap, scale) is read from the
configuration and compared once with the model's own forward pass. A model with any other step after the head is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.data.batch import cumulative_lengths
from limbeck.errors import LimbeckError
from limbeck.models.recurrent_layers import separate_recurrent_layers
from limbeck.models.varlen_attention import (
    BY_DOCUMENT,
    GPU_KERNELS,
    one_document_per_row,
    separate_documents,
    varlen_kwargs,
)
from limbeck.objectives import OutputHead


def unwrap_model(model: Any) -> Any:
    """Returns the Hugging Face model inside a LoRA wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body(model: Any) -> nn.Module:
    """Returns the part of ``model`` that computes the last hidden state, final norm included."""
    return unwrap_model(model).base_model


def hidden_states(
    model_body: Any,
    input_ids: Tensor,
    position_ids: Tensor | None,
    documents: Sequence[int] | None = None,
    embedded: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Returns the last hidden states [batch, time, hidden].

    input_ids:    [batch, time]. Rows are right-padded, so with causal attention no real token attends to padding.
    position_ids: [batch, time], restarting at 0 with every packed document, or None.
    documents:    with packing, the lengths of the documents in the one row; tokens attend only within their document.
    embedded:     [batch, time, hidden] inputs to use in place of the embeddings of ``input_ids``, or None.
    cu_seqlens:   the boundaries of ``documents``, see ``Batch``; made here if None.
    """
    with attending_within(model_body, input_ids, documents, cu_seqlens) as extra:
        given = {"input_ids": input_ids} if embedded is None else {"inputs_embeds": embedded}
        return model_body(**given, position_ids=position_ids, use_cache=False, **extra).last_hidden_state


@contextmanager
def attending_within(
    model_body: Any, input_ids: Tensor, documents: Sequence[int] | None, cu_seqlens: Tensor | None
) -> Iterator[dict[str, Any]]:
    """Tokens attend only within ``documents`` in the block. Yields keyword arguments for the body, beside ids and positions.

    The arguments are those of ``hidden_states``.
    """
    separated: AbstractContextManager[None] = one_document_per_row()
    if documents is not None:
        if cu_seqlens is None:
            cu_seqlens = cumulative_lengths(documents).to(input_ids.device, non_blocking=True)
        separated = separate_documents(documents, cu_seqlens)
    with separated:
        yield varlen_kwargs(model_body.config._attn_implementation, input_ids, documents, cu_seqlens)


def output_head(model: Any) -> OutputHead:
    """Returns the head's current weight and bias (tied or not, sharded or gathered) and the configured soft-cap and scale.

    Raises LimbeckError if the model has no plain linear output head.
    """
    causal = unwrap_model(model)
    linear = causal.get_output_embeddings()
    if linear is None or getattr(linear, "weight", None) is None or hasattr(linear, "base_layer"):
        raise LimbeckError(
            f"{type(causal).__name__} has no plain linear output head to distil through; "
            "if LoRA wraps the output head, leave it out of lora_target."
        )
    config = vars(causal.config.get_text_config())  # not to_dict(), which copies it and leaves a reference cycle behind
    softcap = config.get("final_logit_softcapping") or config.get("logits_soft_cap")
    scale = 1.0
    if "logits_scaling" in config:  # Granite divides
        scale /= config["logits_scaling"]
    if "logit_scale" in config:  # Cohere multiplies
        scale *= config["logit_scale"]
    return OutputHead(linear.weight, getattr(linear, "bias", None), softcap, scale)


@torch.no_grad()
def check_head(model: Any, name: str) -> None:
    """Raises LimbeckError unless body and head reproduce the model's own logits on four tokens."""
    causal = unwrap_model(model)
    was_training = causal.training
    causal.eval()
    head = output_head(causal)
    device = head.weight.device
    ids = torch.arange(1, 5, device=device).unsqueeze(0) % head.weight.shape[0]
    with use_eager_on_cpu(causal, device):
        h = hidden_states(body(causal), ids, None)
        own = causal(input_ids=ids, use_cache=False).logits.float()
    z = (h.to(head.weight.dtype) @ head.weight.T).float()
    z = (z if head.bias is None else z + head.bias.float()) * head.scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    causal.train(was_training)
    coarse = head.weight.dtype in (torch.bfloat16, torch.float16)
    worst = (z[..., : own.shape[-1]] - own).abs().max().item()
    if not worst <= (0.05 if coarse else 1e-3) * max(1.0, own.abs().max().item()):  # NaN is refused too
        raise LimbeckError(
            f"{name} ({type(causal).__name__}) changes its logits after the output head in an unsupported way "
            f"(they differ by up to {worst:.3g}), so its distribution would be wrong; use another model."
        )


@torch.no_grad()
def enable_varlen_attention(model: Any, name: str) -> None:
    """Switches ``model`` to varlen attention and verifies that packed documents give the same hidden states as single ones.

    Keeps the model's own attention implementation if only that passes. Raises LimbeckError if neither passes. For a model
    that lies on a CPU but is configured for a GPU kernel, eager attention is verified in place of that kernel.
    """
    causal = unwrap_model(model)
    was_training = causal.training
    causal.eval()
    trunk, own = body(causal), causal.config._attn_implementation
    separate_recurrent_layers(trunk)
    head = output_head(causal).weight
    device, coarse = head.device, head.dtype in (torch.bfloat16, torch.float16)
    documents = (5, 1, 7, 4)
    ids = torch.arange(1, sum(documents) + 1, device=device) % head.shape[0]
    positions = torch.cat([torch.arange(length, device=device) for length in documents])
    rows = torch.nn.utils.rnn.pad_sequence(list(ids.split(documents)), batch_first=True)
    with use_eager_on_cpu(causal, device):
        tried = causal.config._attn_implementation
        each = hidden_states(trunk, rows, None).float()
        alone = torch.cat([row[:length] for row, length in zip(each, documents, strict=True)])
        kept, implementation = False, tried
        for implementation in dict.fromkeys((BY_DOCUMENT.get(tried, tried), tried)):
            causal.set_attn_implementation(implementation)
            try:
                packed = hidden_states(trunk, ids[None], positions[None], documents)[0].float()
            except (AttributeError, TypeError, ValueError, RuntimeError):
                continue  # this architecture modifies its mask, which must then be a tensor
            kept = bool((packed - alone).abs().max() <= (0.1 if coarse else 1e-3) * alone.abs().max())
            if kept:
                break
    causal.set_attn_implementation(implementation if tried == own else BY_DOCUMENT.get(own, own))
    causal.train(was_training)
    if not kept:
        raise LimbeckError(
            f"{name} ({type(causal).__name__}) does not separate packed rows by their position ids, so rows would attend to "
            "each other; set student.use_sequence_packing: false."
        )


@contextmanager
def use_eager_on_cpu(causal: Any, device: torch.device) -> Iterator[None]:
    """Uses eager attention inside the block if the model is on a CPU but configured for a GPU kernel."""
    own = causal.config._attn_implementation
    if device.type == "cpu" and own.startswith(GPU_KERNELS):
        causal.set_attn_implementation("eager")
    try:
        yield
    finally:
        causal.set_attn_implementation(own)


def check_length(model: Any, name: str, longest: int) -> None:
    """Raises LimbeckError if a row of ``longest`` tokens exceeds the model's ``max_position_embeddings``."""
    known = getattr(unwrap_model(model).config.get_text_config(), "max_position_embeddings", None)
    if known is not None and longest > known:
        raise LimbeckError(
            f"the longest row has {longest} tokens, but {name} supports {known}; lower sequence_length, or set "
            "model_args.model_config_kwargs.max_position_embeddings if it supports more."
        )


def decoder_layers(model: Any) -> list[nn.Module]:
    """Returns the repeated decoder blocks of ``model`` (Hugging Face's ``_no_split_modules``), the units of sharding."""
    classes = set(unwrap_model(model)._no_split_modules or ())
    # Base classes count too: FSDP2 replaces the class of a sharded layer by a subclass with another name.
    return [
        module for module in model.modules() if classes.intersection(base.__name__ for base in type(module).__mro__)
    ]
