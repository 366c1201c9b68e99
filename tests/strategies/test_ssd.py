"""The chunked scan of Mamba layers gives what its recurrence gives, document by document."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.strategies.megatron.ssd import causal_convolution, scan

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def numbers(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def recur(x, steps, decay, b, c):
    """States by their recurrence, for one document."""
    each = x.shape[2] // b.shape[2]
    b, c = b.repeat_interleave(each, 2), c.repeat_interleave(each, 2)
    state = torch.zeros(*x.shape[:1], *x.shape[2:], b.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        entered = torch.einsum("zhd,zhn->zhdn", x[:, t] * steps[:, t, :, None], b[:, t])
        state = state * (steps[:, t] * decay).exp()[..., None, None] + entered
        outputs.append(torch.einsum("zhdn,zhn->zhd", state, c[:, t]))
    return torch.stack(outputs, 1)


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(1, 12), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_the_scan_gives_the_states_of_each_document(lengths, chunk, groups, seed):
    torch.manual_seed(seed)
    time, heads = sum(lengths), 4
    x = torch.randn(2, time, heads, 3, dtype=torch.float64)
    steps = torch.rand(2, time, heads, dtype=torch.float64)
    b, c = torch.randn(2, 2, time, groups, 5, dtype=torch.float64)
    decay = -torch.rand(heads, dtype=torch.float64)
    found = scan(x, steps, decay, b, c, chunk, numbers(lengths))
    parts = zip(*(tensor.split(lengths, 1) for tensor in (x, steps, b, c)), strict=True)
    expected = torch.cat([recur(x, steps, decay, b, c) for x, steps, b, c in parts], 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    if len(lengths) == 1:
        torch.testing.assert_close(scan(x, steps, decay, b, c, chunk), expected, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(LENGTHS, st.integers(1, 5))
def test_the_convolution_stays_in_each_document(lengths, width):
    x, weight, bias = torch.randn(2, sum(lengths), 3), torch.randn(3, 1, width), torch.randn(3)
    found = causal_convolution(x, weight, bias, numbers(lengths))
    parts = [
        torch.nn.functional.conv1d(part.transpose(1, 2), weight, bias, padding=width - 1, groups=3)[
            ..., : part.shape[1]
        ]
        for part in x.split(lengths, 1)
    ]
    torch.testing.assert_close(found, torch.cat(parts, 2).transpose(1, 2))
