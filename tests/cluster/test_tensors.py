"""Packed tensors are unpacked bit for bit."""

import pytest
import torch

from limbeck.cluster.tensors import pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (4,)])
def test_a_tensor_arrives_as_it_was_sent(dtype, shape):
    sent = (torch.randn(shape) * 100).to(dtype)
    received = unpack(pack(sent))
    assert received.dtype == dtype and torch.equal(received, sent)


def test_a_view_that_is_not_contiguous_arrives_as_it_was_sent():
    sent = torch.arange(24.0).view(4, 6).T[1:4]
    assert torch.equal(unpack(pack(sent)), sent)
