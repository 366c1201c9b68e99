"""From what a configuration names to the rows in it, each with the place it came from.

A source yields rows as they stand in the file. What their keys mean is decided in ``rows``.
"""

from limbeck.data.sources.find import Input, Source, expand, inputs_of
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
    "decoded",
    "expand",
    "inputs_of",
    "place",
]
