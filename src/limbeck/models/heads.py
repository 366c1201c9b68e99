"""A causal language model seen as a body that gives hidden states and a head that gives logits.

The body is Hugging Face's own ``base_model``; what the model does to its logits after the head's matrix product (soft-cap,
scale) is read from its configuration and checked once against the model's own forward, so that a model with a habit that is
not known here is refused rather than distilled wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import LimbeckError
from limbeck.models.documents import BY_DOCUMENT, FOR_GPUS, document_arguments, kept_apart
from limbeck.objectives import OutputHead


def unwrapped(model: Any) -> Any:
    """The Hugging Face model inside a LoRA wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body(model: Any) -> nn.Module:
    """The part of ``model`` that ends in the last hidden state, norm included."""
    return unwrapped(model).base_model


def hidden_states(
    model_body: Any,
    input_ids: Tensor,
    position_ids: Tensor | None,
    documents: Sequence[int] | None = None,
    embedded: Tensor | None = None,
) -> Tensor:
    """The last hidden states [batch, time, hidden]; those of ``embedded`` [batch, time, hidden] in the ids' stead, if given.

    Rows are right-padded and attention is causal, so padding is out of sight of every real token. With ``documents``, the
    lengths of what lies end to end in the one row, and ``position_ids`` that restart with each, none of them sees another.
    """
    extra = document_arguments(model_body.config._attn_implementation, input_ids, documents)
    with nullcontext() if documents is None else kept_apart(documents):
        given = {"input_ids": input_ids} if embedded is None else {"inputs_embeds": embedded}
        return model_body(**given, position_ids=position_ids, use_cache=False, **extra).last_hidden_state


def output_head(model: Any) -> OutputHead:
    """The head's current weight and bias (tied or not, sharded or gathered) with the configuration's soft-cap and scale."""
    causal = unwrapped(model)
    linear = causal.get_output_embeddings()
    if linear is None or getattr(linear, "weight", None) is None or hasattr(linear, "base_layer"):
        raise LimbeckError(
            f"{type(causal).__name__} has no plain linear output head to distil through; "
            "if LoRA wraps the output head, leave it out of lora_target."
        )
    config = causal.config.get_text_config().to_dict()
    softcap = config.get("final_logit_softcapping") or config.get("logits_soft_cap")
    scale = 1.0
    if "logits_scaling" in config:  # Granite divides
        scale /= config["logits_scaling"]
    if "logit_scale" in config:  # Cohere multiplies
        scale *= config["logit_scale"]
    return OutputHead(linear.weight, getattr(linear, "bias", None), softcap, scale)


@torch.no_grad()
def check_head(model: Any, name: str) -> None:
    """Raise LimbeckError unless body and head reproduce the model's own logits on four tokens."""
    causal = unwrapped(model)
    was_training = causal.training
    causal.eval()
    head = output_head(causal)
    device = head.weight.device
    ids = torch.arange(1, 5, device=device).unsqueeze(0) % head.weight.shape[0]
    with attention_for(causal, device):
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
            f"{name} ({type(causal).__name__}) changes its logits after the output head in a way that Limbeck does not know "
            f"(they differ by up to {worst:.3g}), so its distribution would be wrong; use another model."
        )


@torch.no_grad()
def keep_documents_apart(model: Any, name: str) -> None:
    """Let ``model`` attend document by document where it can, and prove that packed documents give what each gives alone.

    Changes the attention implementation of ``model`` if that passes; else leaves it, if the model's own keeps documents apart
    by their positions. Raises LimbeckError if neither does. Of a model on a CPU that is to use a kernel for GPUs everything
    but that kernel is tried.
    """
    causal = unwrapped(model)
    was_training = causal.training
    causal.eval()
    trunk, own = body(causal), causal.config._attn_implementation
    head = output_head(causal).weight
    device, coarse = head.device, head.dtype in (torch.bfloat16, torch.float16)
    documents = (5, 1, 7, 4)
    ids = torch.arange(1, sum(documents) + 1, device=device) % head.shape[0]
    positions = torch.cat([torch.arange(length, device=device) for length in documents])
    rows = torch.nn.utils.rnn.pad_sequence(list(ids.split(documents)), batch_first=True)
    with attention_for(causal, device):
        tried = causal.config._attn_implementation
        each = hidden_states(trunk, rows, None).float()
        alone = torch.cat([row[:length] for row, length in zip(each, documents, strict=True)])
        kept, implementation = False, tried
        for implementation in dict.fromkeys((BY_DOCUMENT.get(tried, tried), tried)):
            causal.set_attn_implementation(implementation)
            try:
                packed = hidden_states(trunk, ids[None], positions[None], documents)[0].float()
            except (AttributeError, TypeError, ValueError, RuntimeError):
                continue  # an architecture that does something with its mask which only a tensor allows
            kept = bool((packed - alone).abs().max() <= (0.1 if coarse else 1e-3) * alone.abs().max())
            if kept:
                break
    causal.set_attn_implementation(implementation if tried == own else BY_DOCUMENT.get(own, own))
    causal.train(was_training)
    if not kept:
        raise LimbeckError(
            f"{name} ({type(causal).__name__}) does not keep packed rows apart by their position ids, so rows would see each "
            "other; set student.use_sequence_packing: false."
        )


@contextmanager
def attention_for(causal: Any, device: torch.device) -> Iterator[None]:
    """Eager attention inside, where a kernel for GPUs is asked for and the model still lies on a CPU."""
    own = causal.config._attn_implementation
    if device.type == "cpu" and own.startswith(FOR_GPUS):
        causal.set_attn_implementation("eager")
    try:
        yield
    finally:
        causal.set_attn_implementation(own)


def check_length(model: Any, name: str, longest: int) -> None:
    """Raise LimbeckError if a row of ``longest`` tokens has positions that the model does not."""
    known = getattr(unwrapped(model).config.get_text_config(), "max_position_embeddings", None)
    if known is not None and longest > known:
        raise LimbeckError(
            f"the longest row has {longest} tokens, but {name} is made for {known}; lower sequence_length, or set "
            "model_args.model_config_kwargs.max_position_embeddings if it really reaches further."
        )


def decoder_layers(model: Any) -> list[nn.Module]:
    """The repeated blocks of ``model``, as Hugging Face names them: the natural units of sharding."""
    classes = set(unwrapped(model)._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in classes]
