"""A step source: a curriculum that takes short rows first. Use it with ``step_source: shortest_first``."""

from dataclasses import replace

import numpy as np

from limbeck.registry import STEP_SOURCES
from limbeck.train.step_source import DatasetSource


class ShortestFirst(DatasetSource):
    """A ``DatasetSource`` in another order; to make steps differently, write the methods of ``StepSource`` yourself."""

    def __init__(self, config, world, data):
        order = np.argsort(data.examples.lengths, kind="stable")
        settings = replace(data.stream_settings, shuffle=False, rows_of_epoch=lambda epoch: order)
        super().__init__(config, world, replace(data, stream_settings=settings))


STEP_SOURCES.register("shortest_first")(ShortestFirst)
