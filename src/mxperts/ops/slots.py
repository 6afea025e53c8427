"""The last step of ``fused_experts`` by itself, for rows that other processes computed."""

from __future__ import annotations

from torch import Tensor

from mxperts.ops.dispatch import Backend


def sum_slots(rows: Tensor, position: Tensor, ids: Tensor, weights: Tensor, out: Tensor, *, backend: Backend) -> None:
    """Write to ``out`` the weighted sum of each token's rows, as ``fused_experts`` on this backend sums, bit for bit.

    Args:
        rows: [R, H], unweighted results of experts, in the backend's ``SUMS``.
        position: int64 [T, k]: which row each slot has; -1 for none.
        ids: int64 [T, k], the expert of each slot.
        weights: float32 [T, k].
        out: [T, H], rounded to once.
        backend: the one that computed the rows.
    """
    backend.load("sum_slots")(rows, position, ids, weights, out)
