"""The kernels equal the definition in float64: in Triton's interpreter without a GPU, and on the GPU where there is one."""

import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused import problem, reference

from limbeck.objectives import (
    Logits,
    Objective,
    OutputHead,
    compilation,
    fused_autograd,
    fused_linear_distillation,
    kernels,
    make_divergence,
    names,
    register,
)
from limbeck.objectives.elementwise import ElementwiseSpec, TileInputs, elementwise_pass
from limbeck.objectives.kernels.source import Untranslatable, translate
from limbeck.objectives.output_head import LogitTransform
from limbeck.objectives.vocab_parallel import NO_SHARDING

pytest.importorskip("triton", reason="kernels are written in Triton")
ELEMENTWISE = [name for name in names() if not getattr(make_divergence(name), "needs_vocab_reduction", False)]


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter covers every head and branch. On a GPU each of them is another kernel, which takes a second to compile, so
# the examples of a divergence share one there.
VOCABULARIES = [2, 3, 30, 64, 2049, 4500] if INTERPRETED else [2049, 4500]
WEIGHTS = [0.0, 0.3, 1.0] if INTERPRETED else [0.3, 1.0]
TEMPERATURES = [0.5, 1.0, 2.0] if INTERPRETED else [0.5, 2.0]
HEADS = st.tuples(st.booleans(), st.sampled_from([None, 3.0]), st.sampled_from([1.0, 0.25]))


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="runs in a process with the interpreter")),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
    scope="module",
)
def device(request):
    return request.param


@pytest.mark.processes
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_this_file_holds_in_the_interpreter():
    # Triton decides for one of both when it is first imported, hence the process.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--disable-warnings", "-p", "no:cacheprovider", "-k", "cpu"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "passed" in done.stdout


@pytest.fixture(autouse=True)
def _no_fallback_yet(monkeypatch):
    monkeypatch.setattr(kernels, "fallback_reasons", set())
    monkeypatch.setattr(kernels, "_build_failed", False)
    monkeypatch.setattr(compilation.CompiledPass, "failed", True)  # the fallback is not compiled, which saves time


def to(device, head, dtype=torch.float32):
    move = lambda x: None if x is None else x.detach().to(device, dtype).requires_grad_(x.requires_grad)  # noqa: E731
    return OutputHead(move(head.weight), move(head.bias), head.softcap, head.scale)


def run(device, h_s, head_s, h_t, head_t, labels, *, dtype=torch.float32, uses=True, **options):
    """The loss by the kernel, and the leaves of which it has gradients."""
    h_s, h_t = h_s.detach().to(device, dtype).requires_grad_(), h_t.to(device, dtype)
    head_s, head_t = to(device, head_s, dtype), to(device, head_t, dtype)
    with patch.object(kernels, "launch", wraps=kernels.launch) as launched:
        out = fused_linear_distillation(h_s, head_s, h_t, head_t, labels.to(device), compiled=True, **options)
    assert launched.called == uses
    return out, [x for x in (h_s, head_s.weight, head_s.bias) if x is not None]


def close(ours, exact, rtol=2e-4, atol=2e-5):
    torch.testing.assert_close(ours.detach().double().cpu(), exact.detach(), rtol=rtol, atol=atol)


def assert_both_equal(device, given, *, vocab, name, w=0.5, taus=(1.0, None), squared=False, **options):
    h_s, head_s, h_t, head_t, labels = given
    objective = Objective.of(name, kd_weight=w, temperature=taus[0], teacher_temperature=taus[1], squared=squared)
    out, leaves = run(device, *given, objective=objective, vocab_size=vocab, **options)
    expected = reference(h_s, head_s, h_t, head_t, labels, vocab, name, w, *taus, squared, 0)
    close(out.loss, expected)
    exact = torch.autograd.grad(expected, [x for x in (h_s, head_s.weight, head_s.bias) if x is not None])
    for one, other in zip(torch.autograd.grad(out.loss * 3, leaves), exact, strict=True):
        close(one, other * 3)


@pytest.mark.parametrize("name", ELEMENTWISE)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 4),
    vocab=st.sampled_from(VOCABULARIES),
    pads=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    chunk=st.sampled_from([None, 1, 3]),
    w=st.sampled_from(WEIGHTS),
    taus=st.tuples(st.sampled_from(TEMPERATURES), st.sampled_from([None, 1.0, 3.0])),
    squared=st.booleans(),
    head=HEADS if INTERPRETED else st.just((True, 3.0, 0.25)),
)
def test_loss_and_every_gradient_equal_autograd_in_float64(
    device, name, seed, n, vocab, pads, chunk, w, taus, squared, head
):
    bias, softcap, scale = head
    given = problem(seed, n, vocab, *pads, bias=bias, softcap=softcap, scale=scale)
    given[-1][0] = seed % vocab  # something is supervised
    assert_both_equal(device, given, vocab=vocab, name=name, w=w, taus=taus, squared=squared, chunk_size=chunk)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(  # of the even vocabulary one kernel of two passes over the logits, and one of three
    ("name", "vocab"), [*((name, 151_665) for name in ELEMENTWISE), ("forward_kl", 128_256), ("js_divergence", 128_256)]
)
def test_a_real_vocabulary_on_the_gpu_equals_float64(name, vocab):
    given = problem(1, 40, vocab, 7, 271, bias=False, softcap=None, scale=1.0)
    assert_both_equal("cuda", given, vocab=vocab, name=name, taus=(2.0, 1.5))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_inputs_stay_close_to_float64(device, dtype, tolerance):
    given = problem(7, 24, 300, 0, 0, bias=True, softcap=None, scale=1.0)
    exact = fused_linear_distillation(*given)
    out, leaves = run(device, *given, dtype=dtype, chunk_size=10)
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=tolerance)
    truth = torch.autograd.grad(exact.loss, [given[0], given[1].weight, given[1].bias])
    for one, other in zip(torch.autograd.grad(out.loss, leaves), truth, strict=True):
        assert one.dtype is dtype
        assert (one.double().cpu() - other).norm() / other.norm() < tolerance * 2


def test_diagnostics_weights_and_validation_equal_the_plain_pass(device):
    given = problem(5, 9, 2100, 0, 0, bias=False, softcap=None, scale=1.0)
    given[3].weight[:, :6] = given[1].weight.detach()
    given[2][:5] = torch.nn.functional.pad(given[0][:5].detach(), (0, 4))  # both models agree there
    weights = torch.rand(9, dtype=torch.float64)
    options = {"objective": "js_divergence", "temperature": 2.0}
    exact = fused_linear_distillation(*given, weights=weights, **options)
    for validating in (False, True):
        with torch.set_grad_enabled(not validating):
            out, _ = run(device, *given, weights=weights.to(device, torch.float32), **options)
        assert out.loss.requires_grad != validating
        for name in out._fields:
            close(getattr(out, name), getattr(exact, name))
    assert 0 < exact.top1_agreement < 1


def test_cross_entropy_alone_needs_no_teacher(device):
    h_s, head_s, *_, labels = problem(5, 6, 2100, 0, 0, bias=False, softcap=None, scale=1.0)
    h = h_s.detach().to(device, torch.float32).requires_grad_()
    with patch.object(kernels, "launch", wraps=kernels.launch) as launched:
        out = fused_linear_distillation(
            h, to(device, head_s), None, None, labels.to(device), kd_weight=0.0, compiled=True
        )
    assert launched.called
    exact = torch.nn.functional.cross_entropy(h_s @ head_s.weight.T, labels)
    close(out.loss, exact)
    close(torch.autograd.grad(out.loss, h)[0], torch.autograd.grad(exact, h_s)[0])


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_impossible_and_vanishing_tokens_stay_finite(device, name):
    head = OutputHead(torch.tensor([[0.0], [-400.0], [1.0], [0.0]], device=device, requires_grad=True), None)
    head = OutputHead(head.weight, torch.tensor([0.0, 0.0, 0.0, -math.inf], device=device))
    signal = Logits(torch.tensor([[0.0, -300.0, -1.0, -math.inf]], device=device))
    hidden, labels = (
        torch.ones(1, 1, device=device, requires_grad=True),
        torch.zeros(1, dtype=torch.long, device=device),
    )
    with patch.object(kernels, "launch", wraps=kernels.launch) as launched:
        out = fused_linear_distillation(hidden, head, None, None, labels, teacher=signal, objective=name, compiled=True)
    out.loss.backward()
    assert launched.called
    assert torch.isfinite(out.loss)
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(head.weight.grad).all()


def spec_of(divergence_fn, dtype, kd_weight=0.4):
    return ElementwiseSpec(Objective(divergence_fn, kd_weight), LogitTransform(), LogitTransform(), True, dtype)


def tile(z, t, dtype, device):
    n = len(z)
    ones = torch.ones(n, 1, dtype=dtype, device=device)
    target = torch.zeros(n, dtype=torch.long, device=device)
    return TileInputs(z.to(dtype), None, t.to(dtype), None, None, None, target, ones, torch.tensor(0.5).to(ones))


def assert_pass_equals(device, terms, vocab=2100, **changes):
    z, t = torch.randn(2, vocab, device=device) * 4, torch.randn(2, vocab, device=device) * 4
    exact = tile(z, t, torch.float64, device)
    stats, _ = elementwise_pass(spec_of(terms, torch.float64, **changes))(*exact)
    ours = tile(z, t, torch.float32, device)
    actual, _ = kernels.launch(ours, spec_of(terms, torch.float32, **changes), translate(terms))
    torch.testing.assert_close(actual.double(), stats, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.z.double(), exact.z, rtol=1e-4, atol=1e-7)


def test_the_kernel_gives_the_students_log_probabilities_of_written_labels(device):
    """Except in a row of weight 0, in which they are not known."""
    z, t = torch.randn(3, 300, device=device) * 4, torch.randn(3, 300, device=device) * 4
    target, weight = torch.tensor([5, 7, 299], device=device), torch.tensor([[1.0], [0.0], [0.25]], device=device)
    found, expected = torch.zeros(3, 1, device=device), z.log_softmax(-1).gather(-1, target[:, None])
    one = tile(z, t, torch.float32, device)._replace(target=target, weight=weight, student_log_probs=found)
    terms = make_divergence("forward_kl")
    spec = replace(spec_of(terms, torch.float32), rollout_temperature=1.0)
    run = kernels.kernel_pass(spec, NO_SHARDING, z.device)
    run(elementwise_pass(spec), one)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)
    assert found[1].isnan()
    assert kernels.kernel_pass(replace(spec, rollout_temperature=0.5), NO_SHARDING, z.device) is None


def test_a_formula_of_many_operations_is_translated(device):
    def terms(p, q, log_p, log_q):
        a = torch.where((p > q) & ~(q >= 0.5), p**2, torch.square(q)).clamp(1e-6, 0.9)
        b = torch.log1p(q) * torch.expm1(-p) + torch.tanh(log_q / 50) * torch.sigmoid(log_p)
        c = torch.logaddexp(log_p, log_q).exp() + (p != 0).to(p.dtype) * torch.sqrt(p) + torch.zeros_like(q)
        d = (
            p.clamp_min(1e-4) ** 0.3
            + 2**q
            - q.reciprocal().clamp_max(3.0)
            + 1 / (1 + p)
            + (p < q) * q.pow(-2).minimum(p)
        )
        return a + b * c, torch.sub(c, d, alpha=2) * q + torch.sign(p - q) * torch.rsqrt(1 + q) * q

    assert_pass_equals(device, terms)


@pytest.mark.parametrize("function", [torch.log1p, torch.expm1, torch.tanh])
def test_small_numbers_keep_their_digits(device, function):
    small = lambda x: 1e3 * function(x * 1e-3)  # noqa: E731
    assert_pass_equals(device, lambda p, q, log_p, log_q: (small(p), small(q)), kd_weight=1.0)
    assert_pass_equals(device, lambda p, q, log_p, log_q: (function(-log_q / 8) * 1e-3, function(-log_p / 8) * 1e-3))


def test_columns_behind_a_row_are_its_own_padding_or_untouched(device):
    terms, z, t = make_divergence("reverse_kl"), torch.randn(2, 37), torch.randn(2, 37)
    exact = tile(z, t, torch.float64, "cpu")
    elementwise_pass(spec_of(terms, torch.float64))(*exact)
    for width in (40, 48, 60):
        memory = torch.full((2, width), 7.0, device=device)
        memory[:, :37] = z
        ours = tile(memory[:, :37], t.to(device), torch.float32, device)
        kernels.launch(ours, spec_of(terms, torch.float32), translate(terms))
        close(memory[:, :37], exact.z)
        behind = memory[:, 48:] if width >= 48 else memory[:, 37:]
        assert (behind == 7).all()


def test_parameters_are_compiled_in_and_the_same_ones_only_once():
    assert translate(make_divergence("js_divergence", beta=0.3)) is translate(
        make_divergence("js_divergence", beta=0.3)
    )
    assert translate(make_divergence("js_divergence", beta=0.3)) is not translate(
        make_divergence("js_divergence", beta=0.4)
    )


def test_the_weights_sum_is_known_where_it_follows_from_the_formula():
    assert translate(make_divergence("forward_kl")).weight_sum == -1
    assert translate(make_divergence("js_divergence")).weight_sum is None
    assert translate(lambda p, q, log_p, log_q: (p, 3 * (q - 2 * p))).weight_sum == -3


def test_a_function_whose_numbers_change_is_translated_again_and_given_up_if_it_goes_on():
    at = {"t": 0.0}
    terms = lambda p, q, log_p, log_q: (p * at["t"], q * at["t"])  # noqa: E731
    for t in (0.1, 0.2, 0.3, 0.4):
        at["t"] = t
        assert translate(terms).weight_sum == t
    at["t"] = 0.1
    assert translate(terms).weight_sum == 0.1
    at["t"] = 0.5
    with pytest.raises(Untranslatable, match="change from call to call"):
        translate(terms)


OWN = torch.tensor(0.3)


@pytest.mark.parametrize(
    "terms",
    [
        lambda p, q, log_p, log_q: (p - p.mean(-1, keepdim=True), q),
        lambda p, q, log_p, log_q: (p / p.shape[-1], q),
        lambda p, q, log_p, log_q: (p * OWN, q),
        lambda p, q, log_p, log_q: (p if (p > 2).any() else q, q),
        lambda p, q, log_p, log_q: (p.double(), q),
        lambda p, q, log_p, log_q: (p.cumsum(-1), q),
        lambda p, q, log_p, log_q: (torch.rand_like(p), q),
        lambda p, q, log_p, log_q: (p + float("nan"), q),
        lambda p, q, log_p, log_q: (p * 1e-40, q),
        lambda p, q, log_p, log_q: (p[:, :1], q),
        lambda p, q, log_p, log_q: p,
        make_divergence("adaptive_kl"),
        make_divergence("taid"),
    ],
)
def test_what_is_not_elementwise_is_refused(terms):
    with pytest.raises(Untranslatable):
        translate(terms)


@pytest.fixture
def centred():
    @register
    def centred_chi():
        def terms(p, q, log_p, log_q):
            return (q - p) ** 2 / p.amax(-1, keepdim=True), 2 * q * (q - p) / p.amax(-1, keepdim=True)

        return terms

    return "centred_chi"


def test_an_untranslatable_divergence_warns_once_and_runs_in_pytorch(device, centred):
    given = problem(2, 6, 40, 0, 0, bias=False, softcap=None, scale=1.0)
    with pytest.warns(UserWarning, match=r"no kernel, because .*amax") as caught:
        for _ in range(2):
            out, _ = run(device, *given, objective=centred, uses=False)
    assert sum("kernel" in str(one.message) for one in caught) == 1
    close(out.loss, fused_linear_distillation(*given, objective=centred).loss)


def test_a_kernel_that_cannot_be_built_warns_once_and_is_not_tried_again(device, monkeypatch):
    def fail(*_):
        raise OSError("there is no C compiler")

    given = problem(2, 6, 40, 0, 0, bias=False, softcap=None, scale=1.0)
    monkeypatch.setattr(kernels, "launch", fail)
    with pytest.warns(UserWarning, match="there is no C compiler") as caught:
        for uses in (True, False):  # it is not tried again
            out, _ = run(device, *given, uses=uses)
    assert sum("kernel" in str(one.message) for one in caught) == 1
    close(out.loss, fused_linear_distillation(*given).loss)


def test_without_triton_nothing_changes(device, monkeypatch):
    given = problem(2, 6, 40, 0, 0, bias=False, softcap=None, scale=1.0)
    monkeypatch.setattr(kernels, "_installed", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # of PyTorch's compiler when it is first imported
        out, _ = run(device, *given, uses=False)
    close(out.loss, fused_linear_distillation(*given).loss)


def test_top_k_sampled_tokens_and_float64_are_left_to_the_plain_pass(device):
    given = problem(2, 6, 40, 0, 0, bias=False, softcap=None, scale=1.0)
    run(device, *given, objective=Objective.of("forward_kl", topk=3), uses=False)
    run(device, *given, objective="k3", uses=False)
    run(device, *given, dtype=torch.float64, uses=False)


def test_a_bfloat16_head_summed_in_its_own_precision_stays_close(monkeypatch):
    given = problem(7, 64, 300, 0, 0, bias=False, softcap=None, scale=1.0)
    exact = fused_linear_distillation(*given)
    truth = torch.autograd.grad(exact.loss, given[1].weight)[0]
    halves = problem(7, 64, 300, 0, 0, bias=False, softcap=None, scale=1.0, dtype=torch.bfloat16)
    errors = []
    for chunks in (0, 8):
        monkeypatch.setattr(fused_autograd, "_NARROW_CHUNKS", {"cpu": chunks})
        loss = fused_linear_distillation(*halves, chunk_size=8).loss / 3
        ours = torch.autograd.grad(loss, halves[1].weight)[0]
        assert ours.dtype is torch.bfloat16
        errors.append(((ours.double() * 3 - truth).norm() / truth.norm()).item())
    assert errors[1] < 2 * errors[0] < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rescaling_multiplies_each_element_once_and_leaves_memory_alone_for_a_scale_of_one(device, dtype):
    x = torch.randn(3, 5000, device=device).to(dtype)
    before = x.clone()
    assert kernels.rescale(x, torch.tensor(1.0, device=device))
    assert torch.equal(x, before)
    assert kernels.rescale(x, torch.tensor(-0.3, device=device))
    torch.testing.assert_close(x.float(), before.float() * -0.3, rtol=1e-7 if dtype is torch.float32 else 2**-7, atol=0)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from limbeck.objectives.divergences import make_divergence
from limbeck.objectives.kernels import BLOCK, WARPS
from limbeck.objectives.kernels.fused_kernel import fused_loss_kernel
from limbeck.objectives.kernels.source import translate

for name, cap in (("forward_kl", None), ("js_divergence", 30.0), ("alpha_beta", None)):
    constants = {
        "t_bias": None, "divergence_fn": translate(make_divergence(name)).divergence_fn, "z_scale": 0.5, "z_cap": cap,
        "t_scale": 1.0, "t_cap": None, "TEMPERED": True, "GRADIENT": True, "WEIGHT_SUM_KNOWN": False, "STATS": 8,
        "BLOCK": BLOCK,
    }
    kinds = {"z": "*bf16", "t": "*bf16", "target": "*i64", "z_bias": "*fp32", "weight": "*fp32", "factor": "*fp32",
             "stats": "*fp32", **dict.fromkeys(("rate", "t_rate", "ce_scale", "kd_scale", "weight_sum"), "fp32")}
    whole = [fused_loss_kernel.arg_names.index(x) for x in ("z", "t", "z_stride", "t_stride", "z_readable", "t_readable")]
    source = ASTSource(
        fused_loss_kernel,
        {x: "constexpr" if x in constants else kinds.get(x, "i32") for x in fused_loss_kernel.arg_names},
        {(fused_loss_kernel.arg_names.index(x),): value for x, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in whole},
    )
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    print("cp.async.cg.shared.global" in ptx and "st.global.v4" in ptx)  # both move 16 bytes
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux" or INTERPRETED, reason="Triton's compiler is for Linux")
def test_the_compiler_takes_the_kernels_for_a_hopper_gpu_and_reads_whole_vectors(tmp_path):
    # In a process of its own, which does not see a GPU that may be there.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 3, done.stderr
