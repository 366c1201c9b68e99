"""The weights of a Megatron checkpoint under Hugging Face names, one tensor after the other."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from limbeck.errors import LimbeckError
from limbeck.folders import MEGATRON_INDEX, megatron_iteration
from limbeck.models.megatron_checkpoint.legacy import open_legacy
from limbeck.models.megatron_checkpoint.stored import StoredCheckpoint, path_of
from limbeck.models.megatron_checkpoint.torch_dist import open_torch_dist
from limbeck.models.megatron_families import EMBEDDINGS, FAMILIES, HEAD, Heads, Kind, Parameter, joined, slice_of


def open_checkpoint(name: str) -> StoredCheckpoint:
    """The checkpoint ``name``: a folder of checkpoints, of which the newest is read, or the folder of one iteration.

    Raises:
        LimbeckError: if there is no complete checkpoint of a known format.
    """
    folder = megatron_iteration(Path(name))
    if (folder / MEGATRON_INDEX).is_file():
        return open_torch_dist(folder)
    if next(folder.glob("mp_rank_*"), None) is not None:
        return open_legacy(folder)
    raise LimbeckError(
        f"{folder} is no checkpoint of Megatron-LM in the format torch_dist (with a file {MEGATRON_INDEX}) or torch (with "
        "folders mp_rank_00, ...); save it with --ckpt-format torch_dist."
    )


def load_weights(checkpoint: StoredCheckpoint, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of ``checkpoint`` as those of the Hugging Face model of ``config``, in ``dtype``.

    Rows of embeddings and output head beyond the vocabulary of ``config`` are left out.

    Raises:
        LimbeckError: if the checkpoint has other parameters, or of other shapes, than this model.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    outline, heads = model.state_dict(), Heads.of(config)
    left, weights = dict(checkpoint.parameters), dict[str, Tensor]()
    for parameter in FAMILIES[config.model_type].parameters(model):
        tied = parameter.sources == (HEAD,) and config.tie_word_embeddings
        key = parameter.name, parameter.layer
        read = left.pop(key, None)
        if read is None and tied:
            continue
        if read is None:
            raise LimbeckError(
                f"{checkpoint.where} has no {path_of(*key)}, which a {config.model_type} model with its arguments has; "
                "correct the arguments with model_args.megatron_arguments, or copy the checkpoint again."
            )
        slices = read()
        _check_shape(parameter, slices, [outline[source] for source in parameter.sources], heads, checkpoint.where)
        tensors = joined(parameter.kind, slices, heads, config.vocab_size)
        for source, tensor in zip(parameter.sources, tensors, strict=True):
            weights[source] = torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
        if tied:
            _check_tied(weights, checkpoint.where)
    if left:
        raise LimbeckError(
            f"{checkpoint.where} has a {path_of(*min(left, key=str))}, which a {config.model_type} model with its arguments "
            "does not have; correct the arguments with model_args.megatron_arguments."
        )
    return weights


_DIVIDED: dict[Kind, int | None] = {"copy": None, "row": 1, "experts_gate_up": 1, "experts_down": 2}
"""The axis along which a parameter is divided into slices, where it is not the first."""


def _check_shape(parameter: Parameter, slices: list[Tensor], sources: list[Tensor], heads: Heads, where: str) -> None:
    """Raise LimbeckError unless the ``slices`` are those of ``parameter``, made of ``sources``, which may be padded."""
    kind, path = parameter.kind, path_of(parameter.name, parameter.layer)
    found, expected = list(slices[0].shape), list(slice_of(kind, sources, heads, 0, 1).shape)
    axis = _DIVIDED.get(kind, 0)
    if axis is not None and len(found) > axis:
        found[axis] = sum(part.shape[axis] for part in slices)
    if kind == "vocabulary" and found[1:] == expected[1:]:
        if found[0] < expected[0]:
            raise LimbeckError(
                f"{where}: {path} has {found[0]} rows, and the vocabulary has {expected[0]} tokens; set the tokenizer of the "
                "checkpoint."
            )
        return
    if kind in ("experts_gate_up", "experts_down") and found[0] != expected[0]:
        raise LimbeckError(
            f"{where}: {path} is of {found[0]} experts, and num_experts in its arguments is {expected[0]}; correct it with "
            "model_args.megatron_arguments."
        )
    if found != expected:
        raise LimbeckError(
            f"{where}: {path} has the shape {found}, and its arguments give {expected}; correct them with "
            "model_args.megatron_arguments."
        )


def _check_tied(weights: dict[str, Tensor], where: str) -> None:
    """Leave out a copy of the embeddings, which the last pipeline stage has as its output layer."""
    embeddings, head = weights[EMBEDDINGS], weights.pop(HEAD)
    if not torch.equal(embeddings, head):
        raise LimbeckError(
            f"{where} has an output layer of its own, but untie_embeddings_and_output_weights is false in its arguments; set "
            "it to true in model_args.megatron_arguments."
        )
