"""Aligned products on a CPU, which does not need them: what a GPU computes, in float64."""

from unittest.mock import patch

from limbeck.objectives import aligned_head


def aligned_to(multiple):
    """A context in which products with an output head have a width that is a multiple of ``multiple``."""
    return patch.dict(aligned_head._MULTIPLE, cpu=multiple)
