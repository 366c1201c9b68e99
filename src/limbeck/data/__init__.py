"""From files of questions and answers to the batches of every training step.

``tokenize_files`` reads, checks and tokenises; ``BatchStream`` turns the result into steps; ``fixed_batches`` into
validation batches. Models and teachers are not known here.
"""

from limbeck.data.alignment import Translator
from limbeck.data.batch import IGNORE, Batch, GlobalBatch, Translation
from limbeck.data.stream import BatchStream, fixed_batches
from limbeck.data.tokenize import DataReport, Examples, tokenize_files, tokenize_rows
from limbeck.data.tokenizers import check_same_tokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "BatchStream",
    "DataReport",
    "Examples",
    "GlobalBatch",
    "Translation",
    "Translator",
    "check_same_tokenizer",
    "fixed_batches",
    "tokenize_files",
    "tokenize_rows",
]
