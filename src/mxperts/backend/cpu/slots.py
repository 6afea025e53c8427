"""The last step of a layer by itself: the weighted sum of each token's rows."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_slots(rows: Tensor, position: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
    """As ``layer.sum_token`` sums: product and sum rounded by themselves, in the order of slots.

    See ``mxperts.distributed.exchange.Sum``.
    """
    total = torch.zeros(out.shape, dtype=torch.float32)
    for slot in range(position.shape[1]):
        (token,) = torch.nonzero(position[:, slot] >= 0, as_tuple=True)
        total.index_add_(0, token, rows[position[token, slot]] * weights[token, slot].unsqueeze(-1))
    out.copy_(total)
