"""What a caller may get wrong, or ask at the edge: a sentence or the right number, never another objective."""

import inspect

import pytest
import torch

from limbeck import divergence, fused_linear_distillation
from limbeck.config.schema.objective import OBJECTIVE_KEYS, OBJECTIVE_KWARGS, OBJECTIVES
from limbeck.errors import LimbeckError
from limbeck.objectives import Logits, Objective, OutputHead, Sampled, TopK, compute_topk, divergences, feature_loss
from limbeck.objectives.taid import TaidSchedule


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(divergences, "_REGISTRY", dict(divergences._REGISTRY))


@pytest.mark.parametrize("name", ["forward_kl", "k2"])
def test_a_name_that_is_taken_is_refused(registry, name):
    def mine():
        return lambda p, q, log_p, log_q: (p * 0, p * 0)

    mine.__name__ = name
    with pytest.raises(LimbeckError, match=f"a divergence called {name} is there already"):
        divergences.register(mine)


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        (lambda p, q, log_p, log_q: (p.sum(-1), p), r"gives \(3,\) and \(3, 4\) for \[3, 4\]"),
        (lambda p, q, log_p, log_q: p, "must return a function of p, q, log_p and"),
        (lambda p, q: (p, q), "must return a function of p, q, log_p and"),
        (None, "must return a function of p, q, log_p and"),
    ],
)
def test_formulas_that_are_none_are_refused_before_they_are_used(registry, terms, sentence):
    def mine():
        return terms

    divergences.register(mine)
    with pytest.raises(LimbeckError, match=sentence):
        divergence("mine")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_closed_form_of_half_precision_is_that_of_its_numbers_in_float64(name, dtype):
    s, t = torch.randn(5, 300).mul(3).to(dtype).requires_grad_(), torch.randn(5, 310).mul(3).to(dtype)
    exact = s.detach().double().requires_grad_()
    mine, right = divergence(name)(s, t), divergence(name)(exact, t.double())
    torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-5)
    mine.sum().backward()
    right.sum().backward()
    assert s.grad.dtype == dtype
    torch.testing.assert_close(s.grad.double(), exact.grad, rtol=1e-2, atol=1e-5)


def test_a_second_derivative_is_refused():
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8)
    labels = torch.randint(0, 20, (4,))
    fused = fused_linear_distillation(hidden, head, torch.randn(4, 8), torch.randn(20, 8), labels, chunk_size=2).loss
    for loss in (fused, divergence("forward_kl")(hidden @ head.T, torch.randn(4, 20)).sum()):
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
            torch.autograd.grad(gradient.square().sum(), hidden)


HEAD, WIDE = torch.zeros(20, 8), torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TopK(torch.zeros(4, 3), torch.zeros(4, 2, dtype=torch.long)), r"indices \[N, k\] .*got \[4, 3\] and \[4, 2\]"),
        (lambda: TopK(torch.zeros(4, 3), torch.zeros(4, 3)), r"whole numbers.*torch.float32"),
        (lambda: Sampled(torch.zeros(4, 1)), r"Sampled takes log_probs \[N\], got \[4, 1\]"),
        (lambda: Logits(torch.zeros(4)), r"Logits takes logits \[N, V\], got \[4\]"),
        (lambda: OutputHead(HEAD, softcap=0.0), "softcap must be above 0, or None"),
        (lambda: OutputHead(HEAD, torch.zeros(19)), r"bias is \[V\].*got \[19\] beside \[20, 8\]"),
        (lambda: _loss(labels=torch.zeros(4)), r"labels must be token numbers \(torch.int64\), got torch.float32"),
        (lambda: _loss(labels=torch.full((4,), 20)), "labels must be tokens .* 0 to 19, or -100 .*; got 20"),
        (lambda: _loss(weights=torch.ones(4, 1)), r"weights must be \[N\], got \[4, 1\]"),
        (lambda: _loss(teacher_hidden=torch.zeros(4, 2, 8)), r"teacher_hidden must be \[N, H\], got \[4, 2, 8\]"),
        (
            lambda: _loss(teacher=TopK(torch.zeros(4, 1), torch.full((4, 1), 20)), teacher_hidden=None, teacher_head=None),
            "top-k indices must be tokens of the shared vocabulary, 0 to 19; got 20",
        ),
        (lambda: _top([[0, 0]], [[-1.0, -1.0]]), "names a token twice at one position"),
        (lambda: _top([[0, 1]], [[3.0, 2.0]]), "sum to a probability above 1; give log_softmax"),
        (lambda: _top([[0, 1]], [[-1.0, -2.0]], topk=1), "topk=1 contradicts the teacher's 2 tokens"),
        (lambda: Objective.of(kd_weight="0.5"), "kd_weight must be a number, got '0.5'"),
        (lambda: _loss(teacher_head=torch.nn.Linear(8, 20)), "teacher_head must be .*got Linear; of a layer"),
        (lambda: compute_topk(WIDE, OutputHead(HEAD), 0), "compute_topk needs k of 1 or more"),
        (lambda: compute_topk(WIDE, OutputHead(HEAD), 2, vocab_size=21), "not between 1 and the 20 rows"),
        (lambda: _loss(normalizer=0), "normalizer must be above 0, got 0"),
        (lambda: divergence("forward_kl")(torch.zeros(3, 4), torch.zeros(1, 4)), "logits of the same positions"),
        (lambda: divergence("alpha_beta", alpha=1.0, beta=1e-4), "loses its digits with an exponent below 0.01"),
        (lambda: feature_loss("mse", torch.zeros(4, 3), torch.zeros(4, 3), torch.ones(4, 1)), r"must be \[4\], got"),
    ],
)  # fmt: skip
def test_shapes_and_numbers_that_do_not_belong_together_are_refused(make, sentence):
    with pytest.raises(LimbeckError, match=sentence):
        make()


def _loss(*, labels=None, teacher_hidden=WIDE, teacher_head=HEAD, **more):
    labels = torch.zeros(4, dtype=torch.long) if labels is None else labels
    return fused_linear_distillation(WIDE, HEAD, teacher_hidden, teacher_head, labels, **more)


def _top(indices, log_probs, topk=0):
    signal = TopK(torch.tensor(log_probs * 4), torch.tensor(indices * 4))
    return _loss(teacher_hidden=None, teacher_head=None, teacher=signal, objective=Objective.of(topk=topk))


def test_a_teacher_that_weighs_nothing_pulls_on_nothing():
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8)
    labels, broken = torch.randint(0, 20, (4,)), torch.full((4, 8), torch.nan)
    with_it = fused_linear_distillation(hidden, head, broken, head, labels, kd_weight=0.0).loss
    without = fused_linear_distillation(hidden, head, None, None, labels, kd_weight=0.0).loss
    torch.testing.assert_close(with_it, without)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in (with_it, without)))


def test_small_weights_in_half_precision_lose_nothing():
    s, t = torch.randn(200, 16), torch.randn(200, 16)
    heads, labels = torch.randn(2, 500, 16), torch.randint(0, 500, (200,))
    exact = heads[0].half().double().requires_grad_()
    fused_linear_distillation(
        s.half().double(), exact, t.half().double(), heads[1].half().double(), labels
    ).loss.backward()
    mine = heads[0].half().requires_grad_()
    arguments = (s.half(), mine, t.half(), heads[1].half(), labels)
    (fused_linear_distillation(*arguments, weights=torch.full((200,), 1e-6)).loss * 1024).backward()
    assert (mine.grad.double() / 1024 - exact.grad).norm() < 3e-3 * exact.grad.norm()
    ones = torch.ones(1001, dtype=torch.bfloat16)
    out = fused_linear_distillation(
        torch.zeros(1001, 8), HEAD, None, None, torch.zeros(1001).long(), kd_weight=0.0, weights=ones
    )
    torch.testing.assert_close(out.loss, torch.tensor(20.0).log())


def test_the_slope_of_a_cosine_in_half_precision_keeps_its_digits():
    s, t, weights = 30 * torch.randn(6, 4096), torch.randn(6, 4096), torch.full((6,), 1e-3)
    grads = []
    for dtype in (torch.float16, torch.float64):
        one = s.half().to(dtype).requires_grad_()
        (feature_loss("cosine", one, t.half().to(dtype), weights) * 2.0**16).backward()
        grads.append(one.grad.double())
    assert (grads[0] - grads[1]).norm() < 3e-3 * grads[1].norm()


@pytest.mark.parametrize("tail", ["renormalize", "zero"])
def test_the_mass_of_a_stored_signal_is_that_at_its_own_temperature(tail):
    log_probs, indices = torch.randn(6, 30).log_softmax(-1).topk(4, -1)
    objective = Objective.of("forward_kl", kd_weight=1.0, temperature=2.0, teacher_temperature=2.0, tail=tail)
    out = fused_linear_distillation(
        torch.randn(6, 8), torch.randn(30, 8), None, None, torch.randint(0, 30, (6,)),
        teacher=TopK(log_probs, indices), objective=objective,
    )  # fmt: skip
    torch.testing.assert_close(out.topk_mass, log_probs.exp().sum(-1).mean())


def test_the_configuration_knows_what_each_divergence_takes():
    for name in OBJECTIVES:
        make = TaidSchedule.__init__ if name == "taid" else divergences._REGISTRY[name]
        own = {"adaptive_kl_alpha": "alpha", "skew_lambda": "skew", "js_beta": "beta"}
        taken = {own[key] for key, names in OBJECTIVE_KEYS.items() if name in names}
        parameters = set(inspect.signature(make).parameters) - {"self", "device"} - taken
        assert parameters == set(OBJECTIVE_KWARGS.get(name, ())), name
