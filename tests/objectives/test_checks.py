"""Invalid arguments raise a LimbeckError that names them, and edge cases have the right value."""

import inspect

import pytest
import torch

from limbeck import divergence, fused_linear_distillation
from limbeck.config.schema.objective import OBJECTIVE_KEYS, OBJECTIVE_KWARGS, OBJECTIVES
from limbeck.errors import LimbeckError
from limbeck.objectives import (
    FeatureLosses,
    Logits,
    Objective,
    OutputHead,
    Sampled,
    TopK,
    compute_topk,
    divergences,
    feature_loss,
)
from limbeck.objectives.taid import TaidSchedule
from limbeck.registry import DIVERGENCES


@pytest.mark.parametrize("name", ["forward_kl", "k2"])
def test_a_name_that_is_taken_is_refused(name):
    def mine():
        return lambda p, q, log_p, log_q: (p * 0, p * 0)

    mine.__name__ = name
    with pytest.raises(LimbeckError, match=name):
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
def test_functions_that_are_not_a_divergence_are_refused_before_they_are_used(terms, sentence):
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
    """``once_differentiable`` would return a gradient without a graph here, so that second-order terms vanish from a sum."""
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8)
    labels = torch.randint(0, 20, (4,))
    fused = fused_linear_distillation(hidden, head, torch.randn(4, 8), torch.randn(20, 8), labels, chunk_size=2).loss
    closed = divergence("forward_kl")(hidden @ head.T, torch.randn(4, 20)).sum()
    features = feature_loss("mse", hidden, torch.randn(4, 8))
    for loss in (fused, closed, features):
        with pytest.raises(LimbeckError, match="first-order gradients only"):
            torch.autograd.grad(loss, hidden, create_graph=True, retain_graph=True)
        torch.autograd.grad(loss, hidden)


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
        (lambda: _loss(teacher_head=torch.nn.Linear(8, 20)), "teacher_head must be .*got Linear; for a layer"),
        (lambda: compute_topk(WIDE, OutputHead(HEAD), 0), "compute_topk needs k of 1 or more"),
        (lambda: compute_topk(WIDE, OutputHead(HEAD), 2, vocab_size=21), "not between 1 and the 20 rows"),
        (
            lambda: _loss(teacher=Logits(torch.zeros(4, 12)), teacher_hidden=None, teacher_head=None, vocab_size=20),
            "Logits have only 12 columns, and the shared vocabulary has 20 tokens; .*set vocab_size to 12",
        ),
        (lambda: _loss(normalizer=0), "normalizer must be above 0, got 0"),
        (lambda: _loss(normalizer=torch.tensor(-1.0)), "normalizer must not be negative, got -1"),
        (lambda: _loss(normalizer=torch.ones(4)), r"must be one number, got a tensor of shape \[4\]"),
        (lambda: _loss(weights=torch.tensor([1.0, -1.0, -1.0, 0.5])), "weights must sum to more than 0, got -0.5"),
        (lambda: _loss(weights=torch.tensor([1.0, -1.0, 1.0, -1.0])), "weights must sum to more than 0, got 0"),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("zero", [torch.tensor(0), torch.tensor(0.0), torch.tensor(0.0, dtype=torch.bfloat16)])
def test_a_global_batch_without_supervised_tokens_has_no_loss_and_no_gradients(dtype, zero):
    hidden, head = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((4, 8), (20, 8)))
    labels = torch.full((4,), -100)
    out = fused_linear_distillation(hidden, head, hidden.detach(), head.detach(), labels, normalizer=zero)
    out.loss.backward()
    assert all(x.item() == 0 for x in out)
    assert not hidden.grad.any() and not head.grad.any()
    pairs = FeatureLosses(["mse"], [(8, 8)])
    assert pairs([hidden[:0]], [hidden[:0]], zero).item() == 0


def test_weights_of_zero_have_no_loss_and_no_gradients():
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8)
    labels = torch.randint(0, 20, (4,))
    loss = fused_linear_distillation(hidden, head, hidden.detach(), head, labels, weights=torch.zeros(4)).loss
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.int64, torch.float32])
def test_a_normalizer_of_any_dtype_divides_the_gradient_as_its_number_does(kind, dtype):
    """1/7 in bfloat16 has three significant digits."""
    hidden, head = torch.randn(7, 8, dtype=dtype, requires_grad=True), torch.randn(20, 8, dtype=dtype)
    labels, teacher = torch.randint(0, 20, (7,)), torch.randn(7, 8, dtype=dtype)
    grads = [
        torch.autograd.grad(
            fused_linear_distillation(hidden, head, teacher, head, labels, normalizer=normalizer).loss, hidden
        )[0]
        for normalizer in (7, torch.tensor(7, dtype=kind))
    ]
    assert torch.equal(*grads)


INF = torch.inf
INFINITE_WITHOUT_TEACHER = ("reverse_kl", "mixed_kl", "symmetric_kl", "adaptive_kl")
INFINITE_WITHOUT_STUDENT = ("forward_kl", "cross_entropy", "mixed_kl", "symmetric_kl", "adaptive_kl")


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("excluded", ["teacher", "student", "both"])
def test_an_excluded_token_is_ignored_or_refused(name, excluded):
    """A token of probability 0 on both sides contributes nothing. On one side the divergence is finite or infinite."""
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(3, 6, generator=g, dtype=torch.float64) for _ in range(2))
    bias = torch.zeros(6, dtype=torch.float64)
    bias[4] = -INF
    b_s, b_t = (bias if excluded in (side, "both") else None for side in ("student", "teacher"))
    eye, labels = torch.eye(6, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    infinite = {"teacher": INFINITE_WITHOUT_TEACHER, "student": INFINITE_WITHOUT_STUDENT, "both": ()}[excluded]
    z_s, z_t = (x if b is None else x + b for x, b in ((z, b_s), (t, b_t)))
    hidden = z.clone().requires_grad_()
    signals = ((t, OutputHead(eye, b_t), None), (None, None, Logits(z_t)))
    calls = [
        lambda h=h, head=head, signal=signal: (
            fused_linear_distillation(
                hidden, OutputHead(eye, b_s), h, head, labels, teacher=signal, objective=name, kd_weight=1.0
            ).loss
        )
        for h, head, signal in signals
    ]
    calls.append(lambda: divergence(name)(hidden if b_s is None else hidden + b_s, z_t).mean())
    if name in infinite:
        for call in calls:
            with pytest.raises(LimbeckError, match=r"infinite: the .* excludes token 4 .* and the .* does not"):
                call()
        return
    keep = [0, 1, 2, 3, 5] if excluded == "both" else slice(None)
    low = -800.0  # its exponential is 0 in float64 after the softmax, and its product with that is 0
    expected = divergence(name)(z_s[:, keep].clamp_min(low), z_t[:, keep].clamp_min(low)).mean()
    for call in calls:
        loss = call()
        torch.testing.assert_close(loss, expected)
        assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()


def test_a_label_that_the_student_excludes_is_refused():
    head = OutputHead(HEAD, torch.zeros(20).index_fill(0, torch.tensor(3), -INF))
    labels = torch.tensor([0, 3, 1, 1])
    with pytest.raises(LimbeckError, match="cross-entropy is infinite: label 3"):
        fused_linear_distillation(WIDE, head, None, None, labels, kd_weight=0.0)
    with pytest.raises(LimbeckError, match="divergence is infinite: the student excludes token 3"):
        teacher = TopK(torch.full((4, 2), 0.4).log(), torch.tensor([[3, 5]] * 4))
        fused_linear_distillation(WIDE, head, None, None, labels, teacher=teacher, kd_weight=1.0)
    with pytest.raises(LimbeckError, match="log-probability of a sampled token is not finite"):
        fused_linear_distillation(
            WIDE, HEAD, None, None, labels, teacher=Sampled(torch.full((4,), -INF)), objective="k2"
        )


def test_a_teacher_of_weight_zero_has_no_gradient():
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
        make = TaidSchedule.__init__ if name == "taid" else DIVERGENCES.get(name)
        own = {"adaptive_kl_alpha": "alpha", "skew_lambda": "skew", "js_beta": "beta"}
        taken = {own[key] for key, names in OBJECTIVE_KEYS.items() if name in names}
        parameters = set(inspect.signature(make).parameters) - {"self", "device"} - taken
        assert parameters == set(OBJECTIVE_KWARGS.get(name, ())), name
