"""Time and memory of the head and the loss, forward and backward, beside what one would otherwise use.

    python benchmarks/loss.py                                  # cross-entropy + forward KL, float32 and bfloat16
    python benchmarks/loss.py --objective reverse_kl js_divergence --tokens 256 1024 4096

Hidden size 512 for both models, vocabulary 151 936, two threads. Beside Limbeck: the four matrix products alone (student and
teacher logits, both gradients; the fastest of several chunk sizes, with the head whole or in strips), PyTorch on whole logits,
the same compiled, and Liger's LigerFusedLinearJSDLoss in a side environment, compiled and eager, at its fastest chunk (it has
the KLs as the limits of its Jensen-Shannon divergence). Each runs in a process of its own; times are the best of the rounds
after a warm-up. Growth is the peak of one round above weights and gradients, in 10⁶ bytes. Gradients are counted in the
precision they are summed in.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from side import LIGER, python_of

HIDDEN = 512
WAYS = ("products", "limbeck", "naive", "compiled", "liger", "liger-eager")
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "js_divergence": 0.5}  # Liger's name for them


def memory_mb(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def measure(way: str, dtype_name: str, objective: str, tokens: int, vocab: int, rounds: int, exact: bool) -> None:
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if dtype_name == "bf16" else torch.float32
    h_s, h_t = (torch.randn(tokens, HIDDEN).to(dtype) for _ in range(2))
    w_s, w_t = (torch.randn(vocab, HIDDEN).div_(20).to(dtype) for _ in range(2))
    labels = torch.randint(0, vocab, (tokens,))
    leaves = (h_s.requires_grad_(), w_s.requires_grad_())

    def naive() -> torch.Tensor:
        z_s, z_t = (h_s @ w_s.T).float(), (h_t @ w_t.T).float()
        ce = torch.nn.functional.cross_entropy(z_s, labels)
        log_q, log_p = z_s.log_softmax(-1), z_t.log_softmax(-1)
        kl = lambda a, b: torch.nn.functional.kl_div(b, a, reduction="batchmean", log_target=True)  # noqa: E731
        if objective == "forward_kl":
            kd = kl(log_p, log_q)
        elif objective == "reverse_kl":
            kd = kl(log_q, log_p)
        else:
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            kd = (kl(log_p, log_m) + kl(log_q, log_m)) / 2
        return 0.5 * ce + 0.5 * kd

    def limbeck() -> torch.Tensor:
        from limbeck import fused_linear_distillation

        return fused_linear_distillation(h_s, w_s, h_t, w_t, labels, objective=objective, compiled=True).loss

    def liger(chunk: int, compiled: bool) -> Callable[[], torch.Tensor]:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(beta=BETA[objective], compiled=compiled, chunk_size=chunk)
        return lambda: loss(h_s, w_s, h_t, w_t, labels)

    def products(chunk: int, strip: int) -> None:
        with torch.no_grad():
            for low in range(0, tokens, chunk):
                part = slice(low, low + chunk)
                n = len(h_s[part])
                for h, w, z in ((h_s, w_s, z_s), (h_t, w_t, z_t)):
                    for row in range(0, vocab, strip):
                        torch.mm(h[part], w[row : row + strip].T, out=z[:n, row : row + strip])
                torch.mm(z_s[:n], w_s)
                gradient.addmm_(z_s[:n].T, h_s[part])

    if way == "products":  # made once, so that no fresh page is paid for
        z_s, z_t = torch.empty(2, min(tokens, 1024), vocab, dtype=dtype).unbind()
        gradient = torch.zeros(vocab, HIDDEN, dtype=dtype)
    if exact:
        z_s, z_t = (h.detach().double() @ w.detach().double().T for h, w in ((h_s, w_s), (h_t, w_t)))
        from limbeck import divergence

        ce = torch.nn.functional.cross_entropy(z_s, labels)
        print(json.dumps({"loss": (0.5 * ce + 0.5 * divergence(objective)(z_s, z_t).mean()).item()}))
        return
    best: dict[str, float] = {}
    ways: dict[str, Callable[[], torch.Tensor | None]] = {"naive": naive, "limbeck": limbeck}
    if way == "compiled":
        ways["compiled"] = torch.compile(naive)
    elif way == "products":
        ways = {
            f"chunk {chunk}, {'strips of ' if strip < vocab else ''}{strip} rows": lambda c=chunk, s=strip: products(
                c, s
            )
            for chunk in sorted({min(chunk, tokens) for chunk in (128, 1024)})
            for strip in (1024, vocab)
        }
    elif way in ("liger", "liger-eager"):
        ways = {
            f"chunk {chunk}": liger(chunk, way == "liger")
            for chunk in sorted({min(chunk, tokens) for chunk in (128, 256, 1024)})
        }
    if way in ways:
        ways = {way: ways[way]}
    for name, run in ways.items():

        def once(run: Callable[[], torch.Tensor | None] = run) -> float | None:
            begun = time.perf_counter()
            loss = run()
            if loss is None:
                once.seconds = time.perf_counter() - begun
                return None
            loss = loss[0] if isinstance(loss, tuple) else loss
            loss.backward()
            once.seconds = time.perf_counter() - begun
            for leaf in leaves:
                leaf.grad = None
            return loss.item()

        once()
        sums = torch.float32 if way == "limbeck" else dtype
        gradients = [torch.ones(leaf.shape, dtype=sums) for leaf in leaves]
        before = memory_mb("VmRSS")
        del gradients
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the warm-up
        seconds, loss = [], None
        for _ in range(rounds):
            loss = once()
            seconds.append(once.seconds)
        found = {
            "seconds": min(seconds),
            "growth_mb": max(memory_mb("VmHWM") - before, 0.0),
            "loss": loss,
            "setting": name,
        }
        if not best or found["seconds"] < best["seconds"]:
            best = found
    print(json.dumps(best))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", nargs="+", choices=tuple(BETA), default=["forward_kl"])
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--slow-bf16", action="store_true", help="bf16 even without a processor's instructions for it")
    parser.add_argument("--way", help="measure one way in this process")
    parser.add_argument("--exact", action="store_true", help="the loss in float64, in this process")
    args = parser.parse_args()
    if args.way or args.exact:
        measure(args.way, args.dtype[0], args.objective[0], args.tokens[0], args.vocab, args.rounds, args.exact)
        return
    products: dict[tuple[str, int], dict] = {}  # the same for every objective
    for tokens in args.tokens:
        for objective in args.objective:
            for dtype in args.dtype:
                if dtype == "bf16" and not (multiplies_bf16() or args.slow_bf16):
                    print(
                        "\nbf16 is left out: this processor has no bfloat16 instructions, and products would take minutes. "
                        "--slow-bf16 with few --tokens shows the losses' errors all the same."
                    )
                    continue
                compare(args, dtype, objective, tokens, products)


def multiplies_bf16() -> bool:
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compare(
    args: argparse.Namespace, dtype: str, objective: str, tokens: int, products: dict[tuple[str, int], dict]
) -> None:
    keys = ["--dtype", dtype, "--objective", objective, "--tokens", str(tokens), "--vocab", str(args.vocab)]

    def side(*more: str, python: str = sys.executable) -> dict:
        command = [python, __file__, *keys, "--rounds", str(args.rounds), *more]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    exact = side("--exact")["loss"] if tokens * args.vocab < 2**28 else None
    print(f"\n{dtype}, {objective}, {tokens} tokens × {args.vocab}" + (f", float64 loss {exact:.6f}" if exact else ""))
    found = {}
    for way in args.ways:
        python = python_of("liger", LIGER) if way.startswith("liger") else sys.executable
        if way == "products" and (dtype, tokens) in products:
            found[way] = products[dtype, tokens]
            continue
        found[way] = one = side("--way", way, python=python)
        loss = "" if one["loss"] is None else f"   loss {one['loss']:.6f}"
        if loss and exact:
            loss += f", off by {abs(one['loss'] - exact):.1e}"
        print(
            f"  {way:11} {one['seconds']:7.3f} s   growth {one['growth_mb']:6.0f} MB{loss}   ({one['setting']})",
            flush=True,
        )
    if "products" in found:
        products[dtype, tokens] = found["products"]
    ours = found.pop("limbeck", None)
    for other, one in found.items() if ours else ():
        print(
            f"  limbeck / {other:11} {ours['seconds'] / one['seconds']:5.2f} × the time, "
            + (
                f"{ours['growth_mb'] / one['growth_mb']:5.2f} × the memory"
                if other != "products"
                else "which has no loss"
            )
        )
    rivals = [found[way] for way in ("liger", "liger-eager") if way in found]
    if rivals and "products" in found:
        least = found["products"]["seconds"] / min(one["seconds"] for one in rivals)
        print(f"  nothing that multiplies by both heads can take less than {least:.2f} × the time of Liger's best")


if __name__ == "__main__":
    main()
