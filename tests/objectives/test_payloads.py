"""Top-k, logits and sampled signals give the loss of their definition on whole logits."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.errors import LimbeckError
from limbeck.objectives import (
    TAILS,
    Logits,
    Objective,
    OutputHead,
    Sampled,
    TopK,
    compute_logits,
    compute_topk,
    divergence,
    fused_linear_distillation,
    names,
)

NEVER_NEGATIVE = [name for name in names() if name not in ("cross_entropy", "alpha_beta")]


def problem(seed, n=7, vocab=12):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    h_s, w_s = randn(n, 5).requires_grad_(), randn(vocab, 5).requires_grad_()
    labels = torch.randint(0, vocab, (n,), generator=g)
    labels[torch.rand(n, generator=g) < 0.2] = -100
    return h_s, w_s, randn(n, vocab) * 2, labels


def seen(z_s, z_t, k, tail, tau, tau_t, topk_from="teacher"):
    """Logits of two distributions [N, .] whose divergence is what the tail defines; drop is not a pair of distributions."""
    log_p, log_q = (z_t / tau_t).log_softmax(-1), (z_s / tau).log_softmax(-1)
    columns = (log_p if topk_from == "teacher" else log_q).topk(k).indices
    p_k, q_k = log_p.gather(-1, columns), log_q.gather(-1, columns)
    if tail == "renormalize":
        return q_k.log_softmax(-1), p_k.log_softmax(-1)
    if tail == "bucket":
        rest = [(1 - x.exp().sum(-1, keepdim=True)).log() for x in (q_k, p_k)]
        return torch.cat([q_k, rest[0]], -1), torch.cat([p_k, rest[1]], -1)
    vocab = z_s.shape[-1]
    if tail == "uniform":
        fill = ((1 - p_k.exp().sum(-1, keepdim=True)) / (vocab - k)).log()
    else:
        p_k, fill = p_k.log_softmax(-1), torch.tensor(-100.0, dtype=z_s.dtype)
    return log_q, (fill + torch.zeros_like(log_p)).scatter(-1, columns, p_k)


@pytest.mark.parametrize("name", [name for name in names() if name != "adaptive_kl"])  # whose order of ties is its own
@pytest.mark.parametrize("tail", [tail for tail in TAILS if tail != "drop"])
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 10),
    w=st.sampled_from([0.4, 1.0]),
    tau=st.sampled_from([1.0, 2.0]),
    tau_t=st.sampled_from([None, 1.5]),
    tokens=st.sampled_from(["stored", "teacher", "student"]),
    chunk=st.sampled_from([None, 3]),
)
def test_each_tail_is_the_divergence_of_its_definition(name, tail, seed, k, w, tau, tau_t, tokens, chunk):
    h_s, w_s, z_t, labels = problem(seed)
    topk_from = "student" if tokens == "student" else "teacher"
    objective = Objective.of(
        name, kd_weight=w, temperature=tau, teacher_temperature=tau_t, topk=k, tail=tail, topk_from=topk_from
    )
    if tokens == "stored":
        log_probs, indices = (z_t / objective.teacher_temperature).log_softmax(-1).topk(k)
        teacher = TopK(log_probs, indices, objective.teacher_temperature)
    else:
        teacher = Logits(z_t)
    out = fused_linear_distillation(
        h_s, w_s, None, None, labels, teacher=teacher, objective=objective, chunk_size=chunk
    )
    keep = labels != -100
    z_s = (h_s @ w_s.T)[keep]
    q, p = seen(z_s, z_t[keep], k, tail, tau, objective.teacher_temperature, topk_from)
    kd = divergence(name)(q, p).sum()
    ce = torch.nn.functional.cross_entropy(z_s, labels[keep], reduction="sum")
    expected = ((1 - w) * ce + w * kd) / keep.sum().clamp_min(1)
    torch.testing.assert_close(out.loss, expected, rtol=1e-8, atol=1e-9)
    for ours, plain in zip(
        torch.autograd.grad(out.loss, (h_s, w_s)), torch.autograd.grad(expected, (h_s, w_s)), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-7, atol=1e-9)


def test_mass_and_overlap_are_those_of_the_compared_tokens():
    h_s, w_s, z_t, labels = problem(3)
    keep = labels != -100
    theirs, ours = z_t[keep].topk(4).indices, (h_s @ w_s.T)[keep].topk(4).indices
    p = z_t[keep].softmax(-1)
    shared = (theirs[:, :, None] == ours[:, None]).any(-1).double().mean()
    assert 0 < shared < 1
    for topk_from, columns in (("teacher", theirs), ("student", ours)):
        objective = Objective.of("reverse_kl", topk=4, topk_from=topk_from)
        out = fused_linear_distillation(h_s, w_s, None, None, labels, teacher=Logits(z_t), objective=objective)
        torch.testing.assert_close(out.topk_mass, p.gather(-1, columns).sum(-1).mean())
        torch.testing.assert_close(out.topk_overlap, shared)
    with pytest.raises(
        LimbeckError, match="compares the student's most likely tokens, and the teacher sends those of its"
    ):
        fused_linear_distillation(
            h_s, w_s, None, None, labels, teacher=TopK(z_t[:, :1], labels.clamp_min(0)[:, None]), objective=objective
        )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 10), reverse=st.booleans())
def test_a_dropped_tail_leaves_the_sum_over_the_kept(seed, k, reverse):
    h_s, w_s, z_t, labels = problem(seed)
    name = "reverse_kl" if reverse else "forward_kl"
    objective = Objective.of(name, kd_weight=1.0, topk=k, tail="drop")
    loss = fused_linear_distillation(h_s, w_s, None, None, labels, teacher=Logits(z_t), objective=objective).loss
    keep = labels != -100
    log_q, log_p = (h_s @ w_s.T)[keep].log_softmax(-1), z_t[keep].log_softmax(-1)
    columns = log_p.topk(k).indices
    log_q, log_p = log_q.gather(-1, columns), log_p.gather(-1, columns)
    gap = log_p - log_q
    expected = (-(log_q.exp() * gap) if reverse else log_p.exp() * gap).sum() / keep.sum().clamp_min(1)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-11)
    ours, plain = (torch.autograd.grad(x, h_s)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    ("tail", "k", "value"),
    [
        ("renormalize", 1, 0.0), ("renormalize", 2, 0.3108185563), ("bucket", 1, 0.3819085010),
        ("bucket", 2, 0.3960584572), ("drop", 1, 0.6591673732), ("drop", 2, 0.5059196861),
    ],
)  # fmt: skip
def test_tails_meet_the_golden_values(tail, k, value):
    p, q = (torch.tensor([x], dtype=torch.float64).log() for x in ((0.6, 0.3, 0.1), (0.2, 0.5, 0.3)))
    head = torch.eye(3, dtype=torch.float64)
    objective = Objective.of(kd_weight=1.0, topk=k, tail=tail)
    out = fused_linear_distillation(q, head, p, head, torch.tensor([0]), objective=objective)
    assert out.loss.item() == pytest.approx(value, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_bucket_rises_with_k_to_the_whole_divergence(seed):
    h_s, w_s, z_t, labels = problem(seed)
    losses = [
        fused_linear_distillation(
            h_s, w_s, None, None, labels.clamp_min(0), teacher=Logits(z_t),
            objective=Objective.of(kd_weight=1.0, topk=k, tail="bucket"),
        ).loss.item()
        for k in range(1, 13)
    ]  # fmt: skip
    assert all(a <= b + 1e-12 for a, b in pairwise(losses))
    whole = divergence("forward_kl")(h_s @ w_s.T, z_t).mean().item()
    assert losses[-1] == pytest.approx(whole, rel=1e-9)
    assert losses[-2] == pytest.approx(whole, rel=1e-9)  # one token is left: the bucket is that token


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize(
    ("k", "tails"), [(11, ("bucket", "uniform")), (12, ("renormalize", "bucket", "drop", "uniform", "zero"))]
)
@pytest.mark.parametrize("stored", [False, True])
def test_all_but_one_token_or_all_of_them_are_the_whole_divergence(name, k, tails, stored):
    h_s, w_s, z_t, labels = problem(12)
    run = lambda teacher, **more: fused_linear_distillation(  # noqa: E731
        h_s, w_s, None, None, labels, teacher=teacher,
        objective=Objective.of(name, kd_weight=0.7, temperature=1.5, **more),
    )  # fmt: skip
    exact = run(Logits(z_t)).loss
    teacher = TopK(*(z_t / 1.5).log_softmax(-1).topk(k), temperature=1.5) if stored else Logits(z_t)
    for tail in tails:
        loss = run(teacher, topk=k, tail=tail).loss
        torch.testing.assert_close(loss, exact, rtol=1e-9, atol=1e-11)
        ours, plain = (torch.autograd.grad(x, (h_s, w_s), retain_graph=True) for x in (loss, exact))
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_a_student_that_is_surer_than_the_teacher_keeps_the_digits_of_a_buckets_gradient():
    """The bucket's ∂D/∂q is 1e-4 / 1e-16 here, of which nothing may be left on the tokens outside it."""
    z = torch.tensor([[40.0, 2.0, 1.0, 0.0, -1.0]])
    log_probs = torch.tensor([[0.7, 0.2999]]).log()
    found = []
    for dtype in (torch.float64, torch.float32):
        hidden, head = z.to(dtype).requires_grad_(), torch.eye(5, dtype=dtype)
        loss = fused_linear_distillation(
            hidden, head, None, None, torch.tensor([0]), teacher=TopK(log_probs.to(dtype), torch.tensor([[0, 1]])),
            objective=Objective.of(kd_weight=1.0, topk=2, tail="bucket"),
        ).loss  # fmt: skip
        found.append(torch.autograd.grad(loss, hidden)[0].double())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert found[0][0, 1].item() == pytest.approx(-0.2999, rel=1e-6)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js_divergence", "taid", "alpha_beta"])
@pytest.mark.parametrize("padding", [9, 4])
def test_unused_entries_of_a_top_k_change_nothing(name, tail, padding):
    """A server that returns fewer than k tokens pads with −∞; the padding index may repeat a token."""
    h_s, w_s, _, labels = problem(13)
    log_probs = torch.tensor([0.7, 0.2], dtype=torch.float64).log().expand(7, 2)
    indices = torch.tensor([[4, 1]]).expand(7, 2)
    padded = TopK(
        torch.nn.functional.pad(log_probs, (0, 1), value=-torch.inf),
        torch.nn.functional.pad(indices, (0, 1), value=padding),
    )
    objective = Objective.of(name, topk=3, tail=tail, temperature=1.0, teacher_temperature=1.0)
    short, long = (
        fused_linear_distillation(h_s, w_s, None, None, labels, teacher=teacher, objective=objective)
        for teacher in (TopK(log_probs, indices), padded)
    )
    torch.testing.assert_close(long.loss, short.loss, rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad(out.loss, h_s)[0] for out in (short, long)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def test_a_top_k_beyond_the_tokens_that_the_teacher_allows_has_unused_entries():
    h_s, w_s, z_t, labels = problem(13)
    z_t[:, 3:] = -torch.inf
    head = OutputHead(torch.eye(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64))
    head.bias[3:] = -torch.inf
    objective = Objective.of("reverse_kl", topk=5, kd_weight=1.0)
    few = Objective.of("reverse_kl", topk=3, kd_weight=1.0)
    expected = fused_linear_distillation(h_s, w_s, None, None, labels, teacher=Logits(z_t), objective=few).loss
    hidden = z_t.nan_to_num(neginf=0.0)
    for more in (
        {"teacher": Logits(z_t), "teacher_hidden": None, "teacher_head": None},
        {"teacher": compute_topk(hidden, head, 5), "teacher_hidden": None, "teacher_head": None},
        {"teacher_hidden": hidden, "teacher_head": head},
    ):
        loss = fused_linear_distillation(h_s, w_s, labels=labels, objective=objective, **more).loss
        torch.testing.assert_close(loss, expected)


SURE = ("forward_kl", "reverse_kl", "mixed_kl", "symmetric_kl", "adaptive_kl", "js_divergence")


@pytest.mark.parametrize("tail", ["uniform", "bucket"])
@pytest.mark.parametrize("name", [*SURE, "alpha_beta"])
def test_a_teacher_that_is_nearly_certain_keeps_the_digits_of_its_tail(name, tail):
    """In float32, P rounds to 1 here, and 1 − P is 0 although the rest has a mass of 1e-8."""
    g = torch.Generator().manual_seed(1)
    z, t = torch.randn(3, 500, generator=g), torch.randn(3, 500, generator=g)
    t[0, 0] = 22.0
    parameters = {"alpha": 0.0, "beta": 1.0} if name == "alpha_beta" else None
    objective = Objective.of(name, kd_weight=1.0, topk=64, tail=tail, parameters=parameters)
    found = []
    for dtype in (torch.float64, torch.float32):
        hidden, eye = z.to(dtype).requires_grad_(), torch.eye(500, dtype=dtype)
        loss = fused_linear_distillation(
            hidden, eye, None, None, torch.zeros(3, dtype=torch.long), teacher=Logits(t.to(dtype)), objective=objective
        ).loss
        found.append((loss.double(), torch.autograd.grad(loss, hidden)[0].double()))
    q, p = seen(z.double(), t.double(), 64, tail, 1.0, 1.0)
    closed = divergence(name, **(parameters or {}))(q, p).mean()
    torch.testing.assert_close(found[0][0], closed, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[1][0], closed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("tail", ["uniform", "bucket"])
@pytest.mark.parametrize("name", SURE)
def test_a_stored_top_k_that_sums_to_one_has_a_tail_of_rounding_size(name, tail):
    """A float32 signal cannot hold a rest below eps, so eps is what the rest counts as: finite, and near the truth."""
    g = torch.Generator().manual_seed(1)
    z, t = torch.randn(3, 500, generator=g), torch.randn(3, 500, generator=g)
    t[:, 0] = 40.0
    signal = TopK(*t.log_softmax(-1).topk(64))
    objective = Objective.of(name, kd_weight=1.0, topk=64, tail=tail)
    hidden = z.clone().requires_grad_()
    loss = fused_linear_distillation(
        hidden, torch.eye(500), None, None, torch.zeros(3, dtype=torch.long), teacher=signal, objective=objective
    ).loss
    log_p = signal.log_probs.double()
    rest = torch.full((3, 1), torch.finfo(torch.float32).eps, dtype=torch.float64)
    log_q = z.double().log_softmax(-1)
    q_k = log_q.gather(-1, signal.indices)
    if tail == "uniform":
        p = (rest / 436).log().expand(3, 500).scatter(-1, signal.indices, log_p)
        q = log_q
    else:
        q = torch.cat([q_k, (1 - q_k.exp().sum(-1, keepdim=True)).log()], -1)
        p = torch.cat([log_p, rest.log()], -1)
    torch.testing.assert_close(loss.double(), divergence(name)(q, p).mean(), rtol=1e-5, atol=1e-6)
    assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()


@pytest.mark.parametrize("name", NEVER_NEGATIVE)
@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_divergences_of_what_is_seen_are_never_negative(name, tail):
    h_s, w_s, z_t, labels = problem(4)
    for k in (1, 3, 11):
        objective = Objective.of(name, kd_weight=1.0, topk=k, tail=tail)
        out = fused_linear_distillation(h_s, w_s, None, None, labels, teacher=Logits(z_t), objective=objective)
        assert out.kd.item() >= -1e-12


@pytest.mark.parametrize(
    ("name", "value"), [("k1", -1.0986122887), ("k2", math.log(3) ** 2 / 2), ("k3", 0.9013877113)]
)  # drawn: token 0 of q = (.2, .5, .3), p = (.6, .3, .1)
def test_estimators_meet_the_golden_values(name, value):
    p, q = (torch.tensor([x], dtype=torch.float64).log() for x in ((0.6, 0.3, 0.1), (0.2, 0.5, 0.3)))
    head = torch.eye(3, dtype=torch.float64)
    signal = Sampled(p[:, 0])
    out = fused_linear_distillation(
        q, head, None, None, torch.tensor([0]), teacher=signal, objective=name, kd_weight=1.0
    )
    assert out.loss.item() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_estimators_average_to_the_reverse_kl_and_pull_as_their_definition(name, tau):
    h_s, w_s, z_t, _ = problem(11)
    log_q, log_p = (h_s @ w_s.T / tau).log_softmax(-1), (z_t / tau).log_softmax(-1)
    mean, pull = 0.0, 0.0
    for token in range(12):
        labels = torch.full((7,), token)
        weights = log_q[:, token].detach().exp()
        out = fused_linear_distillation(
            h_s, w_s, None, None, labels, teacher=Sampled(log_p[:, token], tau), objective=name, kd_weight=1.0,
            temperature=tau, weights=weights, normalizer=7,
        )  # fmt: skip
        (ours,) = torch.autograd.grad(out.loss, h_s)
        mean, pull = mean + out.loss.detach(), pull + ours
        r = log_p[:, token] - log_q[:, token]
        value = {"k1": -r, "k2": r**2 / 2, "k3": r.exp() - 1 - r}[name]
        expected = torch.autograd.grad((value * weights).sum() / 7, h_s, retain_graph=True)[0]
        torch.testing.assert_close(ours, expected)
    reverse = divergence("reverse_kl")(h_s @ w_s.T, z_t, tau).mean()
    if name != "k2":
        torch.testing.assert_close(mean, reverse.detach())
    if name == "k2":
        squared = (log_q.exp() * (log_q - log_p) ** 2 / 2).sum(-1).mean()
        torch.testing.assert_close(mean, squared.detach())
        torch.testing.assert_close(pull, torch.autograd.grad(reverse, h_s)[0])
    if name == "k1":
        assert pull.abs().max() < 1e-12


def test_stored_probabilities_are_brought_to_another_temperature_only_where_that_is_defined():
    h_s, w_s, z_t, labels = problem(3)
    log_probs, indices = z_t.log_softmax(-1).topk(4)
    for tail in ("renormalize", "zero"):
        warm = Objective.of(kd_weight=1.0, temperature=2.0, topk=4, tail=tail)
        stored, direct = (
            fused_linear_distillation(h_s, w_s, None, None, labels, teacher=teacher, objective=warm).loss
            for teacher in (TopK(log_probs, indices), Logits(z_t))
        )
        torch.testing.assert_close(stored, direct)
    bucket = Objective.of(kd_weight=1.0, temperature=2.0, topk=4, tail="bucket")
    with pytest.raises(LimbeckError, match=r"stored at temperature 1\.0 cannot be brought to 2\.0"):
        fused_linear_distillation(h_s, w_s, None, None, labels, teacher=TopK(log_probs, indices), objective=bucket)


def test_weights_multiply_each_positions_loss():
    h_s, w_s, z_t, labels = problem(5)
    weights = torch.rand(7, dtype=torch.float64)
    out = fused_linear_distillation(h_s, w_s, None, None, labels, teacher=Logits(z_t), weights=weights)
    keep = labels != -100
    z_s = (h_s @ w_s.T)[keep]
    each = 0.5 * torch.nn.functional.cross_entropy(z_s, labels[keep], reduction="none")
    each = each + 0.5 * divergence("forward_kl")(z_s, z_t[keep])
    expected = (each * weights[keep]).sum() / weights[keep].sum()
    torch.testing.assert_close(out.loss, expected)
    for ours, plain in zip(
        torch.autograd.grad(out.loss, (h_s, w_s)), torch.autograd.grad(expected, (h_s, w_s)), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def test_top_k_mass_and_overlap_are_what_they_say():
    h_s, w_s, z_t, labels = problem(6)
    out = fused_linear_distillation(h_s, w_s, None, None, labels, teacher=Logits(z_t), objective=Objective.of(topk=3))
    keep = labels != -100
    z_s, z_t = (h_s @ w_s.T)[keep], z_t[keep]
    top = z_t.topk(3).indices
    torch.testing.assert_close(out.topk_mass, z_t.softmax(-1).gather(-1, top).sum(-1).mean())
    both = torch.isin(
        top + 100 * torch.arange(len(top))[:, None], z_s.topk(3).indices + 100 * torch.arange(len(top))[:, None]
    )
    torch.testing.assert_close(out.topk_overlap, both.double().mean())


def test_entropies_and_agreement_are_those_of_what_is_seen():
    h_s, w_s, z_t, labels = problem(6)
    z_t[:3] = (h_s @ w_s.T)[:3].detach()  # both models agree there
    stored = TopK(*z_t.log_softmax(-1).topk(3))
    out = fused_linear_distillation(h_s, w_s, None, None, labels, teacher=stored, objective=Objective.of(topk=3))
    keep = labels != -100
    z_s, z_t = (h_s @ w_s.T)[keep].detach(), z_t[keep]
    columns = z_t.topk(3).indices
    for found, z in ((out.student_entropy, z_s), (out.teacher_entropy, z_t)):
        log = z.gather(-1, columns).log_softmax(-1)
        torch.testing.assert_close(found, -(log.exp() * log).sum(-1).mean())
    agreement = (z_s.argmax(-1) == z_t.argmax(-1)).double().mean()
    assert 0 < agreement < 1
    torch.testing.assert_close(out.top1_agreement, agreement)


@pytest.mark.parametrize("name", names())
def test_vanishing_tokens_stay_finite(name):
    hidden = torch.tensor([[0.0, -300.0, 5.0, 80.0]], requires_grad=True)
    signal = Logits(torch.tensor([[0.0, 200.0, -200.0, -300.0]]))
    out = fused_linear_distillation(hidden, torch.eye(4), None, None, torch.tensor([1]), teacher=signal, objective=name)
    out.loss.backward()
    assert torch.isfinite(out.loss) and torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("name", names())
def test_the_order_of_the_vocabulary_does_not_matter(name):
    h_s, w_s, z_t, labels = problem(8)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    place = order.argsort()
    moved = torch.where(labels >= 0, place[labels.clamp_min(0)], labels)
    one = fused_linear_distillation(h_s, w_s, None, None, labels, teacher=Logits(z_t), objective=name).loss
    other = fused_linear_distillation(
        h_s, w_s[order], None, None, moved, teacher=Logits(z_t[:, order]), objective=name
    ).loss
    torch.testing.assert_close(one, other)


# parts of taid and adaptive_kl are constants for the gradient
@pytest.mark.parametrize("name", [name for name in names() if name not in ("taid", "adaptive_kl")])
def test_finite_differences_agree(name):
    h_s, w_s, z_t, labels = problem(9, n=3, vocab=6)
    labels = labels.clamp_min(0)
    run = lambda h, w: fused_linear_distillation(h, w, None, None, labels, teacher=Logits(z_t), objective=name).loss  # noqa: E731
    assert torch.autograd.gradcheck(run, (h_s, w_s))


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor made meanwhile has."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.numel())
        return made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 10),
    tail=st.sampled_from(TAILS),
    tau_t=st.sampled_from([1.0, 1.5]),
    softcap=st.sampled_from([None, 3.0]),
    biased=st.booleans(),
    chunk=st.sampled_from([None, 3]),
)
def test_a_signal_gives_the_loss_of_the_hidden_states(dtype, seed, k, tail, tau_t, softcap, biased, chunk):
    generator = torch.Generator().manual_seed(seed)
    h_s, w_s, h_t, w_t = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((7, 5), (12, 5), (7, 6), (14, 6))
    )
    bias = torch.randn(14, generator=generator, dtype=torch.float64).to(dtype) if biased else None
    head = OutputHead(w_t, bias, softcap, 0.7)
    labels = torch.randint(12, (7,), generator=generator)
    for topk in (k, 0):
        objective = Objective.of(kd_weight=0.7, teacher_temperature=tau_t, topk=topk, tail=tail)
        loss = partial(fused_linear_distillation, h_s, w_s, labels=labels, objective=objective)
        if topk:
            signal = compute_topk(h_t, head, topk, vocab_size=12, temperature=tau_t, chunk_size=chunk)
        else:
            signal = compute_logits(h_t, head, vocab_size=12, chunk_size=chunk)
        of_hidden, of_signal = loss(h_t, head), loss(None, None, teacher=signal)
        rounded = dtype is torch.bfloat16 and not topk and (biased or softcap or head.scale != 1)
        tight = {"rtol": 2e-2, "atol": 2e-2} if rounded else {"rtol": 1e-5, "atol": 1e-6}
        for name, value in of_hidden._asdict().items():
            if rounded and name in ("top1_agreement", "topk_overlap"):
                continue  # rounding may make two logits equal
            torch.testing.assert_close(getattr(of_signal, name), value, **tight, msg=name)


def test_compute_topk_needs_no_whole_logits():
    head = OutputHead(torch.randn(4000, 8))
    with Largest() as largest:
        compute_topk(torch.randn(500, 8), head, 4, chunk_size=50)
    assert largest.most == 50 * 4000


def test_signals_that_do_not_fit_are_refused():
    h_s, w_s, z_t, labels = problem(1)
    with pytest.raises(LimbeckError, match="two teachers"):
        fused_linear_distillation(h_s, w_s, z_t, OutputHead(w_s), labels, teacher=Logits(z_t))
    with pytest.raises(LimbeckError, match=r"needs log-probabilities of the labels \(Sampled\)"):
        fused_linear_distillation(
            h_s, w_s, None, None, labels, teacher=TopK(z_t[:, :1], labels[:, None]), objective="k2"
        )
    with pytest.raises(LimbeckError, match="needs a distribution"):
        fused_linear_distillation(h_s, w_s, None, None, labels, teacher=Sampled(z_t[:, 0]))
    with pytest.raises(LimbeckError, match="no tail called 'head'"):
        Objective.of(topk=3, tail="head")
    with pytest.raises(LimbeckError, match="uses the sampled token only"):
        Objective.of("k2", topk=3)
