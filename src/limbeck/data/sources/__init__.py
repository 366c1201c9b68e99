"""Reads rows from the files and datasets of a configuration, each with its location.

Rows are yielded as they are in the file; ``rows`` interprets their keys.
"""

from limbeck.data.sources.columns import with_columns
from limbeck.data.sources.find import Input, Source, corpora_of, expand, inputs_of
from limbeck.data.sources.items import MAX_ROW, BadRow, Document, Item, Line, Record, RowError, decoded, place

__all__ = [
    "MAX_ROW",
    "BadRow",
    "Document",
    "Input",
    "Item",
    "Line",
    "Record",
    "RowError",
    "Source",
    "corpora_of",
    "decoded",
    "expand",
    "inputs_of",
    "place",
    "with_columns",
]
