"""Samples tokens from logits with random numbers that are given, so that a sample does not depend on its batch."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.rollout.generator import SamplingParams


def sample_tokens(logits: Tensor, draws: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token per row, by inverting the cumulative distribution at ``draws``.

    logits: [rows, vocabulary]. draws: [rows] float64 in [0, 1). Returns the tokens [rows] and their log-probabilities
    [rows], as ``Completion`` defines them. top_k is applied before top_p, as in vLLM; top_p keeps the token that reaches
    it.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.temperature == 0:
        best, tokens = logits.max(-1)
        return tokens, best - logits.logsumexp(-1)
    logits = logits / sampling.temperature
    ids = None  # of the candidates, most likely first; None where the candidates are the vocabulary in its own order
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, ids = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, ids = logits.sort(descending=True)
    largest = logits.amax(-1, keepdim=True)
    weights = (logits - largest).exp()
    # In float64, the running sum of a large vocabulary is exact enough to be inverted, and draw * total stays below total.
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    if sampling.top_p < 1:
        kept = (cumulative - weights < sampling.top_p * total).sum(-1, keepdim=True)
        total = cumulative.gather(-1, kept - 1)
    chosen = torch.searchsorted(cumulative, draws[:, None] * total, right=True).clamp_(max=logits.shape[-1] - 1)
    log_probs = (logits.gather(-1, chosen) - largest - total.log()).squeeze(-1)
    return (chosen if ids is None else ids.gather(-1, chosen)).squeeze(-1), log_probs
