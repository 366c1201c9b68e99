"""Tiny real things, made on the spot: a tokenizer, two models, a file of questions."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def rows(count: int = 96) -> list[dict[str, str]]:
    """Questions of one addition each."""
    return [
        {
            "question": f"What is {i % 13} plus {i * 7 % 11}?",
            "answer": f"It is {i % 13 + i * 7 % 11}" + " indeed" * (i % 4),
        }
        for i in range(count)
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(row.values()) for row in rows()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>", chat_template=TEMPLATE
    )


def make_model(
    folder: Path, *, kind: str = "qwen2", layers: int = 2, hidden: int = 32, seed: int = 0, **changes
) -> Path:
    """A random model with its tokenizer, saved as any checkpoint is."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        **changes,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # wider than a fresh model, so that the teacher has opinions
            if not name.endswith(("A_log", "dt_bias")):  # with these, Mamba forgets at once
                parameter.mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(path: Path, count: int = 96) -> Path:
    """``rows(count)`` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path


def make_corpus(prefix: Path, documents, code: int = 8) -> None:
    """A corpus as Megatron writes it: here every document is of two sequences."""
    dtype = {4: np.int32, 8: np.uint16}[code]
    parts = [part for document in documents for part in (document[:1], document[1:])]
    sizes = np.array([len(part) for part in parts], np.int32)
    offsets = np.concatenate(([0], np.cumsum(sizes[:-1], dtype=np.int64))) * np.dtype(dtype).itemsize
    boundaries = np.arange(0, len(parts) + 1, 2, dtype=np.int64)
    prefix.with_suffix(".bin").write_bytes(np.concatenate(parts).astype(dtype).tobytes())
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(parts), len(boundaries))
        + sizes.tobytes() + offsets.astype(np.int64).tobytes() + boundaries.tobytes()
    )  # fmt: skip
