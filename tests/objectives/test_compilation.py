"""The compiled pass differs from the plain one by rounding only, and its absence by nothing but time."""

import os
import subprocess
import sys

import pytest
import torch

from limbeck.objectives import Objective, OutputHead, compiler_found, fused_linear_distillation

needs_compiler = pytest.mark.skipif(not compiler_found(), reason="there is no C++ compiler")


def problem(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    h_s, h_t = randn(23, 8).requires_grad_(), randn(23, 8)
    student = OutputHead(randn(530, 8).requires_grad_(), randn(530).requires_grad_(), softcap=6.0, scale=0.5)
    labels = torch.randint(0, 500, (23,), generator=g)
    labels[::4] = -100
    return h_s, student, h_t, OutputHead(randn(500, 8)), labels


@needs_compiler
@pytest.mark.parametrize(
    ("objective", "dtype"),
    [
        (Objective.of("js_divergence", temperature=2.0, squared=True), torch.bfloat16),
        pytest.param(Objective.of("adaptive_kl"), torch.float32, marks=pytest.mark.slow),
        pytest.param(Objective.of("forward_kl", topk=7, tail="bucket"), torch.float32, marks=pytest.mark.slow),
        (Objective(lambda p, q, log_p, log_q: ((q - p) ** 2 / 2, q * (q - p))), torch.float32),
    ],
    ids=["dense", "sorted", "sparse", "of a user"],
)
def test_compiled_and_plain_agree_for_every_chunk(objective, dtype):
    results = []
    for compiled, chunk in ((False, None), (True, None), (True, 5)):
        h_s, student, h_t, teacher, labels = problem(dtype)
        out = fused_linear_distillation(
            h_s, student, h_t, teacher, labels, objective=objective, chunk_size=chunk, compiled=compiled
        )
        out.loss.backward()
        results.append((*out, h_s.grad, student.weight.grad, student.bias.grad))
    tight = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(two, one, **tight)


@pytest.mark.processes
def test_a_failing_compiler_warns_once_and_the_loss_is_the_same(tmp_path):
    script = """
import torch, warnings
from limbeck.objectives import fused_linear_distillation
torch.manual_seed(0)
h, w = torch.randn(6, 4), torch.randn(40, 4)
args = (h, w, h.flip(0), w, torch.arange(6))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    losses = [fused_linear_distillation(*args, compiled=compiled).loss.item() for compiled in (False, True, True)]
assert losses[0] == losses[1] == losses[2], losses
print(sum("runs uncompiled" in str(w.message) for w in caught))
"""
    environment = {**os.environ, "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == "1"
