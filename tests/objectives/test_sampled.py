"""Objectives on the token that the student has sampled, and what the teacher sends for them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.data.batch import Batch
from limbeck.errors import LimbeckError
from limbeck.objectives import (
    Objective,
    OutputHead,
    RolloutTokens,
    Sampled,
    compute_sampled,
    divergence,
    fused_linear_distillation,
)
from limbeck.teachers import SignalSpec, TeacherRequest


def problem(seed, n=9, vocab=12):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    h_s, w_s = randn(n, 5).requires_grad_(), randn(vocab, 5).requires_grad_()
    labels = torch.randint(0, vocab, (n,), generator=g)
    return h_s, w_s, randn(n, 4), randn(vocab + 3, 4), labels


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tau=st.sampled_from([0.7, 1.0, 2.0]),
    softcap=st.sampled_from([None, 3.0]),
    chunk=st.sampled_from([None, 1, 4]),
)
def test_the_teacher_sends_its_log_probability_of_each_label(seed, tau, softcap, chunk):
    """Over the shared vocabulary, without the rows that pad the head; the loss from it is that from hidden states."""
    h_s, w_s, h_t, w_t, labels = problem(seed)
    head, spec = (
        OutputHead(w_t, torch.linspace(-1, 1, 15).double(), softcap, 0.5),
        SignalSpec("sampled_token", 0, 12, tau),
    )
    batch = Batch.of(torch.zeros(3, 3).long(), labels.view(3, 3).masked_fill(torch.eye(3).bool(), -100), None, 9)
    rows, request = batch.supervised, TeacherRequest.from_batch(batch, spec)
    sent = spec.encode(h_t[rows], head, chunk, TeacherRequest.from_tensors(request.tensors(), spec).labels)
    z = (h_t @ w_t[:12].T + head.bias[:12]) * 0.5
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = (z / tau).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)[rows]
    torch.testing.assert_close(sent["log_probs"], expected, rtol=1e-10, atol=1e-12)

    objective = Objective.of("k2", kd_weight=1.0, temperature=tau)
    direct = fused_linear_distillation(
        h_s[rows], w_s, h_t[rows], head, labels[rows], objective=objective, vocab_size=12
    )
    signal = spec.decode(sent, None)
    other = fused_linear_distillation(
        h_s[rows], w_s, None, None, labels[rows], objective=objective, teacher=signal.payload
    )
    torch.testing.assert_close(other.loss, direct.loss, rtol=1e-10, atol=1e-12)
    for one, two in zip(*(torch.autograd.grad(x.loss, (h_s, w_s)) for x in (direct, other)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_labels_that_do_not_fit_are_refused():
    _, _, h_t, w_t, labels = problem(0)
    with pytest.raises(LimbeckError, match=r"one token for each of the 9 positions, got the shape \[4\]"):
        compute_sampled(h_t, OutputHead(w_t), labels[:4])
    with pytest.raises(LimbeckError, match="vocab_size=16 is not between 1 and the 15 rows"):
        compute_sampled(h_t, OutputHead(w_t), labels, vocab_size=16)
    with pytest.raises(LimbeckError, match="has no labels"):
        SignalSpec("sampled_token", 0, 12).encode(h_t, OutputHead(w_t))


def surrogate(z_s, log_p, written, advantages, labels, w, tau, clip):
    """Σ of the definition, by autograd on whole logits; log_p None for another objective."""
    sampled = ~written.isnan()
    log_q = (z_s / tau).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)[sampled]
    advantage = torch.zeros_like(log_q) if advantages is None else advantages[sampled]
    if log_p is not None:
        advantage = advantage + w * (log_p - written)[sampled]
    ratio = (log_q - written[sampled]).exp()
    clipped = ratio if clip is None else ratio.clamp(1 - clip[0], 1 + clip[1])
    return -torch.minimum(ratio * advantage.detach(), clipped * advantage.detach())


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(["policy_gradient", "forward_kl", "k2"]),
    w=st.sampled_from([0.0, 0.4, 1.0]),
    tau=st.sampled_from([1.0, 2.0]),
    tau_w=st.sampled_from([1.0, 2.0, 0.7]),
    clip=st.sampled_from([None, (0.2, 0.3), (0.0, 0.0)]),
    given_advantages=st.booleans(),
    stored=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    chunk=st.sampled_from([None, 1, 4]),
    normalizer=st.sampled_from([None, 5.0]),
)
def test_the_policy_gradient_is_that_of_its_definition(
    seed, name, w, tau, tau_w, clip, given_advantages, stored, softcap, chunk, normalizer
):
    """Beside cross-entropy and divergence; at a position without a sampled token it is 0, and so is it without supervision."""
    h_s, w_s, h_t, w_t, labels = problem(seed)
    w_t, g = w_t[:12], torch.Generator().manual_seed(seed)
    labels[torch.rand(9, generator=g) < 0.2] = -100
    written = torch.randn(9, generator=g, dtype=torch.float64) - 2.0
    written[torch.rand(9, generator=g) < 0.3] = torch.nan
    weights = torch.rand(9, generator=g, dtype=torch.float64) + 0.1
    advantages = torch.randn(9, generator=g, dtype=torch.float64) if given_advantages else None
    keep = labels != -100
    z_s = h_s @ w_s.T * 0.5
    z_s = z_s if softcap is None else softcap * torch.tanh(z_s / softcap)
    log_p_all = (h_t @ w_t.T / tau).log_softmax(-1)
    log_p = log_p_all.gather(-1, labels.clamp_min(0)[:, None]).squeeze(-1)
    teacher = {"teacher_hidden": h_t, "teacher_head": w_t}
    if stored and name != "forward_kl":
        teacher = {"teacher_hidden": None, "teacher_head": None, "teacher": Sampled(log_p, tau)}
    found = torch.full((9,), torch.nan, dtype=torch.float64)
    out = fused_linear_distillation(
        h_s, OutputHead(w_s, None, softcap, 0.5), labels=labels, **teacher,
        objective=Objective.of(name, kd_weight=w, temperature=tau), weights=weights, chunk_size=chunk,
        normalizer=normalizer, rollout=RolloutTokens(written, advantages, tau_w, clip, found),
    )  # fmt: skip
    u, z, y = weights[keep], z_s[keep], labels[keep]
    count = u.sum() if normalizer is None else normalizer
    ce = (u * torch.nn.functional.cross_entropy(z, y, reduction="none")).sum() / count
    log_q = (z / tau).log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    kd = {
        "policy_gradient": lambda: log_q - log_p[keep],
        "k2": lambda: (log_q - log_p[keep]) ** 2 / 2,
        "forward_kl": lambda: divergence("forward_kl")(z, log_p_all[keep], tau, 1.0),
    }[name]()
    kd = (u * kd).sum() / count
    of_teacher = log_p[keep] if name == "policy_gradient" and w > 0 else None
    given = None if advantages is None else advantages[keep]
    policy = surrogate(z, of_teacher, written[keep], given, y, w, tau_w, clip)
    policy = (u[~written[keep].isnan()] * policy).sum() / count
    expected = (1 - w) * ce + policy + (0 if name == "policy_gradient" else w * kd)
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out.policy, policy, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out.kd, kd, rtol=1e-9, atol=1e-10)
    entropy = -(u * (log_p_all.exp() * log_p_all).sum(-1)[keep]).sum() / count
    unknown = torch.tensor(torch.nan, dtype=torch.float64)
    is_known = teacher["teacher_head"] is not None
    torch.testing.assert_close(
        out.teacher_entropy, entropy if is_known else unknown, equal_nan=True, rtol=1e-9, atol=1e-10
    )
    assert out.top1_agreement.isnan() == (not is_known)
    again = (z_s / tau_w).log_softmax(-1).gather(-1, labels.clamp_min(0)[:, None]).squeeze(-1)
    torch.testing.assert_close(found, again.masked_fill(~keep, torch.nan), equal_nan=True, rtol=1e-9, atol=1e-10)
    if keep.any():
        for one, two in zip(*(torch.autograd.grad(x, (h_s, w_s)) for x in (out.loss, expected)), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


def test_a_positive_advantage_makes_the_sampled_token_more_likely():
    z = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    labels, advantages = torch.tensor([0, 0]), torch.tensor([1.0, -1.0], dtype=torch.float64)
    rollout = RolloutTokens(torch.full((2,), -torch.log(torch.tensor(3.0)).item()).double(), advantages)
    loss = fused_linear_distillation(
        z, torch.eye(3).double(), None, None, labels, kd_weight=0.0, normalizer=1.0, rollout=rollout
    )
    plain = torch.nn.functional.cross_entropy(z, labels, reduction="sum")
    ours = torch.autograd.grad(loss.loss, z)[0] - torch.autograd.grad(plain, z)[0]
    assert ours[0, 0] < 0 < ours[1, 0]
    torch.testing.assert_close(ours[0], torch.tensor([-2 / 3, 1 / 3, 1 / 3]).double())


def test_rollout_tokens_that_do_not_fit_are_refused():
    log_probs = torch.zeros(4)
    with pytest.raises(LimbeckError, match=r"advantages \[N\] for the N of log_probs, got \[3\]"):
        RolloutTokens(log_probs, torch.zeros(3))
    with pytest.raises(LimbeckError, match="temperature above 0"):
        RolloutTokens(log_probs, temperature=0.0)
    with pytest.raises(LimbeckError, match=r"clip must be \(low, high\)"):
        RolloutTokens(log_probs, clip=(1.5, 0.2))
    with pytest.raises(LimbeckError, match="rollout has 4 positions and student_hidden 2"):
        fused_linear_distillation(
            torch.zeros(2, 3), torch.zeros(5, 3), None, None, torch.zeros(2).long(), kd_weight=0.0,
            rollout=RolloutTokens(log_probs),
        )  # fmt: skip
