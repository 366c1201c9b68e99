"""Objectives on the token that the student has sampled, and what the teacher sends for them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.data.batch import Batch
from limbeck.errors import LimbeckError
from limbeck.objectives import OutputHead, compute_sampled, fused_linear_distillation
from limbeck.objectives.objective import Objective
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
    with pytest.raises(LimbeckError, match="labels must be tokens of the shared vocabulary, 0 to 1"):
        compute_sampled(h_t, OutputHead(w_t), labels, vocab_size=2)
    with pytest.raises(LimbeckError, match="has no labels"):
        SignalSpec("sampled_token", 0, 12).encode(h_t, OutputHead(w_t))
