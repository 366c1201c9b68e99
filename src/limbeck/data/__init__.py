"""From files of questions and answers to the batches of every training step.

``tokenize_files`` reads, checks and tokenises; ``BatchStream`` turns the result into steps, which ``PrefetchedStream``
makes ahead of their time; ``fixed_batches`` into validation batches. Models and teachers are not known here.
"""

from limbeck.data.alignment import Translator
from limbeck.data.batch import IGNORE, Batch, GlobalBatch, Translation
from limbeck.data.encode import TokenizeSettings
from limbeck.data.examples import DataReport, Examples
from limbeck.data.mixture import Mixture, MixtureSettings, mix
from limbeck.data.prefetch import PrefetchedStream
from limbeck.data.sources import Source
from limbeck.data.stream import BatchStream, fixed_batches
from limbeck.data.tokenize import tokenize_files, tokenize_rows
from limbeck.data.tokenizers import check_same_tokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "BatchStream",
    "DataReport",
    "Examples",
    "GlobalBatch",
    "Mixture",
    "MixtureSettings",
    "PrefetchedStream",
    "Source",
    "TokenizeSettings",
    "Translation",
    "Translator",
    "check_same_tokenizer",
    "fixed_batches",
    "mix",
    "tokenize_files",
    "tokenize_rows",
]
