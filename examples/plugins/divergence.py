"""A divergence: the squared Hellinger distance 1 − Σ √(pq). Use it with ``kd_objective: squared_hellinger``."""

import torch

from limbeck.objectives import register


@register
def squared_hellinger():
    """Returns the two formulas of D: each entry's part of the value, and w = q · ∂D/∂q."""

    def terms(p, q, log_p, log_q):
        root = torch.exp(0.5 * (log_p + log_q))
        return 0.5 * (p + q) - root, 0.5 * q - 0.5 * root

    return terms
