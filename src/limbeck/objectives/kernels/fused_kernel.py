"""The elementwise pass over a row of logits as one Triton program: value, diagnostics, and the gradient written in place.

The program reads a row two or three times: for both log-sum-exps; for Σw, if a gradient is needed and the sum is not known; for
everything else. Consecutive passes run in opposite directions, so that each begins with columns that are still cached. Sums are
kept per lane and reduced at the end of a pass. One program per row is enough even for few rows: the matrix product before it
reads the whole head and takes longer.

Only operations that Triton's compiler and its interpreter both support are used. Import this module only where a kernel is
used: Triton is not installed everywhere. Everything is computed in float32.

Shapes: n rows, V columns. z is the student's side, t the teacher's.
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

STAGES: tl.constexpr = tl.constexpr(3)  # loads of the next blocks begin before the current one is used
HARDWARE: tl.constexpr = tl.constexpr(not knobs.runtime.interpret)  # libdevice functions, which the interpreter lacks


@triton.jit
def exp(x):
    """eˣ by the hardware's 2ˣ. Results below float32's normal numbers are 0."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def log1p(x):
    """log(1 + x). Near 0 it is 2 artanh(x / (2 + x)), because 1 + x loses the digits of x."""
    s = x / (2.0 + x)
    y = s * s
    near = 2.0 * s * (1.0 + y * (1.0 / 3 + y * (1.0 / 5 + y * (1.0 / 7))))
    # The hardware's error is at most 2⁻²², small against log 1.25.
    far = libdevice.fast_logf(1.0 + x) if HARDWARE else tl.log(1.0 + x)
    return tl.where(tl.abs(x) < 0.25, near, far)


@triton.jit
def expm1(x):
    """eˣ − 1. Near 0 it is (u − 1) · x / log u with u = eˣ, in which the errors of u cancel."""
    u = exp(x)
    d = u - 1.0
    log_u = tl.log(u)
    near = (tl.abs(x) < 1.0) & (log_u != 0.0)
    return tl.where(near, d * (x / tl.where(near, log_u, 1.0)), tl.where(tl.abs(x) < 1.0, x, d))


@triton.jit
def tanh(x):
    """tanh x. Near 0 by its series, because the quotient of exponentials loses digits."""
    y = x * x
    series = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
    e = exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(y < 0.04, series, tl.where(x < 0.0, -far, far))


@triton.jit
def load_logits(row, bias, at, vocab, readable, scale: tl.constexpr, cap: tl.constexpr):
    """Logits at the columns ``at``, −∞ from ``vocab`` on. ``readable``: the columns of the row that may be read."""
    x = tl.load(row + at, mask=at < readable, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + at, mask=at < vocab, other=0.0).to(tl.float32)
    if scale != 1.0:
        x *= scale
    if cap is not None:
        x = cap * tanh(x / cap)
    return tl.where(at < vocab, x, float("-inf"))


@triton.jit
def add_exp(total, highest, x, rate):
    """Online softmax sum: Σ exp(rate · (x − highest)) per lane after one more x. ``highest`` is the maximum before it."""
    e = exp(-tl.abs(x - highest) * rate)
    return tl.where(x > highest, total * e + 1.0, total + e)


@triton.jit
def reduce_lanes(total, highest, top, rate):
    """The sum over all lanes, relative to the row's maximum ``top``."""
    return tl.sum(total * exp((highest - top) * rate), 0)


@triton.jit
def fused_loss_kernel(
    z,  # [n, V] the student's products, overwritten with their gradient
    z_bias,  # [V] float32 or None
    t,  # [n, V] the teacher's products or None
    t_bias,
    target,  # [n]
    weight,  # [n] float32
    factor,  # 0-dimensional, float32
    stats,  # [n, STATS] float32: value, CE, student's entropy, teacher's entropy, top-1 agreement, times weight
    vocab,
    z_stride,
    t_stride,
    z_readable,  # readable columns of a row: V or a round number above, which reads fastest
    t_readable,
    rate,  # 1/τ_s
    t_rate,
    ce_scale,  # (1 − w) · scale
    kd_scale,  # w · τ_s or w / τ_s, · scale
    weight_sum,  # Σw if it is known
    divergence_fn: tl.constexpr,
    z_scale: tl.constexpr,
    z_cap: tl.constexpr,
    t_scale: tl.constexpr,
    t_cap: tl.constexpr,
    TEMPERED: tl.constexpr,
    GRADIENT: tl.constexpr,
    WEIGHT_SUM_KNOWN: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    if t is not None:
        t += row * t_stride
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.float32)
    blocks = tl.cdiv(vocab, BLOCK)
    label = tl.load(target + row)
    u = tl.load(weight + row)
    at_target = tl.sum(load_logits(z, z_bias, label + tl.zeros((1,), tl.int32), vocab, z_readable, z_scale, z_cap), 0)

    # Both log-sum-exps. Maxima start at a finite number, because −∞ − −∞ is NaN.
    z_high, t_high = zero - 3e38, zero - 3e38
    z_sum, tempered_sum, t_sum = zero, zero, zero
    for i in tl.range(blocks, num_stages=STAGES):
        at = i * BLOCK + lanes
        s = load_logits(z, z_bias, at, vocab, z_readable, z_scale, z_cap)
        z_sum = add_exp(z_sum, z_high, s, 1.0)
        if TEMPERED:
            tempered_sum = add_exp(tempered_sum, z_high, s, rate)
        z_high = tl.maximum(z_high, s)
        if t is not None:
            teacher = load_logits(t, t_bias, at, vocab, t_readable, t_scale, t_cap)
            t_sum = add_exp(t_sum, t_high, teacher, t_rate)
            t_high = tl.maximum(t_high, teacher)
    top = tl.max(z_high, 0)
    log_z = tl.log(reduce_lanes(z_sum, z_high, top, 1.0))
    log_tempered = log_z
    if TEMPERED:
        log_tempered = tl.log(reduce_lanes(tempered_sum, z_high, top, rate))
    t_top = tl.max(t_high, 0)
    log_t = 0.0
    if t is not None:
        log_t = tl.log(reduce_lanes(t_sum, t_high, t_top, t_rate))

    THREE_PASSES: tl.constexpr = GRADIENT and t is not None and not WEIGHT_SUM_KNOWN
    if THREE_PASSES:
        weights = zero
        for i in tl.range(blocks, num_stages=STAGES):
            at = (blocks - 1 - i) * BLOCK + lanes
            s = load_logits(z, z_bias, at, vocab, z_readable, z_scale, z_cap)
            log_q = (s - top) * rate - log_tempered
            log_p = (load_logits(t, t_bias, at, vocab, t_readable, t_scale, t_cap) - t_top) * t_rate - log_t
            _, w = divergence_fn(exp(log_p), exp(log_q), log_p, log_q)
            weights += tl.where(at < vocab, w, 0.0)
        weight_sum = tl.sum(weights, 0)

    k = tl.load(factor) * u
    ce_k, kd_k = ce_scale * k, kd_scale * k
    values, z_entropy, t_entropy, agree = zero, zero, zero, zero
    for i in tl.range(blocks, num_stages=STAGES):
        at = (i if THREE_PASSES else blocks - 1 - i) * BLOCK + lanes
        inside = at < vocab
        s = load_logits(z, z_bias, at, vocab, z_readable, z_scale, z_cap)
        log_q = (s - top) * rate - log_tempered
        q = exp(log_q)
        z_entropy -= q * tl.where(inside, log_q, 0.0)
        w = zero
        if t is not None:
            teacher = load_logits(t, t_bias, at, vocab, t_readable, t_scale, t_cap)
            log_p = (teacher - t_top) * t_rate - log_t
            p = exp(log_p)
            t_entropy -= p * tl.where(inside, log_p, 0.0)
            agree = tl.where((s == top) & (teacher == t_top), 1.0, agree)
            value, w = divergence_fn(p, q, log_p, log_q)
            values += tl.where(inside, value, 0.0)
        if GRADIENT:
            q_1 = q
            if TEMPERED:
                q_1 = exp(s - top - log_z)
            gradient = q_1 * ce_k
            if t is not None:
                gradient += (w - q * weight_sum) * kd_k
            gradient -= tl.where(at == label, ce_k, 0.0)
            if z_cap is not None:
                gradient *= 1.0 - (s / z_cap) * (s / z_cap)
            tl.store(z + at, tl.where(inside, gradient, 0.0).to(z.dtype.element_ty), mask=at < z_readable)

    stats += row * STATS
    tl.store(stats, tl.sum(values, 0) * u)
    tl.store(stats + 1, (top + log_z - at_target) * u)
    tl.store(stats + 2, tl.sum(z_entropy, 0) * u)
    tl.store(stats + 3, tl.sum(t_entropy, 0) * u)
    tl.store(stats + 4, tl.max(agree, 0) * u)


@triton.jit
def rescale_kernel(x, scale, count, BLOCK: tl.constexpr):
    """x [count] *= scale. If scale is 1, which only the device knows, x is not touched."""
    k = tl.load(scale)
    if k != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.load(x + at, mask=at < count).to(tl.float32) * k
        tl.store(x + at, scaled.to(x.dtype.element_ty), mask=at < count)
