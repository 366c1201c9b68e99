"""Signals from a teacher's hidden states: log-probabilities of its k most likely tokens or of the labels, or whole logits.

Positions are processed in chunks, as in the fused loss, so that log-probabilities need no whole logits. The numbers are those
that the loss computes itself from the hidden states.

Shapes: N positions, V vocabulary, H hidden size, k tokens kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.objectives.aligned_head import AlignedHead
from limbeck.objectives.chunks import default_chunk, shared_bias
from limbeck.objectives.divergences import EXCLUDED
from limbeck.objectives.output_head import OutputHead
from limbeck.objectives.payloads import Logits, Sampled, TopK


@torch.no_grad()
def compute_topk(
    hidden: Tensor,
    head: OutputHead,
    k: int,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> TopK:
    """Return the k most likely tokens at each position of hidden [N, H], with their log-probabilities at ``temperature``.

    vocab_size: the rows of the head that are used, default all. Log-probabilities are normalized over them. chunk_size:
    positions whose logits are held at once, with the default of the loss. If k exceeds ``vocab_size``, all tokens are kept.
    A token that the head's bias excludes (−∞) has log-probability −∞. Raises LimbeckError for a k, temperature or
    ``vocab_size`` outside its range.
    """
    vocab = _vocab(head, vocab_size)
    if k < 1 or not temperature > 0:
        raise LimbeckError(f"compute_topk needs k of 1 or more and a temperature above 0, got {k} and {temperature}.")
    kept = min(k, vocab)
    log_probs = torch.empty(len(hidden), kept, dtype=_precise(head), device=hidden.device)
    indices = torch.empty(len(hidden), kept, dtype=torch.int64, device=hidden.device)
    for part, logits in _chunks(hidden, head, vocab, chunk_size):
        values, indices[part] = logits.topk(kept, dim=-1)
        highest = values[:, :1].clone()
        total = logits.sub_(highest).div_(temperature).exp_().sum(-1, keepdim=True)
        log_probs[part] = ((values - highest) / temperature - total.log()).masked_fill(values <= EXCLUDED, -torch.inf)
    return TopK(log_probs, indices, temperature)


@torch.no_grad()
def compute_sampled(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Sampled:
    """Return the log-probability at ``temperature`` of the token labels [N] at each position of hidden [N, H].

    Labels must be in the vocabulary, which is not checked. Other arguments as in ``compute_topk``. Raises LimbeckError for
    other shapes of the labels, and for a temperature or ``vocab_size`` outside its range.
    """
    vocab = _vocab(head, vocab_size)
    if not temperature > 0:
        raise LimbeckError(f"compute_sampled needs a temperature above 0, got {temperature}.")
    if labels.shape != hidden.shape[:1]:
        raise LimbeckError(
            f"labels must be one token for each of the {len(hidden)} positions, got the shape {list(labels.shape)}."
        )
    log_probs = torch.empty(len(hidden), dtype=_precise(head), device=hidden.device)
    for part, logits in _chunks(hidden, head, vocab, chunk_size):
        tempered = logits.div_(temperature)
        log_probs[part] = tempered.gather(-1, labels[part, None]).squeeze(-1) - tempered.logsumexp(-1)
    return Sampled(log_probs, temperature)


@torch.no_grad()
def compute_logits(
    hidden: Tensor, head: OutputHead, *, vocab_size: int | None = None, chunk_size: int | None = None
) -> Logits:
    """Return the logits [N, V] of hidden [N, H] in the head's precision. Arguments as in ``compute_topk``."""
    vocab = _vocab(head, vocab_size)
    everything = torch.empty(len(hidden), vocab, dtype=head.weight.dtype, device=hidden.device)
    for part, logits in _chunks(hidden, head, vocab, chunk_size):
        everything[part] = logits
    return Logits(everything)


def _chunks(hidden: Tensor, head: OutputHead, vocab: int, chunk: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits of one chunk after another. The caller may overwrite them."""
    aligned = AlignedHead(head.weight, vocab, head.weight.dtype)
    bias = shared_bias(head.bias, vocab, _precise(head))
    rows = max(1, min(chunk or default_chunk(hidden.device, vocab, len(hidden), aligned.main, None), len(hidden)))
    z = aligned.buffer(rows)
    for low in range(0, len(hidden), rows):
        part = slice(low, min(low + rows, len(hidden)))
        product = aligned.logits(hidden[part].to(z.dtype), z[: part.stop - low])
        yield part, head.transform(product, bias, _precise(head))


def _vocab(head: OutputHead, vocab_size: int | None) -> int:
    vocab = len(head.weight) if vocab_size is None else vocab_size
    if not 0 < vocab <= len(head.weight):
        raise LimbeckError(
            f"vocab_size={vocab_size} is not between 1 and the {len(head.weight)} rows of the output head."
        )
    return vocab


def _precise(head: OutputHead) -> torch.dtype:
    return torch.float64 if head.weight.dtype is torch.float64 else torch.float32
