"""The computation between the projections of a Mamba-2 layer, in PyTorch's own operations.

The scan is the chunked algorithm of state space duality: inside a chunk the outputs are a masked product of matrices, as in
attention, and between chunks a state is passed on. Packed documents are kept apart by masks. Megatron's layer needs the
Triton kernels of mamba-ssm instead. Source: Dao & Gu 2024, "Transformers are SSMs" (arXiv:2405.21060), section 6.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None) -> Tensor:
    """A convolution of each channel with its own kernel over the last positions of the same document.

    x: [batch, time, channels]. weight: [channels, 1, width]. documents: [time], the number of each position's document,
    or None.
    """
    time, width = x.shape[1], weight.shape[-1]
    y = torch.zeros_like(x) if bias is None else bias.expand_as(x)
    for tap in range(width):
        back = width - 1 - tap
        earlier = pad(x, (0, 0, back, 0))[:, :time]
        if documents is not None and back:
            same = documents == pad(documents, (back, 0), value=-1)[:time]
            earlier = earlier * same.unsqueeze(-1)
        y = y + earlier * weight[:, 0, tap]
    return y


def scan(
    x: Tensor, steps: Tensor, decay: Tensor, b: Tensor, c: Tensor, chunk: int, documents: Tensor | None = None
) -> Tensor:
    """The outputs c·h of the states h_t = exp(steps_t · decay) h_{t-1} + steps_t b_t x_t, which begin at 0 in every document.

    x:         [batch, time, heads, dim].
    steps:     [batch, time, heads], above 0.
    decay:     [heads], below 0.
    b, c:      [batch, time, groups, state]; heads is a multiple of groups.
    chunk:     positions that are computed together; changes results by rounding only.
    documents: [time], the number of each position's document in ascending order, or None.

    Returns [batch, time, heads, dim] in the precision of ``x``, which should be float32 at least.
    """
    time, groups = x.shape[1], b.shape[2]
    missing = -time % chunk
    if documents is None:
        documents = torch.zeros(time, dtype=torch.int64, device=x.device)
    number = torch.cat([documents, documents[-1:].expand(missing)]).unflatten(0, (-1, chunk))  # [chunks, chunk]
    x, steps = x.unflatten(2, (groups, -1)), steps.unflatten(2, (groups, -1))
    u = _chunks(x * steps.unsqueeze(-1), missing, chunk)  # [batch, chunks, chunk, groups, heads of a group, dim]
    b, c = _chunks(b, missing, chunk), _chunks(c, missing, chunk)
    logs = _chunks(steps * decay.unflatten(0, (groups, -1)), missing, chunk).cumsum(
        2
    )  # of the decay since the chunk began
    # Inside a chunk: what position t receives from position s.
    sees = (number.unsqueeze(2) == number.unsqueeze(1)).tril()  # [chunks, t, s]
    between = logs.unsqueeze(3) - logs.unsqueeze(2)
    between = between.masked_fill(~sees[..., None, None], -torch.inf).exp()
    weights = torch.einsum("zktgn,zksgn->zktsg", c, b).unsqueeze(-1) * between
    y = torch.einsum("zktsgh,zksghd->zktghd", weights, u)
    # Between chunks: the state that a chunk adds, and what its positions receive from the state before it.
    last = number[:, -1]
    before = pad(last[:-1], (1, 0), value=-1)  # the document of the state that enters a chunk
    to_end = (logs[:, :, -1:] - logs).exp() * (number == last.unsqueeze(1))[..., None, None]
    added = torch.einsum("zksgn,zksghd->zkghdn", b, u * to_end.unsqueeze(-1))
    kept = logs[:, :, -1].exp() * (last == before)[:, None, None]
    entering = [torch.zeros_like(added[:, 0])]
    for index in range(added.shape[1] - 1):
        entering.append(entering[-1] * kept[:, index, ..., None, None] + added[:, index])
    from_start = logs.exp() * (number == before.unsqueeze(1))[..., None, None]
    y = y + torch.einsum("zktgn,zkghdn->zktghd", c, torch.stack(entering, 1)) * from_start.unsqueeze(-1)
    return y.flatten(1, 2)[:, :time].flatten(2, 3)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """RMSNorm of ``x * silu(gate)``, [..., channels], for each of ``groups`` groups of channels."""
    x = (x * torch.nn.functional.silu(gate)).unflatten(-1, (groups, -1))
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).flatten(-2)


def _chunks(x: Tensor, missing: int, chunk: int) -> Tensor:
    """[batch, time, ...] to [batch, chunks, chunk, ...], with ``missing`` zeros at the end."""
    return pad(x, (0, 0) * (x.ndim - 2) + (0, missing)).unflatten(1, (-1, chunk))
