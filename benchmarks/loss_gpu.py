"""Time and memory of the loss on a GPU, beside its four matrix products alone and Liger's two kernels.

    python benchmarks/loss_gpu.py [--tokens 8192] [--repeats 20] [--quick] [--json FILE]

bfloat16, 8192 tokens, hidden sizes 4096 / 4096 and 3584 / 5120 (student / teacher), vocabularies 128 256 and 152 064, forward
and backward, the student's head trained. Also Qwen2.5's 0.5B and 1.5B, whose heads have 151 936 rows, and its tokenizer
151 665 words: with that odd vocabulary, time is given per logit too, beside that of the products with 151 936, whose rows are
aligned. "products" are the same chunks' products into the same buffers and nothing else.
Growth is the peak above weights, inputs and gradients. Liger is measured where ``liger-kernel`` is installed: its chunked loss
(cross-entropy + Jensen-Shannon) and its Triton kernel (Jensen-Shannon alone), each beside ours of the same objective. The error
is that of the loss against float64 on 128 of the tokens. If the loss had to do without its kernel, a line says why.

--quick measures three of the sizes, without Liger, in less than a minute.

At the end it says which of the goals in ``goals.py`` are kept, with all vocabularies per logit beside aligned products.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from goals import lines, loss_goals
from side import write_json

# (student's and teacher's hidden size, rows of both heads, shared vocabulary)
QWEN = [(896, 1536, 151_936, 151_936), (896, 1536, 151_936, 151_665)]
QUICK_SIZES = [(4096, 4096, 128_256, 128_256), *QWEN]
SIZES = [
    *(
        (hidden_s, hidden_t, vocab, vocab)
        for hidden_s, hidden_t in ((4096, 4096), (3584, 5120))
        for vocab in (128_256, 152_064)
    ),
    *QWEN,
]


def measure(step: Callable[[], Any], leaves: list[Any], repeats: int) -> tuple[float, float]:
    """Median milliseconds of ``step`` and the growth of its peak memory in GB above what lives before and the gradients."""
    import torch

    def once() -> float:
        for leaf in leaves:
            leaf.grad = None
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        step()
        ended.record()
        ended.synchronize()
        return begun.elapsed_time(ended)

    for _ in range(3):  # compilers and libraries set themselves up
        once()
    times = [once() for _ in range(repeats)]
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    growth = torch.cuda.max_memory_allocated() - before - gradients
    for leaf in leaves:
        leaf.grad = None
    return statistics.median(times), growth / 1e9


def products(h_s: Any, w_s: Any, h_t: Any, w_t: Any, vocab: int, chunk: int) -> Callable[[], None]:
    """The four products of each chunk, into memory that is there before."""
    import torch

    w_s, w_t = w_s[:vocab], w_t[:vocab]
    z_s, z_t = (torch.randn(chunk, vocab, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    d_h, d_w = torch.empty_like(h_s), torch.zeros_like(w_s)

    def run() -> None:
        with torch.no_grad():
            for low in range(0, len(h_s), chunk):
                part = slice(low, low + chunk)
                n = len(h_s[part])
                torch.mm(h_s[part], w_s.t(), out=z_s[:n])
                torch.mm(h_t[part], w_t.t(), out=z_t[:n])
                torch.mm(z_s[:n], w_s, out=d_h[part])
                d_w.addmm_(z_s[:n].t(), h_s[part])

    return run


def liger(h_s: Any, w_s: Any, h_t: Any, w_t: Any, labels: Any) -> dict[str, tuple[Callable[[], None], dict[str, Any]]]:
    """Liger's steps by name, each with the options that make our loss the same objective; empty if it is not installed."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ImportError:
        print("liger-kernel is not installed: its columns are left out (pip install liger-kernel)")
        return {}
    chunked, triton = LigerFusedLinearJSDLoss(), LigerFusedLinearJSD(jsd_beta=0.5)

    def run(loss: Any) -> None:
        (loss[0] if isinstance(loss, tuple) else loss).backward()

    return {
        "Liger chunked": (lambda: run(chunked(h_s, w_s, h_t, w_t, labels)), {"kd_weight": 0.5}),
        "Liger Triton": (lambda: run(triton(h_s, w_s, h_t, w_t, labels)), {"kd_weight": 1.0}),
    }


def error(h_s: Any, w_s: Any, h_t: Any, w_t: Any, labels: Any, name: str, vocab: int) -> float:
    """|loss − float64| on a few tokens."""
    import torch

    from limbeck import divergence, fused_linear_distillation

    few = slice(0, 128)
    with torch.no_grad():
        ours = fused_linear_distillation(
            h_s[few], w_s, h_t[few], w_t, labels[few], objective=name, vocab_size=vocab, compiled=True
        ).loss.item()
        z_s, z_t = h_s[few].double() @ w_s[:vocab].double().t(), h_t[few].double() @ w_t[:vocab].double().t()
        ce = torch.nn.functional.cross_entropy(z_s, labels[few])
        exact = 0.5 * ce + 0.5 * divergence(name)(z_s, z_t).mean()
    return abs(ours - exact.item())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tokens", type=int, default=8192)
    arguments.add_argument("--repeats", type=int, default=20)
    arguments.add_argument("--quick", action="store_true", help="three sizes, without Liger")
    arguments.add_argument("--json", type=Path, help="write the results to this file")
    options = arguments.parse_args()

    import torch

    if not torch.cuda.is_available():
        sys.exit("This measures a GPU, and there is none here; run it where torch.cuda.is_available().")
    from limbeck import fused_linear_distillation
    from limbeck.objectives import Objective, chunks, kernels

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.tokens} tokens, bfloat16\n")
    results: list[dict[str, Any]] = []
    per_aligned_logit = 0.0  # milliseconds of the products with an aligned vocabulary of these hidden sizes
    for hidden_s, hidden_t, rows, vocab in QUICK_SIZES if options.quick else SIZES:
        torch.manual_seed(0)
        make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        h_s, h_t = make(options.tokens, hidden_s).requires_grad_(), make(options.tokens, hidden_t)
        w_s, w_t = make(rows, hidden_s).mul_(0.02).requires_grad_(), make(rows, hidden_t).mul_(0.02)
        labels = torch.randint(0, vocab, (options.tokens,), device="cuda")
        leaves = [h_s, w_s]
        chunk = min(chunks.default_chunk(h_s.device, vocab, options.tokens, w_s, w_t), options.tokens)

        floor, _ = measure(products(h_s, w_s, h_t, w_t, vocab, chunk), [], options.repeats)
        if vocab == rows:
            per_aligned_logit = floor / vocab
        work = 2 * options.tokens * vocab * (3 * hidden_s + hidden_t)
        size = {"hidden_student": hidden_s, "hidden_teacher": hidden_t, "rows": rows, "vocab": vocab}
        print(f"hidden {hidden_s} / {hidden_t}, heads of {rows} rows, vocabulary {vocab}, chunks of {chunk} tokens")
        print(f"  {'products alone':32} {floor:8.2f} ms  {work / floor / 1e9:6.0f} TFLOP/s")
        results.append({**size, "what": "products", "ms": floor, "tflops": work / floor / 1e9})

        def ours(
            name: str, kd_weight: float, inputs: Any = (h_s, w_s, h_t, w_t, labels), vocab: int = vocab
        ) -> Callable[[], None]:
            objective = Objective.of(name, kd_weight=kd_weight)
            options = {"objective": objective, "vocab_size": vocab, "all_supervised": True}
            return lambda: fused_linear_distillation(*inputs, **options).loss.backward()

        for name in ("forward_kl", "reverse_kl", "js_divergence"):
            took, growth = measure(ours(name, 0.5), leaves, options.repeats)
            off = error(h_s, w_s, h_t, w_t, labels, name, vocab)
            of_aligned = took / vocab / per_aligned_logit
            print(
                f"  {'Limbeck, CE + ' + name:32} {took:8.2f} ms  {took / floor:6.2f} × products  "
                + ("" if vocab == rows else f"{of_aligned:5.2f} × products of {rows} per logit  ")
                + f"growth {growth:5.2f} GB  error {off:.1e}"
            )
            measured = {"ms": took, "of_products": took / floor, "of_aligned_products_per_logit": of_aligned}
            results.append({**size, "what": f"limbeck {name}", **measured, "growth_gb": growth, "error": off})
        # Liger's losses take whole heads only.
        compared = {} if options.quick or vocab < rows else liger(h_s, w_s, h_t, w_t, labels)
        for name, (step, like) in compared.items():
            took, _ = measure(ours("js_divergence", **like), leaves, options.repeats)
            theirs, growth = measure(step, leaves, max(3, options.repeats // 4))
            print(f"  {name:32} {theirs:8.2f} ms  growth {growth:5.2f} GB  Limbeck takes {took / theirs:4.2f} of it")
            results.append({**size, "what": name, "ms": theirs, "growth_gb": growth, "limbeck_of_it": took / theirs})
        for why in sorted(kernels.fallback_reasons):
            print(f"  NOT the kernel everywhere: {why}")
        print(flush=True)
        if options.json:
            report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}
            report["fallback_reasons"] = sorted(kernels.fallback_reasons)
            write_json(options.json, report | {"goals": loss_goals(results)})
    print(*lines(loss_goals(results)), sep="\n")


if __name__ == "__main__":
    main()
