"""Writes a Hugging Face model as a checkpoint that Megatron-LM loads, in its format ``torch_dist`` or ``torch``."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig

from limbeck.data.tokenizers import GPT2, NUMBERS
from limbeck.folders import MEGATRON_TRACKER
from limbeck.models import megatron_hybrid_config
from limbeck.models.megatron_checkpoint.write_legacy import write_legacy
from limbeck.models.megatron_checkpoint.write_torch_dist import write_torch_dist
from limbeck.models.megatron_config import megatron_arguments

Format = Literal["torch_dist", "torch"]
Layers = Literal["transformer_engine", "local"]
"""Megatron's ``--transformer-impl``."""

HYBRID_SPEC = "megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec"
"""Megatron's ``--spec`` of a hybrid, without which ``pretrain_mamba.py`` and ``pretrain_hybrid.py`` build no model."""


def write_checkpoint(
    model: Any,
    folder: Path,
    iteration: int,
    tokenizer: str | None = None,
    form: Format = "torch_dist",
    layers: Layers = "transformer_engine",
) -> Path:
    """Write ``model`` as the newest checkpoint in ``folder``, in place of an earlier one of that iteration.

    Args:
        model: a Hugging Face model on the CPU; its precision is kept.
        folder: of checkpoints; what Megatron-LM calls ``--load``.
        iteration: number of optimizer steps.
        tokenizer: of the run, as in ``DistillConfig.tokenizer``, for Megatron-LM's arguments of the tokenizer.
        form: ``torch_dist`` is loaded in any layout, ``torch`` only without tensor, pipeline and expert parallelism.
        layers: of the model that loads a checkpoint in the format ``torch``, in which their parameters have other names.

    Returns:
        The folder of the checkpoint.

    Raises:
        LimbeckError: if Megatron-LM has no such model.
    """
    arguments = _arguments(model, tokenizer, layers)
    target, temporary = folder / f"iter_{iteration:07d}", folder / f".iter_{iteration:07d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    common = {"args": Namespace(**arguments), "checkpoint_version": 3.0, "iteration": iteration}
    if form == "torch_dist":
        write_torch_dist(model, temporary, common, arguments["padded_vocab_size"])
    else:
        write_legacy(model, temporary, common, arguments["padded_vocab_size"], fused=layers == "transformer_engine")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    (folder / MEGATRON_TRACKER).write_text(str(iteration), encoding="utf-8")
    return target


def arguments_of(config: PretrainedConfig) -> dict[str, Any]:
    """The arguments with which Megatron-LM builds the model of ``config``; LimbeckError if it has no such model."""
    of_hybrid = config.model_type == megatron_hybrid_config.MODEL_TYPE
    return (megatron_hybrid_config.megatron_arguments if of_hybrid else megatron_arguments)(config)


def loading_flags(config: PretrainedConfig) -> str:
    """The flags with which Megatron-LM builds the model of ``config`` from its checkpoint.

    They are those of its arguments that ``--use-checkpoint-args`` does not take (``load_args_from_checkpoint`` of
    ``megatron/training/checkpointing.py``), and the layers of a hybrid. It takes those too, but ModelOpt's scripts refuse a
    checkpoint that stores them (``megatron/post_training/model_builder.py``), so the checkpoint does not.
    """
    arguments = arguments_of(config)
    flags = ["--use-checkpoint-args", f"--norm-epsilon {arguments['norm_epsilon']:g}"]
    if arguments["qk_layernorm"]:
        flags.append("--qk-layernorm")
    if arguments.get("use_rope_scaling"):
        flags.append(f"--use-rope-scaling --rope-scaling-factor {arguments['rope_scaling_factor']:g}")
    if arguments.get("rotary_seq_len_interpolation_factor") is not None:
        flags.append(f"--rotary-seq-len-interpolation-factor {arguments['rotary_seq_len_interpolation_factor']:g}")
    if arguments.get("is_hybrid_model"):
        flags.append(f"--spec {HYBRID_SPEC}")
    return " ".join(flags)


def _tokenizer_arguments(name: str, size: int) -> dict[str, Any]:
    """Megatron-LM's arguments for the tokenizer of a run. ``size`` is the model's vocabulary."""
    if name.startswith(NUMBERS):
        return {"tokenizer_type": "NullTokenizer", "vocab_size": size - 1}  # to which Megatron-LM adds one token
    if name.startswith(GPT2):
        vocab, _, merges = name.removeprefix(GPT2).rpartition(",")
        return {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": vocab, "merge_file": merges}
    return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": name}


def _arguments(model: Any, tokenizer: str | None, layers: Layers) -> dict[str, Any]:
    dtype = next(model.parameters()).dtype
    return {
        **arguments_of(model.config),
        **({} if tokenizer is None else _tokenizer_arguments(tokenizer, model.config.vocab_size)),
        "transformer_impl": layers,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
