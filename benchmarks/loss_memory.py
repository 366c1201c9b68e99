"""Memory of the loss: how far the process's peak grows above weights and gradients, fused against whole logits.

    python benchmarks/loss_memory.py

1024 tokens, hidden size 512 for both models, vocabulary 151 936, float32, cross-entropy + forward KL, forward and backward.
Each way runs in a process of its own, so that one's peak does not hide the other's. The gradient of the head is counted as a
gradient: it is made before the measurement begins.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

TOKENS, HIDDEN, VOCAB = 1024, 512, 151_936


def resident_mb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def measure(way: str) -> None:
    import torch

    from limbeck import fused_linear_distillation

    torch.manual_seed(0)
    h_s, h_t = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.randn(TOKENS, HIDDEN)
    w_s, w_t = torch.randn(VOCAB, HIDDEN).div_(20).requires_grad_(), torch.randn(VOCAB, HIDDEN).div_(20)
    labels = torch.randint(0, VOCAB, (TOKENS,))

    def fused() -> torch.Tensor:
        return fused_linear_distillation(h_s, w_s, h_t, w_t, labels).loss

    def naive() -> torch.Tensor:
        z_s, z_t = h_s @ w_s.T, h_t @ w_t.T
        ce = torch.nn.functional.cross_entropy(z_s, labels)
        kd = torch.nn.functional.kl_div(
            z_s.log_softmax(-1), z_t.log_softmax(-1), reduction="batchmean", log_target=True
        )
        return 0.5 * ce + 0.5 * kd

    # The gradients' memory is there before; the fused loss makes its own and hands it over, so one copy is set aside.
    spare = [torch.ones_like(w_s), torch.ones_like(h_s)]
    torch.mm(h_s[:8].detach(), h_s[:8].detach().T)  # the matrix library's own buffers
    before = resident_mb()
    del spare
    begun = time.perf_counter()
    loss = {"fused": fused, "naive": naive}[way]()
    loss.backward()
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"growth_mb": peak - before, "seconds": seconds, "loss": loss.item()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=("fused", "naive"), help="measure one way in this process")
    args = parser.parse_args()
    if args.way:
        measure(args.way)
        return
    found = {}
    for way in ("fused", "naive"):
        output = subprocess.run([sys.executable, __file__, "--way", way], capture_output=True, text=True, check=True)
        found[way] = json.loads(output.stdout)
        print(f"{way:6} peak growth {found[way]['growth_mb']:6.0f} MB   loss {found[way]['loss']:.6f}")
    print(f"naive / fused: {found['naive']['growth_mb'] / found['fused']['growth_mb']:.1f} × the memory")


if __name__ == "__main__":
    main()
