"""Products at aligned widths give what products at the vocabulary's own width give, and read no row beyond it."""

import numpy as np
import pytest
import torch
from aligned import ProductSizes, aligned_to

from limbeck.objectives import (
    CrossTokenizer,
    Objective,
    OutputHead,
    Spans,
    Vocabularies,
    compute_logits,
    compute_sampled,
    compute_topk,
    cross_tokenizer_distillation,
    fused_linear_distillation,
)
from limbeck.objectives.aligned_head import AlignedHead

N, VOCAB = 9, 130
KINDS = ["hidden", "topk", "sampled signal", "topk signal", "logits signal", "cross tokenizer"]


def heads(beyond, vocab, seed=0):
    """Both heads of ``vocab`` rows and ``beyond`` further ones, which are NaN, with bias, soft-cap and scale."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    padded = lambda *shape: torch.cat([randn(vocab, *shape), torch.full((beyond, *shape), torch.nan).double()])  # noqa: E731
    student = OutputHead(padded(6), padded(), 20.0, 0.5)
    teacher = OutputHead(padded(10), padded(), None, 1.5)
    labels = torch.randint(0, vocab, (N,), generator=g)
    labels[3] = -100
    return randn(N, 6), student, randn(N, 10), teacher, labels, torch.rand(N, generator=g, dtype=torch.float64)


def solve(kind, beyond, vocab=VOCAB):
    """Loss, diagnostics and gradients of one kind of signal."""
    h_s, student, h_t, teacher, labels, weights = heads(beyond, vocab)
    leaves = [x.requires_grad_() for x in (h_s, student.weight, student.bias)]
    given = {"objective": Objective.of("js_divergence", kd_weight=0.4, temperature=2.0), "weights": weights}
    hidden = (h_t, teacher)
    if kind == "topk":
        given["objective"] = Objective.of("js_divergence", kd_weight=0.4, temperature=2.0, topk=7, tail="bucket")
    elif kind == "sampled signal":
        given["objective"] = Objective.of("k2", kd_weight=0.4)
        given["teacher"] = compute_sampled(h_t, teacher, labels.clamp_min(0), vocab_size=vocab)
    elif kind == "topk signal":
        given["objective"] = Objective.of("js_divergence", kd_weight=0.4, temperature=2.0, tail="uniform")
        given["teacher"] = compute_topk(h_t, teacher, 7, vocab_size=vocab, temperature=2.0)
    elif kind == "logits signal":
        given["teacher"] = compute_logits(h_t, teacher, vocab_size=vocab)
    if "teacher" in given:
        hidden = (None, None)
    if kind == "cross tokenizer":
        none, same = torch.zeros(0, dtype=torch.int64), torch.arange(vocab)
        each = np.arange(N)
        spans = Spans.of(each, each, np.ones(N, np.float32))
        result = cross_tokenizer_distillation(
            h_s, student, *hidden, labels.clamp_min(0), labels.clamp_min(0), spans,
            cross=CrossTokenizer(Vocabularies(vocab, vocab, same, same, none, none), "hybrid"), **given,
        )  # fmt: skip
    else:
        result = fused_linear_distillation(h_s, student, *hidden, labels, vocab_size=vocab, chunk_size=4, **given)
    return [*result, *torch.autograd.grad(result.loss, leaves)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_aligned_width_changes_nothing_whatever_follows_the_vocabulary(kind):
    expected = solve(kind, 0)
    for beyond in range(128):
        with aligned_to(64):
            for ours, plain in zip(solve(kind, beyond), expected, strict=True):
                part = ours if ours.ndim == 0 or len(ours) == N else ours[:VOCAB]
                torch.testing.assert_close(part, plain, rtol=1e-10, atol=1e-12, equal_nan=kind == "sampled signal")
                assert part is ours or not ours[VOCAB:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_product_over_a_vocabulary_has_a_multiple_of_the_width(kind):
    for vocab in (61, 63, 65, 127, 129, 191):
        with aligned_to(64), ProductSizes() as products:
            solve(kind, beyond=vocab % 3, vocab=vocab)
        # Hidden sizes and chunks of positions have at most 10.
        assert {size for size in products.sizes if size > 10 and size % 64} == set(), vocab
        assert max(products.sizes) >= 64


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 127, 128])
def test_products_of_an_aligned_head_are_those_of_the_head(vocab):
    weight, h, d_weight = torch.randn(vocab, 8), torch.randn(16, 8), torch.zeros(vocab, 8)
    with aligned_to(64), ProductSizes() as products:
        head = AlignedHead(weight, vocab, torch.float32)
        out = head.buffer(16)
        logits = head.logits(h, out)
        head.hidden_grad(out)
        head.add_weight_grad(d_weight, out, h)
    assert {size for size in products.sizes if size % 64} == {8, 16}
    torch.testing.assert_close(logits, h @ weight.T)
    torch.testing.assert_close(d_weight, logits.T @ h)
