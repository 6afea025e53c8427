"""Which rows of a grouped product belong together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Pairs of a token and one of its experts, in blocks of rows that have one expert each.

    Attributes:
        pairs: int32 [blocks * rows]: token * k + slot; T * k, which is no pair, fills a block up.
        experts: int32 [blocks].
    """

    pairs: Tensor
    experts: Tensor


def blocks_of(top_k_index: Tensor, rows: int, experts: int, *, always_sort: bool = False) -> Blocks:
    """Blocks of so many rows, experts in order.

    Where there are far fewer pairs than experts, each pair is a block: then hardly any two would share one, and a layer
    could leave out the sorting, as vLLM does; unless they are always to be sorted.
    """
    flat = top_k_index.flatten().cpu()
    total, device = flat.numel(), top_k_index.device
    if 4 * total <= experts and not always_sort:
        order, counts, owners = torch.arange(total), torch.ones(total, dtype=torch.int64), flat
    else:
        order = flat.argsort(stable=True)
        owners, counts = flat[order].unique_consecutive(return_counts=True)
    of_expert = -(-counts // rows)  # blocks
    pairs = torch.full((int(of_expert.sum()) * rows,), total, dtype=torch.int32)
    first_pair, first_row = counts.cumsum(0) - counts, (of_expert.cumsum(0) - of_expert) * rows
    shift = (first_row - first_pair).repeat_interleave(counts)
    pairs[torch.arange(total) + shift] = order.int()
    return Blocks(pairs=pairs.to(device), experts=owners.repeat_interleave(of_expert).int().to(device))
