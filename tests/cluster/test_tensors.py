"""What goes over the wire comes out bit for bit."""

import pytest
import torch

from limbeck.cluster.tensors import flat, unflat


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (4,)])
def test_a_tensor_arrives_as_it_was_sent(dtype, shape):
    sent = (torch.randn(shape) * 100).to(dtype)
    came = unflat(flat(sent))
    assert came.dtype == dtype and torch.equal(came, sent)


def test_a_view_that_is_not_in_one_piece_arrives_too():
    sent = torch.arange(24.0).view(4, 6).T[1:4]
    assert torch.equal(unflat(flat(sent)), sent)
