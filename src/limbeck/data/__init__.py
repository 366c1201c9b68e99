"""Reads data files and makes the batches of every training step.

``tokenize_files`` reads, checks and tokenises. ``BatchStream`` makes training steps of the result, ``PrefetchedStream`` makes
them in a thread ahead of time, and ``fixed_batches`` makes validation batches. Names are imported on first use, so that a
process that only tokenises does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck.data.alignment import Translator
    from limbeck.data.batch import Batch, StepBatch, StepCounts, TeacherTokens
    from limbeck.data.encode import TokenizeSettings, make_encoder
    from limbeck.data.examples import DataReport, Examples
    from limbeck.data.masks import IGNORE
    from limbeck.data.mixture import Mixture, MixtureSettings, mix
    from limbeck.data.prefetch import PrefetchedStream
    from limbeck.data.sources import Source
    from limbeck.data.stream import BatchStream, fixed_batches
    from limbeck.data.tokenize import tokenize_files, tokenize_rows
    from limbeck.data.tokenizers import check_same_tokenizer

_HOMES = {
    "IGNORE": "masks",
    "Batch": "batch",
    "BatchStream": "stream",
    "StreamSettings": "stream",
    "DataReport": "examples",
    "Examples": "examples",
    "StepBatch": "batch",
    "StepCounts": "batch",
    "Mixture": "mixture",
    "MixtureSettings": "mixture",
    "PrefetchedStream": "prefetch",
    "Source": "sources",
    "TeacherTokens": "batch",
    "TokenizeSettings": "encode",
    "Translator": "alignment",
    "check_same_tokenizer": "tokenizers",
    "fixed_batches": "stream",
    "make_encoder": "encode",
    "mix": "mixture",
    "tokenize_files": "tokenize",
    "tokenize_rows": "tokenize",
}

__all__ = [
    "IGNORE",
    "Batch",
    "BatchStream",
    "DataReport",
    "Examples",
    "Mixture",
    "MixtureSettings",
    "PrefetchedStream",
    "Source",
    "StepBatch",
    "StepCounts",
    "StreamSettings",
    "TeacherTokens",
    "TokenizeSettings",
    "Translator",
    "check_same_tokenizer",
    "fixed_batches",
    "make_encoder",
    "mix",
    "tokenize_files",
    "tokenize_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'limbeck.data' has no attribute {name!r}")
    return getattr(import_module(f"limbeck.data.{_HOMES[name]}"), name)
