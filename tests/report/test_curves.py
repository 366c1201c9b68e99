import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from limbeck.report.curves import Curve, averages, extremes

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400).map(np.array)


def curve(values):
    return Curve("x", np.arange(1.0, len(values) + 1), values)


@given(values=VALUES, limit=st.integers(2, 50))
def test_extremes_are_few_points_of_the_curve_in_order_with_its_lowest_and_highest(values, limit):
    whole = curve(values)
    short = extremes(whole, limit)
    assert len(short) <= max(limit, 2)
    assert (np.diff(short.steps) > 0).all()
    assert (short.values == values[short.steps.astype(int) - 1]).all()
    assert short.values.min() == values.min()
    assert short.values.max() == values.max()


@given(values=VALUES, limit=st.integers(1, 50))
def test_averages_stay_within_the_curve_and_keep_the_mean_of_equal_stretches(values, limit):
    short = averages(curve(values), limit)
    assert len(short) == min(len(values), limit)
    assert values.min() - 1e-6 <= short.values.min() <= short.values.max() <= values.max() + 1e-6
    if len(values) % len(short) == 0:
        np.testing.assert_allclose(short.values.mean(), values.mean(), rtol=1e-9, atol=1e-6)


def test_a_short_curve_is_left_alone():
    short = curve(np.arange(100.0))
    assert extremes(short) is short
    assert averages(short) is short
