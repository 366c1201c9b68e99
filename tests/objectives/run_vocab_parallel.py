"""Run by torchrun: every rank holds a slice of both heads, and all of them find what one process finds."""

import sys
from unittest.mock import patch

import torch
import torch.distributed as dist
from aligned import ProductSizes, aligned_to

from limbeck.errors import LimbeckError
from limbeck.objectives import (
    TAILS,
    Logits,
    Objective,
    OutputHead,
    RolloutTokens,
    TopK,
    VocabParallel,
    compiler_found,
    fused_linear_distillation,
    names,
    needs_vocab_reduction,
    register,
    take_rows,
)
from limbeck.objectives.vocab_parallel import NO_SHARDING
from limbeck.strategies.world import start_world


@register
def of_a_user():
    """Σ (p − q)² / 2."""
    return lambda p, q, log_p, log_q: ((q - p) ** 2 / 2, q * (q - p))


@register
def coupled_of_a_user():
    """Σ (p − q)² / 2 Σ p², for which p² is summed over the ranks; what is summed stays what it was."""

    @needs_vocab_reduction
    def terms(p, q, log_p, log_q, reducer=NO_SHARDING):
        part = (p * p).sum(-1, keepdim=True)
        reducer.sum(part)
        total = reducer.sum(part)
        return (q - p) ** 2 / (2 * total), q * (q - p) / total

    return terms


def counted(calls: list[str]):
    """Note every collective of a loss."""
    plain = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}
    counting = {
        name: lambda *a, plain=call, name=name, **k: (calls.append(name), plain(*a, **k))[1]
        for name, call in plain.items()
    }
    return patch.multiple(dist, **counting)


def check_certain_teacher() -> None:
    """In float32 the teacher's mass outside its top-k comes from the ranks' slices, not from 1 − P, which is 0 here."""
    g = torch.Generator().manual_seed(1)
    z, t, labels = torch.randn(3, 500, generator=g), torch.randn(3, 500, generator=g), torch.zeros(3, dtype=torch.long)
    t[0, 0] = 22.0
    parallel, eye = VocabParallel(500), torch.eye(500)
    for name in ("reverse_kl", "adaptive_kl"):
        for tail in ("uniform", "bucket"):
            objective = Objective.of(name, kd_weight=1.0, topk=64, tail=tail)
            found = []
            for dtype, columns, reducer in (
                (torch.float64, slice(None), None),
                (torch.float32, parallel.columns, parallel),
            ):
                hidden = z.to(dtype, copy=True).detach().requires_grad_()
                signal = Logits(t.to(dtype)[:, columns])
                head = eye.to(dtype)[columns]
                loss = fused_linear_distillation(
                    hidden, head, None, None, labels, teacher=signal, objective=objective, reducer=reducer
                ).loss
                loss.backward()
                found.append((loss.double(), hidden.grad.double()))
            torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-6)


def check_aligned_slices() -> None:
    """Slices of any width, of heads with 0 to 127 rows beyond the vocabulary, have aligned products and change nothing."""
    vocab, rank, ranks = 520, dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(2)
    h_s, h_t, w_s, w_t = (torch.randn(rows, n, generator=g).double() for rows in (9, vocab) for n in (5, 4))
    labels = torch.randint(0, vocab, (9,), generator=g)

    def run(*heads, **options):
        leaves = [h_s.clone().requires_grad_(), heads[0].clone().requires_grad_()]
        loss = fused_linear_distillation(*leaves, h_t, heads[1], labels, objective="js_divergence", **options).loss
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    loss, d_hidden, d_weight = run(w_s, w_t)
    for beyond in range(128):
        each = -(-(vocab + beyond) // ranks)
        held = slice(rank * each, (rank + 1) * each)
        slices = [torch.cat([w, w.new_full((beyond, w.shape[1]), torch.nan)])[held] for w in (w_s, w_t)]
        with aligned_to(64), ProductSizes() as products:
            found = run(*slices, reducer=VocabParallel(vocab, head_rows=vocab + beyond))
        assert {size for size in products.sizes if size > 9 and size % 64} == set()
        padded = torch.cat([d_weight, d_weight.new_zeros(beyond, d_weight.shape[1])])[held]
        torch.testing.assert_close(found, [loss, d_hidden, padded], rtol=1e-9, atol=1e-11)


def main(vocab: int) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    h_s, h_t, w_s, w_t, b_s = randn(9, 5), randn(9, 4), randn(vocab, 5), randn(vocab, 4), randn(vocab)
    labels = torch.randint(0, vocab, (9,), generator=g)
    labels[2] = -100
    weights = torch.rand(9, generator=g, dtype=torch.float64)
    reducer = VocabParallel(vocab)
    mine = reducer.columns

    # The teacher's head comes split over another number of ranks: here the first rank holds all of it.
    held = w_t if rank == 0 else w_t[:0]
    slice_t = take_rows(held, 0, mine)
    assert torch.equal(slice_t, w_t[mine])

    cases = [(name, 0, "renormalize", tau) for name in names() for tau in (1.0, 2.0)]
    cases += [(name, 3, tail, 2.0) for name in ("forward_kl", "js_divergence") for tail in TAILS]
    cases += [("policy_gradient", 0, "renormalize", 2.0), ("reverse_kl", 3, "of_student", 2.0)]
    written, advantages = randn(9) - 2, randn(9)
    written[4] = float("nan")
    for name, topk, tail, tau in cases:
        objective = Objective.of(
            name, kd_weight=0.6, temperature=tau, teacher_temperature=1.5, topk=topk,
            **({"tail": "bucket", "topk_from": "student"} if tail == "of_student" else {"tail": tail}),
        )  # fmt: skip
        rollout = None
        if name == "policy_gradient":
            rollout = RolloutTokens(written, advantages, 1.3, (0.2, 0.2), torch.zeros(9, dtype=torch.float64))

        def run(columns, head_t, reducer, objective=objective, rollout=rollout, compiled=None):
            leaves = [x.clone().requires_grad_() for x in (h_s, w_s[columns], b_s[columns])]
            head = OutputHead(leaves[1], leaves[2], softcap=8.0)
            out = fused_linear_distillation(
                leaves[0], head, h_t, head_t, labels, objective=objective, weights=weights, chunk_size=4, reducer=reducer,
                compiled=compiled, rollout=rollout,
            )  # fmt: skip
            out.loss.backward()
            log_q = [] if rollout is None else [rollout.student_log_probs.clone()]
            return (*out, *log_q), [leaf.grad for leaf in leaves]

        calls: list[str] = []
        whole, (dh, dw, db) = run(slice(None), w_t, None)
        compiled = ranks == 2 and compiler_found() and (name, topk, tau) == ("forward_kl", 0, 2.0)
        with counted(calls):
            part, (dh_p, dw_p, db_p) = run(mine, slice_t, reducer, compiled=compiled)
        # 8 positions, 4 a chunk, and the hidden states'
        assert len(calls) <= (7 if rollout else 5) * 2 + 1, f"{name} {topk} {tail}: {calls}"
        for one, other in ((dh_p, dh), (dw_p, dw[mine]), (db_p, db[mine]), *zip(part, whole, strict=True)):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=lambda m: f"{name} {topk} {tail}: {m}")  # noqa: B023

    log_probs, indices = (h_t @ w_t.T).log_softmax(-1).topk(4)
    for signal, local in (
        (TopK(log_probs, indices), TopK(log_probs, indices)),
        (Logits(h_t @ w_t.T), Logits((h_t @ w_t.T)[:, mine])),
    ):
        whole = fused_linear_distillation(h_s, w_s, None, None, labels, teacher=signal)
        part = fused_linear_distillation(h_s, w_s[mine], None, None, labels, teacher=local, reducer=reducer)
        torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-11)
    for unsliced in (
        {"student_head": w_s, "teacher": Logits((h_t @ w_t.T)[:, mine])},
        {"student_head": w_s[mine], "teacher": Logits(h_t @ w_t.T)},
        {"student_head": w_s[mine], "teacher_hidden": h_t, "teacher_head": w_t},
        {"student_head": w_s[mine], "teacher": local, "vocab_size": vocab - 1},
    ):
        taken = {"teacher_hidden": None, "teacher_head": None, "labels": labels, "reducer": reducer, **unsliced}
        try:
            fused_linear_distillation(h_s, **taken)
        except LimbeckError:
            continue
        raise AssertionError(f"taken: {unsliced.keys()}")
    # Both heads padded, cut as DTensor cuts, in half precision: the last rank's rows are fewer, and padding is never seen.
    parallel = VocabParallel(vocab, head_rows=vocab + 1)
    each = -(-(vocab + 1) // ranks)
    halves = [x.bfloat16() for x in (h_s, randn(vocab + 1, 5), h_t, randn(vocab + 1, 4))]
    for head in (halves[1], halves[3]):
        head[vocab:] = float("nan")
    held = slice(rank * each, (rank + 1) * each)
    one = fused_linear_distillation(*halves, labels, objective="js_divergence", vocab_size=vocab)
    h, w = halves[0].clone().requires_grad_(), halves[1][held].clone().requires_grad_()
    two = fused_linear_distillation(
        h, w, halves[2], halves[3][held], labels, objective="js_divergence", reducer=parallel
    )
    two.loss.backward()
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(h.grad).all() and torch.isfinite(w.grad).all()
    check_certain_teacher()
    check_aligned_slices()
    print(f"rank {rank} of {ranks} agrees")


with aligned_to(8), start_world():  # as on a GPU
    main(int(sys.argv[1]))
