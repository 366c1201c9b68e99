"""What a generator knows of the student before it has weights: structure, tokenizer and the tokens that end a completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from limbeck.config import DistillConfig
from limbeck.models import ModelSource, load_tokenizer, model_outline
from limbeck.strategies.world import World


def writing_dtype(device_type: str) -> torch.dtype:
    """The precision in which a copy of a model writes."""
    return torch.float32 if device_type == "cpu" else torch.bfloat16


def student_outline(config: DistillConfig, world: World) -> tuple[Any, Any]:
    """The student on the meta device and its tokenizer; in float32 on a CPU and in bfloat16 on a GPU."""
    args = config.student.model_args
    source, name = ModelSource.from_args(args, "student"), str(config.tokenizer_name_or_path)
    revision = args.revision if name == args.model_name_or_path else None
    model = model_outline(source, writing_dtype(world.device.type))
    return model, load_tokenizer(replace(source, name_or_path=name, revision=revision))


def end_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokenizer's end token and those of the model's generation configuration."""
    return _ids(tokenizer.eos_token_id) | _ids(model.generation_config.eos_token_id)


def num_tokens(tokenizer: Any) -> int:
    """One more than the largest token id; rows of the output head from there on pad it and are no tokens."""
    return 1 + max(tokenizer.get_vocab().values())


def _ids(value: int | Sequence[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)
