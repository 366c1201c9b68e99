"""Feature losses equal their written-out definitions, whatever the mask, the weights, the split or the precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.config.schema import FEATURE_LOSSES
from limbeck.errors import LimbeckError
from limbeck.objectives import FeatureLosses, feature_loss, features, modelopt_balance
from limbeck.objectives.features import LOSSES

DEFINITIONS = {
    "cosine": lambda s, t: 1 - torch.nn.functional.cosine_similarity(s, t, dim=-1),
    "mse": lambda s, t: ((s - t) ** 2).mean(-1),
    "l1": lambda s, t: (s - t).abs().mean(-1),
    "smooth_l1": lambda s, t: torch.nn.functional.smooth_l1_loss(s, t, reduction="none").mean(-1),
}


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_configuration_knows_the_same_losses():
    assert tuple(LOSSES) == FEATURE_LOSSES == tuple(DEFINITIONS)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 9),
    widths=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    weighted=st.booleans(),
    tile=st.sampled_from([1, 10, 1 << 18]),
    scale=st.sampled_from([0.5, 3.0]),
)
def test_value_and_every_gradient_equal_autograd(name, seed, rows, widths, weighted, tile, scale):
    s, t = randn(seed, rows, widths[0]).requires_grad_(), randn(seed + 1, rows, widths[1]).requires_grad_()
    weights = randn(seed + 2, rows).abs() if weighted else None
    pair = FeatureLosses([name], [widths], seed=seed).double()
    linear = pair.projections[0] if widths[0] != widths[1] else None
    leaves = [s, t, *pair.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(features._TILE_ELEMENTS, "cpu", tile)
        ours = scale * pair([s], [t], 5.0, weights).sum()
    each = DEFINITIONS[name](s if linear is None else s @ linear.weight.T + linear.bias, t)
    expected = scale * (each if weights is None else each * weights).sum() / 5
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_features_cost_nothing_and_pull_nowhere(name):
    s = randn(0, 4, 6).requires_grad_()
    loss = feature_loss(name, s, s.detach().clone())
    (gradient,) = torch.autograd.grad(loss, s)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max().item() == pytest.approx(0, abs=1e-12)


def test_a_vector_without_direction_pulls_nowhere():
    s = torch.zeros(2, 3, requires_grad=True)
    loss = feature_loss("cosine", s, torch.ones(2, 3))
    assert loss.item() == 2
    assert torch.autograd.grad(loss, s)[0].eq(0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(name, dtype):
    s, t = randn(0, 50, 64).to(dtype).requires_grad_(), randn(1, 50, 64).to(dtype)
    exact = s.detach().double().requires_grad_()
    loss, expected = feature_loss(name, s, t), DEFINITIONS[name](exact, t.double()).sum()
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (ours,), (theirs,) = torch.autograd.grad(loss, s), torch.autograd.grad(expected, exact)
    assert ours.dtype is dtype
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-2, atol=1e-6)


def test_parts_of_the_rows_add_up_to_all_of_them():
    pairs = FeatureLosses(["cosine", "mse"], [(3, 5), (4, 4)]).double()
    s, t = [randn(0, 8, 3), randn(1, 8, 4)], [randn(2, 8, 5), randn(3, 8, 4)]
    whole = pairs(s, t, 8.0)
    parts = pairs([x[:3] for x in s], [x[:3] for x in t], 8.0) + pairs([x[3:] for x in s], [x[3:] for x in t], 8.0)
    torch.testing.assert_close(parts, whole)


def test_only_different_widths_are_projected():
    widths = [(4, 4), (4, 6), (4, 6)]
    assert len(FeatureLosses(["mse"] * 3, widths).projections) == 2
    assert len(FeatureLosses(["mse"] * 3, widths, shared=True).projections) == 1
    assert not list(FeatureLosses(["mse"], [(4, 4)], shared=True).parameters())
    with pytest.raises(LimbeckError, match="use per_pair"):
        FeatureLosses(["mse"] * 2, [(4, 6), (4, 8)], shared=True)


def test_projections_are_a_function_of_the_seed():
    one, same, other = (FeatureLosses(["mse"], [(4, 6)], seed=seed).projections[0].weight for seed in (1, 1, 2))
    assert one.equal(same)
    assert not one.equal(other)


@pytest.mark.parametrize("shapes", [((2, 3), (3, 3)), ((2, 3), (2, 4)), ((2, 2, 3), (2, 2, 3))])
def test_rows_that_do_not_match_are_refused(shapes):
    with pytest.raises(LimbeckError, match="cannot be compared"):
        feature_loss("mse", *(torch.ones(shape) for shape in shapes))
    with pytest.raises(LimbeckError, match="not a feature loss"):
        feature_loss("mae", torch.ones(1, 1), torch.ones(1, 1))


def leaf(value):
    return torch.tensor(float(value), requires_grad=True)


def test_modelopt_scales_the_features_to_the_divergence():
    kd, pairs = leaf(3), torch.tensor([2.0, 4.0], requires_grad=True)
    total = modelopt_balance(kd, pairs, None, 1.0)
    assert total.item() == 6  # kd + mean · kd / mean
    d_kd, d_features = torch.autograd.grad(total, [kd, pairs])
    assert d_kd.item() == 1
    assert d_features.tolist() == [0.5, 0.5]  # (kd / mean) / 2


def test_modelopt_scales_the_distillation_to_the_cross_entropy():
    kd, pairs, ce = leaf(3), torch.tensor([3.0], requires_grad=True), leaf(12)
    total = modelopt_balance(kd, pairs, ce, 10.0)
    assert total.item() == 12 * 11
    d_kd, d_features, d_ce = torch.autograd.grad(total, [kd, pairs, ce])
    assert (d_kd.item(), d_features.item(), d_ce.item()) == (20, 20, 1)  # 10 · 12 / 6


def test_modelopt_leaves_out_ratios_of_nothing():
    assert modelopt_balance(leaf(0), torch.tensor([2.0]), leaf(5), 3.0).item() == 5
    assert modelopt_balance(leaf(2), torch.tensor([0.0]), None, 3.0).item() == 2
    assert modelopt_balance(leaf(2), torch.zeros(0), leaf(0), 3.0).item() == 6


@pytest.mark.parametrize("indices", [[0], [1, 2], [2, 0], [0, 1, 2]])
def test_the_losses_of_some_pairs_are_those_of_all(indices):
    every = FeatureLosses(["mse", "cosine", "l1"], [(4, 6), (4, 4), (4, 6)])
    student, teacher = [torch.randn(5, 4) for _ in range(3)], [torch.randn(5, width) for width in (6, 4, 6)]
    some = every.only(indices)
    losses = some([student[i] for i in indices], [teacher[i] for i in indices], 5)
    torch.testing.assert_close(losses, every(student, teacher, 5)[indices], rtol=0, atol=0)
    held = dict(some.named_parameters())
    assert held.items() <= dict(every.named_parameters()).items()
    assert len(held) == 2 * sum(i != 1 for i in indices)
