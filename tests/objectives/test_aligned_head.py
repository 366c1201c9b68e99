"""Products at aligned widths give what products at the vocabulary's own width give, and read no row beyond it."""

import numpy as np
import pytest
import torch
from aligned import aligned_to

from limbeck.objectives import (
    CrossTokenizer,
    Objective,
    OutputHead,
    Sampled,
    Spans,
    Vocabularies,
    compute_logits,
    compute_topk,
    cross_tokenizer_distillation,
    fused_linear_distillation,
)
from limbeck.objectives.aligned_head import AlignedHead

N, VOCAB = 9, 130


def heads(beyond, seed=0):
    """Both heads of VOCAB rows and ``beyond`` further ones, which are NaN, with bias, soft-cap and scale."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    padded = lambda *shape: torch.cat([randn(VOCAB, *shape), torch.full((beyond, *shape), torch.nan).double()])  # noqa: E731
    student = OutputHead(padded(6), padded(), 20.0, 0.5)
    teacher = OutputHead(padded(10), padded(), None, 1.5)
    labels = torch.randint(0, VOCAB, (N,), generator=g)
    labels[3] = -100
    return randn(N, 6), student, randn(N, 10), teacher, labels, torch.rand(N, generator=g, dtype=torch.float64)


def solve(kind, beyond):
    """Loss, diagnostics and gradients of one kind of signal."""
    h_s, student, h_t, teacher, labels, weights = heads(beyond)
    leaves = [x.requires_grad_() for x in (h_s, student.weight, student.bias)]
    given = {"objective": Objective.of("js_divergence", kd_weight=0.4, temperature=2.0), "weights": weights}
    hidden = (h_t, teacher)
    if kind == "topk":
        given["objective"] = Objective.of("js_divergence", kd_weight=0.4, temperature=2.0, topk=7, tail="bucket")
    elif kind == "sampled":
        given["objective"] = Objective.of("k2", kd_weight=0.4)
        given["teacher"] = Sampled(-torch.arange(1.0, N + 1, dtype=torch.float64))
    elif kind == "topk signal":
        given["objective"] = Objective.of("js_divergence", kd_weight=0.4, temperature=2.0, tail="uniform")
        given["teacher"] = compute_topk(h_t, teacher, 7, vocab_size=VOCAB, temperature=2.0)
    elif kind == "logits signal":
        given["teacher"] = compute_logits(h_t, teacher, vocab_size=VOCAB)
    if "teacher" in given:
        hidden = (None, None)
    if kind == "cross tokenizer":
        none, same = torch.zeros(0, dtype=torch.int64), torch.arange(VOCAB)
        each = np.arange(N)
        spans = Spans.of(each, each, np.ones(N, np.float32))
        result = cross_tokenizer_distillation(
            h_s, student, *hidden, labels.clamp_min(0), labels.clamp_min(0), spans,
            cross=CrossTokenizer(Vocabularies(VOCAB, VOCAB, same, same, none, none), "hybrid"), **given,
        )  # fmt: skip
    else:
        result = fused_linear_distillation(h_s, student, *hidden, labels, vocab_size=VOCAB, chunk_size=4, **given)
    return [*result, *torch.autograd.grad(result.loss, leaves)]


@pytest.mark.parametrize("kind", ["hidden", "topk", "sampled", "topk signal", "logits signal", "cross tokenizer"])
def test_an_aligned_width_changes_nothing_whatever_follows_the_vocabulary(kind):
    expected = solve(kind, 0)
    for beyond in range(128):
        with aligned_to(64):
            for ours, plain in zip(solve(kind, beyond), expected, strict=True):
                part = ours if ours.ndim == 0 or len(ours) == N else ours[:VOCAB]
                torch.testing.assert_close(part, plain, rtol=1e-10, atol=1e-12, equal_nan=kind == "sampled")
                assert part is ours or not ours[VOCAB:].any()


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 127, 128])
def test_all_products_have_a_multiple_of_the_width(vocab):
    shapes = []

    class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                shapes.extend(tuple(x.shape) for x in arguments if isinstance(x, torch.Tensor))
            return function(*arguments, **(named or {}))

    weight, h, d_weight = torch.randn(vocab, 8), torch.randn(16, 8), torch.zeros(vocab, 8)
    with aligned_to(64), Recorded():
        head = AlignedHead(weight, vocab, torch.float32)
        out = head.buffer(16)
        logits = head.logits(h, out)
        head.hidden_grad(out)
        head.add_weight_grad(d_weight, out, h)
    assert shapes and all(size in (8, 16) or size % 64 == 0 for shape in shapes for size in shape)
    torch.testing.assert_close(logits, h @ weight.T)
    torch.testing.assert_close(d_weight, logits.T @ h)
