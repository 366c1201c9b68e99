"""The fused head-and-loss equals the definition on whole logits, whatever the chunk, head, mask, precision or option."""

import pytest
import torch
from aligned import aligned_to
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import LimbeckError
from limbeck.objectives import Logits, Objective, OutputHead, TopK, divergence, fused_linear_distillation, names


def logits_of(hidden, head, vocab):
    z = hidden @ head.weight[:vocab].T
    if head.bias is not None:
        z = z + head.bias[:vocab]
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def reference(h_s, head_s, h_t, head_t, labels, vocab, name, w, tau, tau_t, squared, topk):
    """(1 − w) CE + w D on logits that are held whole, by autograd."""
    keep = labels != -100
    z_s, z_t = logits_of(h_s[keep], head_s, vocab), logits_of(h_t[keep], head_t, vocab)
    ce = torch.nn.functional.cross_entropy(z_s, labels[keep], reduction="sum")
    d_s, d_t = z_s, z_t
    if topk:
        columns = z_t.topk(min(topk, vocab)).indices
        d_s, d_t = z_s.gather(-1, columns), z_t.gather(-1, columns)
    kd = divergence(name)(d_s, d_t, tau, tau_t).sum() * (tau**2 if squared else 1)
    return ((1 - w) * ce + w * kd) / keep.sum().clamp_min(1)


def problem(seed, n, vocab, pad_s, pad_t, *, bias, softcap, scale, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    h_s, h_t = randn(n, 6).requires_grad_(), randn(n, 10)
    head_s = OutputHead(randn(vocab + pad_s, 6).requires_grad_(), None, softcap, scale)
    head_t = OutputHead(randn(vocab + pad_t, 10), None, 5.0 if softcap else None, scale**2)
    if bias:
        head_s = OutputHead(head_s.weight, randn(vocab + pad_s).requires_grad_(), softcap, scale)
        head_t = OutputHead(head_t.weight, randn(vocab + pad_t), head_t.softcap, head_t.scale)
    labels = torch.randint(0, vocab, (n,), generator=g)
    labels[torch.rand(n, generator=g) < 0.3] = -100
    return h_s, head_s, h_t, head_t, labels


@pytest.mark.parametrize("name", names())
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 13),
    vocab=st.integers(2, 30),
    pads=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    chunk=st.sampled_from([None, 1, 3, 64]),
    w=st.sampled_from([0.0, 0.3, 1.0]),
    taus=st.tuples(st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([None, 1.0, 3.0])),
    squared=st.booleans(),
    topk=st.sampled_from([0, 2, 64]),
    head=st.tuples(st.booleans(), st.sampled_from([None, 3.0]), st.sampled_from([1.0, 0.25])),
    multiple=st.sampled_from([1, 8, 64]),
)
def test_loss_and_every_gradient_equal_autograd(
    name, seed, n, vocab, pads, chunk, w, taus, squared, topk, head, multiple
):
    bias, softcap, scale = head
    h_s, head_s, h_t, head_t, labels = problem(seed, n, vocab, *pads, bias=bias, softcap=softcap, scale=scale)
    leaves = [h_s, head_s.weight, *([head_s.bias] if bias else [])]
    objective = Objective.of(
        name, kd_weight=w, temperature=taus[0], teacher_temperature=taus[1], squared=squared, topk=topk
    )
    with aligned_to(multiple):
        result = fused_linear_distillation(
            h_s, head_s, h_t, head_t, labels, objective=objective, vocab_size=vocab, chunk_size=chunk
        )
        ours = torch.autograd.grad(result.loss, leaves, retain_graph=True)
        again = torch.autograd.grad(result.loss * 3, leaves)  # a second backward, another scale
    expected = reference(h_s, head_s, h_t, head_t, labels, vocab, name, w, *taus, squared, topk)
    torch.testing.assert_close(result.loss, expected, rtol=1e-9, atol=1e-10)
    plain = torch.autograd.grad(expected, leaves)
    for one, three, other in zip(ours, again, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(three, other * 3, rtol=1e-8, atol=1e-10)


def test_masked_positions_are_invisible():
    h_s, head_s, h_t, head_t, labels = problem(1, 12, 20, 0, 0, bias=False, softcap=None, scale=1.0)
    clean = fused_linear_distillation(h_s, head_s, h_t, head_t, labels).loss
    masked = (labels == -100).unsqueeze(-1)
    assert masked.any()
    dirty_s = h_s.detach().masked_fill(masked, float("nan")).requires_grad_()
    dirty = fused_linear_distillation(dirty_s, head_s, h_t.masked_fill(masked, float("nan")), head_t, labels)
    dirty.loss.backward()
    assert dirty.loss.item() == clean.item()
    assert (dirty_s.grad[masked.squeeze(-1)] == 0).all()
    assert torch.isfinite(dirty_s.grad).all()


def test_nothing_supervised_gives_zero_loss_and_zero_gradients():
    h_s, head_s, h_t, head_t, labels = problem(1, 4, 8, 0, 0, bias=True, softcap=None, scale=1.0)
    loss = fused_linear_distillation(h_s, head_s, h_t, head_t, torch.full_like(labels, -100)).loss
    loss.backward()
    assert loss.item() == 0
    assert h_s.grad.abs().sum() == 0
    assert head_s.weight.grad.abs().sum() == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(0, 16))
def test_any_split_into_micro_batches_gives_the_same_gradient(seed, cut):
    h_s, head_s, h_t, head_t, labels = problem(seed, 16, 11, 0, 0, bias=False, softcap=None, scale=1.0)
    count = max(int((labels != -100).sum()), 1)
    whole = torch.autograd.grad(fused_linear_distillation(h_s, head_s, h_t, head_t, labels).loss, head_s.weight)[0]
    parts = [
        torch.autograd.grad(
            fused_linear_distillation(h_s[part], head_s, h_t[part], head_t, labels[part], normalizer=count).loss,
            head_s.weight,
        )[0]
        for part in (slice(0, cut), slice(cut, 16))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-10, atol=1e-12)


def test_a_frozen_head_gets_no_gradient_and_a_tied_one_gets_both():
    h_s, head_s, h_t, head_t, labels = problem(3, 10, 9, 0, 0, bias=False, softcap=None, scale=1.0)
    frozen = OutputHead(head_s.weight.detach())
    fused_linear_distillation(h_s, frozen, h_t, head_t, labels).loss.backward()
    assert frozen.weight.grad is None

    embedding = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(10) % 9
    tied = fused_linear_distillation(embedding[ids], OutputHead(embedding), h_t, head_t, labels).loss
    keep = labels != -100
    z = (embedding[ids] @ embedding.T)[keep]
    ce = torch.nn.functional.cross_entropy(z, labels[keep], reduction="mean")
    kd = divergence("forward_kl")(z, (h_t @ head_t.weight.T)[keep]).mean()
    ours, plain = (torch.autograd.grad(x, embedding)[0] for x in (tied, 0.5 * ce + 0.5 * kd))
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_inputs_stay_close_to_float64(dtype, tolerance):
    exact = problem(7, 64, 300, 0, 0, bias=False, softcap=None, scale=1.0)
    h_s, head_s, h_t, head_t, labels = problem(7, 64, 300, 0, 0, bias=False, softcap=None, scale=1.0, dtype=dtype)
    truth = fused_linear_distillation(*exact, chunk_size=10)
    loss = fused_linear_distillation(h_s, head_s, h_t, head_t, labels, chunk_size=10)
    loss.loss.backward()
    truth.loss.backward()
    assert loss.loss.item() == pytest.approx(truth.loss.item(), rel=tolerance)
    assert h_s.grad.dtype == head_s.weight.grad.dtype == dtype
    difference = (head_s.weight.grad.double() - exact[1].weight.grad).norm() / exact[1].weight.grad.norm()
    assert difference < tolerance * 2


def test_diagnostics_are_what_they_say():
    h_s, head_s, h_t, head_t, labels = problem(5, 20, 13, 0, 0, bias=False, softcap=None, scale=1.0)
    out = fused_linear_distillation(h_s, head_s, h_t, head_t, labels, temperature=2.0)
    keep = labels != -100
    z_s, z_t = (h_s @ head_s.weight.T)[keep], (h_t @ head_t.weight.T)[keep]
    entropy = lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()  # noqa: E731
    torch.testing.assert_close(out.ce, torch.nn.functional.cross_entropy(z_s, labels[keep]).detach())
    torch.testing.assert_close(out.kd, divergence("forward_kl")(z_s, z_t, 2.0).mean().detach())
    torch.testing.assert_close(out.student_entropy, entropy(z_s / 2).detach())
    torch.testing.assert_close(out.teacher_entropy, entropy(z_t / 2))
    agreement = (z_s.argmax(-1) == z_t.argmax(-1)).double().mean()
    torch.testing.assert_close(out.top1_agreement, agreement)


def test_of_tokens_that_tie_one_that_both_models_have_is_enough_to_agree():
    student = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 1.0], [1.0, 0.0, 2.0]])
    teacher = torch.tensor([[1.0, 1.0, 1.0], [0.0, 5.0, 5.0], [5.0, 5.0, 0.0]])  # the first row is uniform
    labels, identity = torch.zeros(3, dtype=torch.long), torch.eye(3)
    agree = lambda signal: fused_linear_distillation(  # noqa: E731
        student, identity, None, None, labels, teacher=signal
    ).top1_agreement.item()
    assert agree(Logits(teacher)) == pytest.approx(2 / 3)
    first = TopK(teacher.log_softmax(-1), torch.arange(3).expand(3, 3))  # the columns 0, 1 and 0
    assert agree(first) == pytest.approx(1 / 3)


def test_cross_entropy_alone_needs_no_teacher():
    h_s, head_s, _, _, labels = problem(5, 20, 13, 0, 0, bias=False, softcap=None, scale=1.0)
    loss = fused_linear_distillation(h_s, head_s, None, None, labels, kd_weight=0.0).loss
    expected = torch.nn.functional.cross_entropy(h_s @ head_s.weight.T, labels)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(LimbeckError, match="there is no teacher"):
        fused_linear_distillation(h_s, head_s, None, None, labels)


def test_gradient_checkpointing_around_it_changes_nothing():
    h_s, head_s, h_t, head_t, labels = problem(9, 12, 15, 0, 0, bias=False, softcap=None, scale=1.0)
    run = lambda h: fused_linear_distillation(h, head_s, h_t, head_t, labels).loss  # noqa: E731
    plain = torch.autograd.grad(run(h_s), h_s)[0]
    recomputed = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, h_s, use_reentrant=False), h_s)[0]
    torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_torch_compile_around_it_changes_nothing():
    h_s, head_s, h_t, head_t, labels = problem(10, 12, 15, 0, 0, bias=False, softcap=None, scale=1.0)

    def step(h, w):
        return fused_linear_distillation(torch.tanh(h) * 2, w, h_t, head_t, labels).loss * 3

    plain = torch.autograd.grad(step(h_s, head_s.weight), (h_s, head_s.weight))
    compiled = torch.autograd.grad(torch.compile(step, backend="aot_eager")(h_s, head_s.weight), (h_s, head_s.weight))
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_of_many_strips_is_exact_and_the_same_every_time(dtype):
    """Heads are multiplied in strips of rows; the last is shorter, and the padding behind it is not touched."""
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    found = []
    for kind in (torch.float64, dtype, dtype):
        h_s, head_s, h_t, head_t, labels = problem(
            11, 20, 2500, 7, 0, bias=True, softcap=None, scale=0.5, dtype=kind
        )  # fmt: skip
        out = fused_linear_distillation(h_s, head_s, h_t, head_t, labels, chunk_size=6, objective="js_divergence")
        out.loss.backward()
        found.append([out.loss, h_s.grad, head_s.weight.grad, head_s.bias.grad])
    exact, first, again = found
    for one, other, twin in zip(exact, first, again, strict=True):
        assert torch.equal(other, twin)
        assert (other.double() - one).norm() <= tolerance * one.norm()
    assert (first[2][2500:] == 0).all()
