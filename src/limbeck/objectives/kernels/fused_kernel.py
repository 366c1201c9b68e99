"""The pass over a row of logits as one Triton program: both log-sum-exps, value, diagnostics, the gradient written in place.

A row is read two or three times: for the normalisers; for Σw, unless it is known beforehand or no gradient is wanted; for
everything else. The sweeps alternate in direction, so that each begins where the last left the cache warm. Sums are kept per
lane and meet at a sweep's end. One program per row is enough even for few rows: the product that made them reads the whole
head then and takes longer.

Only what Triton's compiler and its interpreter both know is used. Imported where a kernel is wanted, because Triton is not
everywhere. V columns; everything inside is float32.
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

HARDWARE: tl.constexpr = tl.constexpr(not knobs.runtime.interpret)  # its own logarithm, which the interpreter lacks


@triton.jit
def exp(x):
    """In the unit that the hardware has, 2ˣ; what is below float32's normal numbers is 0."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def log1p(x):
    """log(1 + x): near 0 as 2 artanh(x / (2 + x)), where 1 + x would have lost the digits of x."""
    s = x / (2.0 + x)
    y = s * s
    near = 2.0 * s * (1.0 + y * (1.0 / 3 + y * (1.0 / 5 + y * (1.0 / 7))))
    # The hardware's is off by 2⁻²² at most, which is little against log 1.25.
    far = libdevice.fast_logf(1.0 + x) if HARDWARE else tl.log(1.0 + x)
    return tl.where(tl.abs(x) < 0.25, near, far)


@triton.jit
def expm1(x):
    """eˣ − 1: near 0 as (u − 1) · x / log u, in which errors of u = eˣ cancel."""
    u = exp(x)
    d = u - 1.0
    log_u = tl.log(u)
    near = (tl.abs(x) < 1.0) & (log_u != 0.0)
    return tl.where(near, d * (x / tl.where(near, log_u, 1.0)), tl.where(tl.abs(x) < 1.0, x, d))


@triton.jit
def tanh(x):
    """By its series near 0, where the quotient of exponentials would lose digits."""
    y = x * x
    series = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
    e = exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(y < 0.04, series, tl.where(x < 0.0, -far, far))


@triton.jit
def _logits(row, bias, at, vocab, edge, scale: tl.constexpr, cap: tl.constexpr):
    """Logits at the columns ``at``, −∞ from ``vocab`` on; ``edge`` is how far the row may be read."""
    x = tl.load(row + at, mask=at < edge, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + at, mask=at < vocab, other=0.0).to(tl.float32)
    if scale != 1.0:
        x *= scale
    if cap is not None:
        x = cap * tanh(x / cap)
    return tl.where(at < vocab, x, float("-inf"))


@triton.jit
def _add(total, highest, x, rate):
    """Σ exp(rate · (x − highest)) per lane, with one more x; ``highest`` is still the one without it."""
    e = exp(-tl.abs(x - highest) * rate)
    return tl.where(x > highest, total * e + 1.0, total + e)


@triton.jit
def _meet(total, highest, top, rate):
    """The sum over all lanes, relative to the row's highest."""
    return tl.sum(total * exp((highest - top) * rate), 0)


@triton.jit
def sweep(
    z,  # [n, V] the student's products, and then their gradient
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
    z_edge,  # vocab, or as far behind it as the row's memory goes on: round numbers read fastest
    t_edge,
    rate,  # 1/τ_s
    t_rate,
    hard,  # (1 − w) · scale
    soft,  # w · τ_s or w / τ_s, · scale
    mass,  # Σw where it is known
    terms: tl.constexpr,
    z_scale: tl.constexpr,
    z_cap: tl.constexpr,
    t_scale: tl.constexpr,
    t_cap: tl.constexpr,
    TEMPERED: tl.constexpr,
    GRADIENT: tl.constexpr,
    MASS_KNOWN: tl.constexpr,
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
    aim = tl.load(target + row)
    u = tl.load(weight + row)
    at_target = tl.sum(_logits(z, z_bias, aim + tl.zeros((1,), tl.int32), vocab, z_edge, z_scale, z_cap), 0)

    # Both normalisers. No lane begins at −∞, because −∞ − −∞ is no number.
    z_high, t_high = zero - 3e38, zero - 3e38
    z_sum, tempered_sum, t_sum = zero, zero, zero
    for i in range(blocks):
        at = i * BLOCK + lanes
        s = _logits(z, z_bias, at, vocab, z_edge, z_scale, z_cap)
        z_sum = _add(z_sum, z_high, s, 1.0)
        if TEMPERED:
            tempered_sum = _add(tempered_sum, z_high, s, rate)
        z_high = tl.maximum(z_high, s)
        if t is not None:
            teacher = _logits(t, t_bias, at, vocab, t_edge, t_scale, t_cap)
            t_sum = _add(t_sum, t_high, teacher, t_rate)
            t_high = tl.maximum(t_high, teacher)
    top = tl.max(z_high, 0)
    log_z = tl.log(_meet(z_sum, z_high, top, 1.0))
    log_tempered = log_z
    if TEMPERED:
        log_tempered = tl.log(_meet(tempered_sum, z_high, top, rate))
    t_top = tl.max(t_high, 0)
    log_t = 0.0
    if t is not None:
        log_t = tl.log(_meet(t_sum, t_high, t_top, t_rate))

    THREE: tl.constexpr = GRADIENT and t is not None and not MASS_KNOWN
    if THREE:
        weights = zero
        for i in range(blocks):
            at = (blocks - 1 - i) * BLOCK + lanes
            s = _logits(z, z_bias, at, vocab, z_edge, z_scale, z_cap)
            log_q = (s - top) * rate - log_tempered
            log_p = (_logits(t, t_bias, at, vocab, t_edge, t_scale, t_cap) - t_top) * t_rate - log_t
            _, w = terms(exp(log_p), exp(log_q), log_p, log_q)
            weights += tl.where(at < vocab, w, 0.0)
        mass = tl.sum(weights, 0)

    k = tl.load(factor) * u
    hard_k, soft_k = hard * k, soft * k
    values, z_entropy, t_entropy, agree = zero, zero, zero, zero
    for i in range(blocks):
        at = (i if THREE else blocks - 1 - i) * BLOCK + lanes
        inside = at < vocab
        s = _logits(z, z_bias, at, vocab, z_edge, z_scale, z_cap)
        log_q = (s - top) * rate - log_tempered
        q = exp(log_q)
        z_entropy -= q * tl.where(inside, log_q, 0.0)
        w = zero
        if t is not None:
            teacher = _logits(t, t_bias, at, vocab, t_edge, t_scale, t_cap)
            log_p = (teacher - t_top) * t_rate - log_t
            p = exp(log_p)
            t_entropy -= p * tl.where(inside, log_p, 0.0)
            agree = tl.where((s == top) & (teacher == t_top), 1.0, agree)
            value, w = terms(p, q, log_p, log_q)
            values += tl.where(inside, value, 0.0)
        if GRADIENT:
            q_1 = q
            if TEMPERED:
                q_1 = exp(s - top - log_z)
            gradient = q_1 * hard_k
            if t is not None:
                gradient += (w - q * mass) * soft_k
            gradient -= tl.where(at == aim, hard_k, 0.0)
            if z_cap is not None:
                gradient *= 1.0 - (s / z_cap) * (s / z_cap)
            tl.store(z + at, tl.where(inside, gradient, 0.0).to(z.dtype.element_ty), mask=at < z_edge)

    stats += row * STATS
    tl.store(stats, tl.sum(values, 0) * u)
    tl.store(stats + 1, (top + log_z - at_target) * u)
    tl.store(stats + 2, tl.sum(z_entropy, 0) * u)
    tl.store(stats + 3, tl.sum(t_entropy, 0) * u)
    tl.store(stats + 4, tl.max(agree, 0) * u)
