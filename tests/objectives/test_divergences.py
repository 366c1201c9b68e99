"""The closed forms against published values, the definitions and their limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import LimbeckError
from limbeck.objectives import divergence, names

torch.manual_seed(0)
P = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
Q = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log()


def definition(name: str, p: torch.Tensor, q: torch.Tensor, **given: object) -> torch.Tensor:
    """The textbook formula in plain differentiable float64, written without the registered weight."""
    kl = lambda a, b: (a * (a.log() - b.log())).sum(-1)  # noqa: E731
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "js_divergence":
        beta = given.get("beta", 0.5)
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if name in ("skewed_forward_kl", "skewed_reverse_kl"):
        skew = given.get("skew", 0.1)
        one, other = (p, q) if name == "skewed_forward_kl" else (q, p)
        return kl(one, skew * one + (1 - skew) * other)
    if name == "cross_entropy":
        return -(p * q.log()).sum(-1)
    if name == "mixed_kl":
        forward = given.get("forward", 0.5)
        return forward * kl(p, q) + (1 - forward) * kl(q, p)
    if name == "symmetric_kl":
        return kl(p, q) + kl(q, p)
    if name == "tvd":
        return 0.5 * (p - q).abs().sum(-1)
    if name == "alpha_beta":
        a, b = given.get("alpha", 0.5), given.get("beta", 0.5)
        if b == 0:  # the limits of Cichocki et al., equation 20
            return (p**a * (p**a / q**a).log() - p**a + q**a).sum(-1) / a**2
        if a == 0:
            return (q**b * (q**b / p**b).log() - q**b + p**b).sum(-1) / b**2
        return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)
    if name == "taid":
        t = given.get("t", 0.4)
        return kl(((1 - t) * q.detach().log() + t * p.log()).softmax(-1), q)
    assert name == "adaptive_kl"
    paper, alpha = given.get("head") == "paper", given.get("alpha", 0.5)
    ordered, order = p.sort(-1, descending=paper)
    within = ordered.cumsum(-1) <= alpha
    if paper:
        within[..., 0] = True
    gap = (p - q).detach().abs()
    share = (gap.gather(-1, order) * within).sum(-1) / gap.sum(-1)
    tail = 1 - share if paper else share
    return (1 - tail) * kl(p, q) + tail * kl(q, p)


@pytest.mark.parametrize(
    ("name", "parameters", "value"),
    [
        ("forward_kl", {}, 0.3960584572),
        ("reverse_kl", {}, 0.3652740407),
        ("js_divergence", {"beta": 0.1}, 0.0347612335),
        ("js_divergence", {"beta": 0.25}, 0.0703677031),
        ("js_divergence", {"beta": 0.5}, 0.0911207985),
        ("js_divergence", {"beta": 0.75}, 0.0677067844),
        ("js_divergence", {"beta": 0.9}, 0.0326324985),
        ("skewed_forward_kl", {"skew": 0.1}, 0.3058114086),
        ("skewed_forward_kl", {"skew": 0.5}, 0.0876597251),
        ("skewed_forward_kl", {"skew": 0.9}, 0.0038020109),
        ("skewed_reverse_kl", {"skew": 0.1}, 0.2921068874),
        ("skewed_reverse_kl", {"skew": 0.5}, 0.0945818720),
        ("skewed_reverse_kl", {"skew": 0.9}, 0.0046445473),
        ("tvd", {}, 0.4),
        ("alpha_beta", {"alpha": 0.5, "beta": 0.5}, 0.3723456924),
        ("alpha_beta", {"alpha": 0.2, "beta": 0.7}, 0.4148016059),
        ("alpha_beta", {"alpha": 1.0, "beta": 1.0}, 0.12),
        ("alpha_beta", {"alpha": 1.0, "beta": 0.0}, 0.3960584572),
        ("alpha_beta", {"alpha": 0.0, "beta": 1.0}, 0.3652740407),
        ("cross_entropy", {}, 0.3960584572 + 0.8979457249),  # KL and the teacher's entropy
        ("mixed_kl", {"forward": 0.75}, 0.75 * 0.3960584572 + 0.25 * 0.3652740407),
        ("mixed_kl", {"forward": 1.0}, 0.3960584572),
        ("mixed_kl", {"forward": 0.0}, 0.3652740407),
        ("symmetric_kl", {}, 0.3960584572 + 0.3652740407),
        ("taid", {"t": 0.4}, 0.0579535589),
    ],
)
def test_closed_forms_meet_the_golden_values(name, parameters, value):
    assert divergence(name, **parameters)(Q, P).item() == pytest.approx(value, abs=1e-9)


def test_a_smoothed_jensen_shannon_is_rolls():
    student, teacher = (torch.randn(4, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    q, p = student.softmax(-1), teacher.detach().softmax(-1)
    log_m = ((p + q) / 2 + 1e-2).log()
    expected = 0.5 * (p * ((p + 1e-2).log() - log_m)).sum(-1) + 0.5 * (q * ((q + 1e-2).log() - log_m)).sum(-1)
    found = divergence("js_divergence", smoothing=1e-2)(student, teacher)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    ours, plain = (torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (found, expected))
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-13)


def test_adaptive_kl_meets_its_golden_value():
    p, q = (torch.tensor([x], dtype=torch.float64).log() for x in ((0.4, 0.3, 0.2, 0.1), (0.1, 0.25, 0.35, 0.3)))
    assert divergence("forward_kl")(q, p).item() == pytest.approx(0.3874298250, abs=1e-9)
    assert divergence("reverse_kl")(q, p).item() == pytest.approx(0.3412393871, abs=1e-9)
    assert divergence("adaptive_kl", alpha=0.5)(q, p).item() == pytest.approx(0.3643346060, abs=1e-9)
    assert divergence("adaptive_kl", alpha=0.5, head="paper")(q, p).item() == pytest.approx(0.3610352891, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "gradient"),
    [
        ("forward_kl", (-0.4, 0.2, 0.2)),
        ("reverse_kl", (-0.2927772659, 0.0727757915, 0.2200014744)),
        ("js_divergence", (-0.0787729053, 0.0321404198, 0.0466324856)),
        ("tvd", (-0.16, 0.10, 0.06)),
    ],
)
def test_gradients_meet_the_golden_values(name, gradient):
    student = Q.clone().requires_grad_()
    divergence(name)(student, P).sum().backward()
    assert student.grad[0].tolist() == pytest.approx(gradient, abs=1e-9)


def test_temperature_divides_both_unless_the_teachers_is_given():
    teacher, student = (torch.tensor([x], dtype=torch.float64) for x in ((2.0, 0, 0), (0, 1.0, 0)))
    kl = divergence("forward_kl")
    assert kl(student, teacher).item() == pytest.approx(0.7793650531, abs=1e-9)
    assert kl(student, teacher, 2.0).item() == pytest.approx(0.2130781614, abs=1e-9)
    assert kl(student, teacher, 2.0, 1.0).item() == pytest.approx(kl(student / 2, teacher).item(), abs=1e-12)


@pytest.mark.parametrize("name", names())
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 40), temperature=st.floats(0.3, 4.0))
def test_value_and_gradient_equal_autograd_of_the_definition(name, seed, vocab, temperature):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(3, vocab, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    ours, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    value = divergence(name)(ours, teacher, temperature)
    expected = definition(name, (teacher / temperature).softmax(-1), (plain / temperature).softmax(-1))
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *(("js_divergence", {"beta": beta}) for beta in (0.1, 0.7)),
        *((f"skewed_{side}_kl", {"skew": skew}) for side in ("forward", "reverse") for skew in (0.0, 0.4, 0.95)),
        *(("mixed_kl", {"forward": forward}) for forward in (0.0, 0.3, 1.0)),
        *(
            ("alpha_beta", {"alpha": a, "beta": b})
            for a, b in ((0.2, 0.7), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.4, 0.0), (0.0, 0.3), (2.0, 0.5))
        ),
        *(("taid", {"t": t}) for t in (0.0, 0.7, 1.0)),
        *(("adaptive_kl", {"alpha": alpha, "head": head}) for alpha in (0.0, 0.2, 0.9) for head in ("roll", "paper")),
    ],
)
def test_parameters_mean_what_the_definition_says(name, parameters):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(20, 9, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    ours, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    value = divergence(name, **parameters)(ours, teacher, 1.5)
    expected = definition(name, (teacher / 1.5).softmax(-1), (plain / 1.5).softmax(-1), **parameters)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-8, atol=1e-11)


def test_a_token_that_just_reaches_alpha_is_within_it():
    """Powers of two, so that sums are exact: the gaps are a quarter and twice an eighth."""
    p, q = (torch.tensor([x], dtype=torch.float64) for x in ((0.5, 0.25, 0.25), (0.25, 0.375, 0.375)))
    forward, reverse = ((a * (a / b).log()).sum().item() for a, b in ((p, q), (q, p)))
    for head, alpha, tail in (("roll", 0.5, 0.5), ("paper", 0.75, 0.25)):
        value = divergence("adaptive_kl", alpha=alpha, head=head)(q.log(), p.log()).item()
        assert value == pytest.approx((1 - tail) * forward + tail * reverse, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("js_divergence", {"beta": 1.1}), ("skewed_forward_kl", {"skew": 1.0}), ("skewed_reverse_kl", {"skew": -0.1}),
        ("mixed_kl", {"forward": 2}), ("alpha_beta", {"alpha": 0, "beta": 0}), ("alpha_beta", {"alpha": -1}),
        ("taid", {"t": 1.5}), ("adaptive_kl", {"alpha": 2}), ("adaptive_kl", {"head": "tail"}), ("tvd", {"beta": 1}),
    ],
)  # fmt: skip
def test_impossible_parameters_are_refused_with_the_divergences_name(name, parameters):
    with pytest.raises(LimbeckError, match=name):
        divergence(name, **parameters)


BOUNDS = {
    "js_divergence": math.log(2),
    "tvd": 1.0,
    "skewed_forward_kl": math.log(10),
    "skewed_reverse_kl": math.log(10),
}


@pytest.mark.parametrize("name", names())
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 40), spread=st.sampled_from([0.1, 3.0, 60.0]))
def test_values_are_never_negative_and_bounded_where_the_definition_is(name, seed, vocab, spread):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(5, vocab, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    value = divergence(name)(student, teacher)
    assert (value >= -1e-12).all()
    assert (value <= BOUNDS.get(name, math.inf) + 1e-12).all()


@pytest.mark.parametrize("name", names())
def test_equal_distributions_cost_nothing_and_pull_nowhere(name):
    logits = torch.randn(5, 17, dtype=torch.float64, requires_grad=True)
    value = divergence(name)(logits, logits.detach().clone())
    value.sum().backward()
    if name != "cross_entropy":  # which is the teacher's entropy there
        assert value.abs().max() < 1e-12
    assert logits.grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", names())
def test_impossible_and_vanishing_tokens_stay_finite(name):
    student = torch.tensor([[0.0, -400.0, 1.0, -math.inf]], requires_grad=True)
    teacher = torch.tensor([[0.0, -300.0, -1.0, -math.inf]])
    value = divergence(name)(student, teacher)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", names())
def test_padding_columns_of_the_wider_head_do_not_exist(name):
    student, teacher = torch.randn(4, 9), torch.randn(4, 12)
    torch.testing.assert_close(divergence(name)(student, teacher), divergence(name)(student, teacher[:, :9]))


def test_jensen_shannon_tends_to_the_two_kls():
    forward, reverse = divergence("forward_kl")(Q, P).item(), divergence("reverse_kl")(Q, P).item()
    assert divergence("js_divergence", beta=1e-4)(Q, P).item() / 1e-4 == pytest.approx(0.396007793, abs=1e-9)
    assert divergence("js_divergence", beta=1 - 1e-4)(Q, P).item() / 1e-4 == pytest.approx(0.365234042, abs=2e-9)
    assert divergence("js_divergence", beta=1e-6)(Q, P).item() / 1e-6 == pytest.approx(forward, rel=1e-4)
    assert divergence("js_divergence", beta=1 - 1e-6)(Q, P).item() / 1e-6 == pytest.approx(reverse, rel=1e-4)
    assert divergence("js_divergence", beta=0.0)(Q, P).item() == forward
    assert divergence("js_divergence", beta=1.0)(Q, P).item() == reverse


def test_an_unknown_divergence_is_named_with_the_known_ones():
    with pytest.raises(LimbeckError, match=r"no divergence called 'kl'.*forward_kl"):
        divergence("kl")
