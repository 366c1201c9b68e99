"""Across tokenizers: equal vocabularies give the ordinary loss, and different ones the definition, by float64 autograd."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from limbeck.errors import LimbeckError
from limbeck.objectives import (
    CrossTokenizer,
    Objective,
    OutputHead,
    Spans,
    Vocabularies,
    cross_tokenizer_distillation,
    divergence,
    fused_linear_distillation,
    names,
)
from limbeck.objectives.span_divergence import span_row

LONG = torch.int64


def ids(*values):
    return torch.tensor(values, dtype=LONG)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def same(size):
    return Vocabularies(size, size, torch.arange(size), torch.arange(size), ids(), ids())


def logits_of(hidden, head, size):
    z = hidden @ head.weight[:size].T
    z = (z if head.bias is None else z + head.bias[:size]) * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def drawn_spans(draw, count):
    """Lengths on both sides, and unaligned positions of the student between them."""
    lengths = st.integers(1, 3)
    student, teacher = [], []
    for number in range(count):
        student += [-1] * draw(st.integers(0, 1)) + [number] * draw(lengths)
        teacher += [number] * draw(lengths)
    return student + [-1] * draw(st.integers(0, 2)), teacher


@st.composite
def problems(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    student_span, teacher_span = drawn_spans(draw, draw(st.integers(0, 5)))
    common, v_s, v_t = draw(st.integers(1, 6)), draw(st.integers(6, 12)), draw(st.integers(6, 12))
    left, right = torch.randperm(v_s, generator=g), torch.randperm(v_t, generator=g)
    hidden = draw(st.integers(0, 1))  # special tokens that are compared with nothing
    vocabularies = Vocabularies(v_s, v_t, left[:common], right[:common], left[common + hidden :], right[common:])
    n, m = len(student_span), len(teacher_span)
    softcap = draw(st.sampled_from([None, 3.0]))
    head_s = OutputHead(
        randn(v_s + draw(st.integers(0, 2)), 5).requires_grad_(), None, softcap, draw(st.sampled_from([1.0, 0.5]))
    )
    head_t = OutputHead(randn(v_t + draw(st.integers(0, 2)), 7), None, draw(st.sampled_from([None, 4.0])))
    if draw(st.booleans()):
        bias = randn(head_s.weight.shape[0]).requires_grad_()
        head_s = OutputHead(head_s.weight, bias, softcap, head_s.scale)
        head_t = OutputHead(head_t.weight, randn(head_t.weight.shape[0]), head_t.softcap)
    count = max(student_span, default=-1) + 1
    weight = torch.rand(count, generator=g).float() if draw(st.booleans()) else torch.ones(count)
    return {
        "h_s": randn(n, 5).requires_grad_(),
        "head_s": head_s,
        "h_t": randn(m, 7),
        "head_t": head_t,
        "labels": torch.randint(0, v_s, (n,), generator=g),
        "teacher_labels": torch.randint(0, v_t, (m,), generator=g),
        "student_span": student_span,
        "teacher_span": teacher_span,
        "weight": weight,
        "weights": torch.rand(n, generator=g).float() if draw(st.booleans()) else None,
        "vocabularies": vocabularies,
    }


def is_text(problem):
    """Whether a text can be behind it: a span that one side writes with one token and the other with several does not begin
    with the same token on both sides."""
    pairs = set(
        zip(
            *(getattr(problem["vocabularies"], f"{side}_common").tolist() for side in ("student", "teacher")),
            strict=True,
        )
    )
    for number in range(len(problem["weight"])):
        ours, theirs = (
            [label for label, owner in zip(problem[labels].tolist(), problem[spans], strict=True) if owner == number]
            for labels, spans in (("labels", "student_span"), ("teacher_labels", "teacher_span"))
        )
        if (len(ours) == 1) != (len(theirs) == 1) and (ours[0], theirs[0]) in pairs:
            return False
    return True


def spans_of(problem):
    return Spans.of(
        np.array(problem["student_span"], dtype=np.int64),
        np.array(problem["teacher_span"], dtype=np.int64),
        problem["weight"].numpy().copy(),
    )


def solve(problem, cross, objective, **options):
    return cross_tokenizer_distillation(
        problem["h_s"], problem["head_s"], problem["h_t"], problem["head_t"], problem["labels"],
        problem["teacher_labels"], spans_of(problem), cross=cross, objective=objective, weights=problem["weights"],
        **options,
    )  # fmt: skip


def events(probabilities, tokens, also):
    """The row of one span, written out: {"span": …, token: …} from the distributions at all of its tokens."""
    row = dict(enumerate(probabilities[0]))
    product = math.prod([probabilities[i][token] for i, token in enumerate(tokens)], start=torch.ones(()).double())
    row["span"] = product
    row[tokens[0]] = row[tokens[0]] - product if len(tokens) > 1 else torch.zeros((), dtype=torch.float64)
    if also is not None and also != tokens[0]:
        row["span"] = row["span"] + row[also]
        row[also] = torch.zeros((), dtype=torch.float64)
    return row


def d_of(name, p, q):
    """Divergences written out, 0 · log 0 = 0."""
    xlogy = lambda a, b: torch.where(a > 0, a * torch.log(b.clamp_min(1e-300)), 0.0)  # noqa: E731
    kl = lambda a, b: (xlogy(a, a) - xlogy(a, b)).sum()  # noqa: E731
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    return 0.5 * kl(p, 0.5 * (p + q)) + 0.5 * kl(q, 0.5 * (p + q))


def sorted_l1(q, p):
    width = max(len(q), len(p))
    pad = lambda x: torch.nn.functional.pad(x.sort(descending=True).values, (0, width - len(x)))  # noqa: E731
    return (pad(q) - pad(p)).abs().sum()


def reference(problem, kind, merge, name, rest_weight, w, tau, tau_t, squared, normalizer):
    voc = problem["vocabularies"]
    z_s = logits_of(problem["h_s"], problem["head_s"], voc.student_size)
    z_t = logits_of(problem["h_t"], problem["head_t"], voc.teacher_size)
    q_all, p_all = (z_s / tau).softmax(-1), (z_t / tau_t).softmax(-1)
    u = torch.ones(len(z_s)).double() if problem["weights"] is None else problem["weights"].double()
    ce = (torch.nn.functional.cross_entropy(z_s, problem["labels"], reduction="none") * u).sum() if len(z_s) else 0.0
    pairs = dict(zip(voc.student_common.tolist(), voc.teacher_common.tolist(), strict=True))
    back = {theirs: ours for ours, theirs in pairs.items()}
    kd = torch.zeros((), dtype=torch.float64)
    for number, weight in enumerate(problem["weight"]):
        at_s = [i for i, owner in enumerate(problem["student_span"]) if owner == number]
        at_t = [i for i, owner in enumerate(problem["teacher_span"]) if owner == number]
        ours = [problem["labels"][i].item() for i in at_s]
        theirs = [problem["teacher_labels"][i].item() for i in at_t]
        if merge == "gold":
            q_row = dict(enumerate(q_all[at_s[0]] * math.prod([q_all[i][t] for i, t in zip(at_s[1:], ours[1:])])))  # noqa: B905
            p_row = dict(enumerate(p_all[at_t[0]] * math.prod([p_all[i][t] for i, t in zip(at_t[1:], theirs[1:])])))  # noqa: B905
        else:
            hybrid = kind == "hybrid"
            q_row = events(q_all[at_s], ours, back.get(theirs[0]) if hybrid and len(theirs) == 1 else None)
            p_row = events(p_all[at_t], theirs, pairs.get(ours[0]) if hybrid and len(ours) == 1 else None)
        stack = lambda row, keys: torch.stack([row[k] for k in keys]) if keys else torch.zeros(0).double()  # noqa: E731
        if kind == "uld":
            value = sorted_l1(stack(q_row, list(q_row)), stack(p_row, list(p_row)))
        else:
            first = ["span"] if merge == "span" else []
            q = stack(q_row, first + list(pairs))
            p = stack(p_row, first + list(pairs.values()))
            rest_q, rest_p = stack(q_row, voc.student_rest.tolist()), stack(p_row, voc.teacher_rest.tolist())
            if merge == "span":
                q, p = q / q.sum(), p / p.sum()
            value = d_of(name, p, q) + rest_weight * sorted_l1(rest_q, rest_p)
        kd = kd + weight.double() * value
    return ((1 - w) * ce + w * kd * (tau**2 if squared else 1)) / normalizer


@settings(max_examples=150, deadline=None)
@given(
    problem=problems(),
    kind=st.sampled_from(["hybrid", "hybrid", "uld"]),
    merge=st.sampled_from(["span", "span", "gold"]),
    name=st.sampled_from(["forward_kl", "reverse_kl", "js_divergence"]),
    rest_weight=st.sampled_from([0.0, 1.0, 0.3]),
    w=st.sampled_from([0.4, 1.0]),
    taus=st.tuples(st.sampled_from([1.0, 2.0]), st.sampled_from([1.0, 0.7])),
    squared=st.booleans(),
    chunk=st.sampled_from([None, 1, 2, 5]),
)
def test_loss_and_every_gradient_equal_autograd(problem, kind, merge, name, rest_weight, w, taus, squared, chunk):
    assume(is_text(problem))  # else the divergence is infinite
    cross = CrossTokenizer(problem["vocabularies"], kind, rest_weight, merge)
    objective = Objective.of(name, kd_weight=w, temperature=taus[0], teacher_temperature=taus[1], squared=squared)
    ours = solve(problem, cross, objective, normalizer=3.0, chunk_size=chunk).loss
    expected = reference(problem, kind, merge, name, rest_weight, w, *taus, squared, 3.0)
    torch.testing.assert_close(ours, torch.as_tensor(expected).double(), rtol=1e-9, atol=1e-10)
    if not len(problem["labels"]):
        return
    leaves = [problem["h_s"], problem["head_s"].weight]
    leaves += [] if problem["head_s"].bias is None else [problem["head_s"].bias]
    plain = torch.autograd.grad(expected, leaves, allow_unused=True)
    got = torch.autograd.grad(ours, leaves, retain_graph=True)
    again = torch.autograd.grad(ours * 3, leaves)  # a second backward, another scale
    for one, two, other in zip(got, again, plain, strict=True):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(two, other * 3, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in names() if not name.startswith("limbeck")])
@pytest.mark.parametrize("chunk", [None, 2])
def test_equal_tokenizers_give_exactly_the_ordinary_loss(name, chunk):
    g = torch.Generator().manual_seed(3)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    h_s, h_t, bias = randn(9, 4).requires_grad_(), randn(9, 6), randn(11).requires_grad_()
    head_s, head_t = OutputHead(randn(13, 4).requires_grad_(), None, 5.0, 0.5), OutputHead(randn(12, 6))
    head_s = OutputHead(head_s.weight, torch.cat([bias, bias[:2]]), 5.0, 0.5)
    labels, weights = torch.randint(0, 11, (9,), generator=g), torch.rand(9, generator=g)
    objective = Objective.of(name, kd_weight=0.6, temperature=2.0, teacher_temperature=1.5, squared=True)
    one = fused_linear_distillation(
        h_s, head_s, h_t, head_t, labels, objective=objective, vocab_size=11, weights=weights, normalizer=5.0
    )
    numbers = np.arange(9)
    other = cross_tokenizer_distillation(
        h_s, head_s, h_t, head_t, labels, labels, Spans.of(numbers, numbers, weights.numpy().copy()),
        cross=CrossTokenizer(same(11)), objective=objective, weights=weights, normalizer=5.0, chunk_size=chunk,
    )  # fmt: skip
    for field in ("loss", "kd", "ce", "top1_agreement", "student_entropy", "teacher_entropy"):
        torch.testing.assert_close(getattr(other, field), getattr(one, field), rtol=0, atol=1e-12)
    leaves = [h_s, head_s.weight, bias]
    for mine, theirs in zip(*(torch.autograd.grad(loss.loss, leaves) for loss in (other, one)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_a_row_is_the_law_of_what_is_written():
    """Q is the joint law of the first two tokens, summed over what the row does not tell apart."""
    g = torch.Generator().manual_seed(1)
    first, second = (torch.randn(n, 5, generator=g).double().softmax(-1) for n in (1, 5))
    joint = first[0].unsqueeze(-1) * second  # second[v]: after v
    token, then = 3, 1
    row = span_row(first.log(), ids(token), second[token, then].log()[None], torch.tensor([True])).exp()[0]
    expected = torch.cat([joint[token, then][None], joint.sum(-1)])
    expected[1 + token] -= joint[token, then]
    torch.testing.assert_close(row, expected)
    assert row.sum().item() == pytest.approx(1, abs=1e-12)


def test_the_worked_example_of_gold_and_ours():
    """P₀ = (.6, .3, .1) and P(rest | first) = .9: scaled it sums to .9; as a law of the span it sums to 1."""
    first, rest = f64([[0.6, 0.3, 0.1]]), f64([0.9])
    row = span_row(first.log(), ids(0), rest.log(), torch.tensor([True])).exp()
    torch.testing.assert_close(row, f64([[0.54, 0.06, 0.3, 0.1]]))
    # GOLD's row against itself without the scale: Σ p log(p / q) = .9 log .9 on the common tokens
    z = torch.eye(3).double()
    heads = OutputHead(z), OutputHead(z)
    spans = Spans.of(np.array([0]), np.array([0, 0]), np.ones(1, dtype=np.float32))
    later = f64([[math.log(0.9), math.log(0.05), math.log(0.05)]])
    loss = cross_tokenizer_distillation(
        first.log(), heads[0], torch.cat([first.log(), later]), heads[1], ids(0), ids(0, 0), spans,
        cross=CrossTokenizer(same(3), merge="gold"), objective=Objective.of("forward_kl", kd_weight=1.0),
    )  # fmt: skip
    assert loss.kd.item() == pytest.approx(0.9 * math.log(0.9), abs=1e-12)
    assert loss.teacher_entropy.item() == pytest.approx(-sum(p * math.log(p) for p in (0.54, 0.27, 0.09)), abs=1e-12)


def test_uld_has_its_golden_value_and_does_not_see_an_order():
    p, q = f64([[0.6, 0.3, 0.1]]).log(), f64([[0.2, 0.5, 0.3]]).log()
    spans = Spans.of(np.array([0]), np.array([0]), np.ones(1, dtype=np.float32))
    for order in ([0, 1, 2], [2, 0, 1]):
        head = torch.eye(3).double()[order]
        loss = cross_tokenizer_distillation(
            q, torch.eye(3).double(), p, head, ids(0), ids(0), spans,
            cross=CrossTokenizer(same(3), "uld"), objective=Objective.of(kd_weight=1.0),
        )  # fmt: skip
        assert loss.loss.item() == pytest.approx(0.2, abs=1e-12)


def test_models_that_say_the_same_have_no_divergence_however_they_cut_it():
    """The student's "ab" is the teacher's "a" "b". The teacher alone begins with a "b", which is compared with nothing."""
    teacher, after_a = f64([0.6, 0.1, 0.3]), f64([0.2, 0.75, 0.05])  # of a, b, c
    student = f64([0.6 * 0.75, 0.6 * 0.25, 0.3]) / 0.9  # of ab, a, c
    q, eye = student.log()[None].requires_grad_(), torch.eye(3, dtype=torch.float64)
    loss = cross_tokenizer_distillation(
        q, eye, torch.stack([teacher, after_a]).log(), eye, ids(0), ids(0, 1),
        Spans.of(np.array([0]), np.array([0, 0]), np.ones(1, dtype=np.float32)),
        cross=CrossTokenizer(Vocabularies(3, 3, ids(1, 2), ids(0, 2), ids(), ids())),
        objective=Objective.of(kd_weight=1.0),
    )  # fmt: skip
    assert loss.loss.item() == pytest.approx(0, abs=1e-12)
    loss.loss.backward()
    assert q.grad.abs().max() < 1e-12


@pytest.mark.parametrize(("first", "agrees"), [((0.6, 0.1, 0.3), 1.0), ((0.3, 0.1, 0.6), 0.0)])
def test_two_rows_agree_on_a_span_only_if_it_is_the_likeliest_entry_of_both(first, agrees):
    """The student's "ab" is the teacher's "a" "b", and "c" is a token of both."""
    teacher, after_a = f64(first), f64([0.05, 0.9, 0.05])  # of a, b, c
    eye = torch.eye(3, dtype=torch.float64)
    loss = cross_tokenizer_distillation(
        f64([[0.6, 0.3, 0.1]]).log(), eye, torch.stack([teacher, after_a]).log(), eye, ids(0), ids(0, 1),
        Spans.of(np.array([0]), np.array([0, 0]), np.ones(1, dtype=np.float32)),
        cross=CrossTokenizer(Vocabularies(3, 3, ids(1, 2), ids(0, 2), ids(), ids())), objective=Objective.of(),
    )  # fmt: skip
    assert loss.top1_agreement.item() == agrees


@settings(max_examples=25, deadline=None)
@given(problem=problems(), cut=st.integers(0, 5))
def test_micro_batches_add_up_to_the_batch(problem, cut):
    cross, objective = CrossTokenizer(problem["vocabularies"]), Objective.of("js_divergence", kd_weight=0.6)
    whole = solve(problem, cross, objective, normalizer=7.0)
    spans = len(problem["weight"])
    cut = min(cut, spans)
    s_cut = next((i for i, n in enumerate(problem["student_span"]) if n >= cut), len(problem["labels"]))
    t_cut = next((i for i, n in enumerate(problem["teacher_span"]) if n >= cut), len(problem["teacher_labels"]))
    total = 0.0
    for s, t, g in (
        (slice(None, s_cut), slice(None, t_cut), slice(None, cut)),
        (slice(s_cut, None), slice(t_cut, None), slice(cut, None)),
    ):
        part = {
            **problem,
            "h_s": problem["h_s"][s],
            "h_t": problem["h_t"][t],
            "labels": problem["labels"][s],
            "teacher_labels": problem["teacher_labels"][t],
            "student_span": [n - (g.start or 0) if n >= 0 else -1 for n in problem["student_span"][s]],
            "teacher_span": [n - (g.start or 0) for n in problem["teacher_span"][t]],
            "weight": problem["weight"][g],
            "weights": None if problem["weights"] is None else problem["weights"][s],
        }
        total = total + solve(part, cross, objective, normalizer=7.0).loss
    torch.testing.assert_close(total, whole.loss, rtol=1e-10, atol=1e-12)
    if len(problem["labels"]):
        leaves = [problem["h_s"], problem["head_s"].weight]
        for one, other in zip(*(torch.autograd.grad(x, leaves) for x in (total, whole.loss)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["hybrid", "uld"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js_divergence"])
def test_a_student_that_is_sure_of_a_spans_rest_keeps_finite_gradients(name, kind):
    h = torch.tensor([[4.0, 0.0], [200.0, 0.0]]).requires_grad_()
    head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).requires_grad_()
    loss = cross_tokenizer_distillation(
        h, head, torch.tensor([[0.0, 1.0]]), head.detach(), ids(0, 0), ids(1),
        Spans.of(np.array([0, 0]), np.array([0]), np.ones(1, dtype=np.float32)),
        cross=CrossTokenizer(same(3), kind), objective=Objective.of(name, kd_weight=1.0),
    )  # fmt: skip
    loss.loss.backward()
    assert 0 <= loss.loss.item() < 100
    assert h.grad.isfinite().all() and head.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_compared_in_float32(dtype):
    g = torch.Generator().manual_seed(2)
    h_s, w_s = (torch.randn(n, 8, generator=g).to(dtype).requires_grad_() for n in (6, 30))
    h_t, w_t = (torch.randn(n, 8, generator=g).to(dtype) for n in (7, 20))
    spans = Spans.of(np.array([0, 0, 1, 2, 3, 3]), np.array([0, 1, 1, 2, 2, 3, 3]), np.ones(4, dtype=np.float32))
    vocabularies = Vocabularies(30, 20, torch.arange(15), torch.arange(15), torch.arange(15, 30), torch.arange(15, 20))
    labels, theirs = torch.randint(0, 30, (6,), generator=g), torch.randint(0, 20, (7,), generator=g)
    objective, cross = Objective.of(kd_weight=0.5), CrossTokenizer(vocabularies)

    def run(*tensors):
        a, b, c, d = tensors
        return cross_tokenizer_distillation(a, b, c, d, labels, theirs, spans, cross=cross, objective=objective)

    low = run(h_s, w_s, h_t, w_t)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (h_s, w_s, h_t, w_t)]
    high = run(*exact)
    assert low.loss.dtype is torch.float32
    assert low.loss.item() == pytest.approx(high.loss.item(), rel=2e-2)
    got = torch.autograd.grad(low.loss, [h_s, w_s])
    for one, other in zip(got, torch.autograd.grad(high.loss, exact[:2]), strict=True):
        assert one.dtype is dtype
        torch.testing.assert_close(one.double(), other, rtol=0.1, atol=5e-3)


def test_what_needs_one_vocabulary_is_refused():
    spans = Spans.of(np.array([0]), np.array([0]), np.ones(1, dtype=np.float32))
    arguments = (torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, 2), torch.zeros(3, 2), ids(0), ids(0), spans)
    for objective in (Objective.of(topk=2), Objective.of("k1")):
        with pytest.raises(LimbeckError, match="compares whole distributions"):
            cross_tokenizer_distillation(*arguments, cross=CrossTokenizer(same(3)), objective=objective)
    with pytest.raises(LimbeckError, match="the student's vocabulary of 4 does not fit the 3 rows"):
        cross_tokenizer_distillation(*arguments, cross=CrossTokenizer(same(4)), objective=Objective.of())
    with pytest.raises(LimbeckError, match="no kind 'gold'; use uld or hybrid"):
        CrossTokenizer(same(3), "gold")


def test_a_closed_form_agrees_on_one_token_spans():
    """Spans of one token and equal vocabularies: the divergence of whole logits."""
    g = torch.Generator().manual_seed(5)
    z_s, z_t = torch.randn(4, 6, generator=g).double(), torch.randn(4, 6, generator=g).double()
    eye, labels = torch.eye(6).double(), torch.randint(0, 6, (4,), generator=g)
    numbers = np.arange(4)
    loss = cross_tokenizer_distillation(
        z_s, eye, z_t, eye, labels, labels, Spans.of(numbers, numbers, np.ones(4, dtype=np.float32)),
        cross=CrossTokenizer(same(6)), objective=Objective.of("tvd", kd_weight=1.0),
    )  # fmt: skip
    assert loss.loss.item() == pytest.approx(divergence("tvd")(z_s, z_t).mean().item(), abs=1e-12)
