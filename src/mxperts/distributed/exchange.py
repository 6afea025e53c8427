"""Tokens to the processes that have their experts, and the results back: two all-to-alls of rows.

Every pair of token and expert is a row. It travels to its expert as ``Wire`` packs it and returns in what the backend
sums in, not rounded; then the token's process sums its rows as ``fused_experts`` would have summed them. So the result
is bit for bit that of one process which has all experts, wherever a row's result does not depend on the rows beside it:
always on CPU and with the reference, and on a GPU within ``batch_invariant``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather, all_to_all_single

from mxperts.distributed.traffic import traffic
from mxperts.distributed.wire import Wire

Experts = Callable[[Tensor, Tensor], Tensor]
"""Rows [R, H] and the local expert of each [R] to unweighted results [R, H], not rounded to the dtype of the rows."""
Sum = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""A backend's ``sum_slots``, the last step of its ``fused_experts`` by itself, bit for bit.

It gets rows [R, H] in what the backend sums in; position int64 [T, k], the row of each slot or -1; ids int64 [T, k],
the expert of each slot; weights float32 [T, k]; and out [T, H], which it fills with each token's weighted sum, rounded
once.
"""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """The experts of one layer, spread over a group of processes.

    Attributes:
        group: the processes; the first has the first experts, and so on, each as many.
        experts: how many each has.
        wire: how rows travel to them.
        sums: the dtype in which they return.
    """

    group: ProcessGroup
    experts: int
    wire: Wire
    sums: torch.dtype

    @torch.no_grad()
    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, run: Experts, add_up: Sum) -> Tensor:
        """One layer.

        Args:
            x: this process' own tokens [T, H]; none is fine.
            ids: int64 [T, k], experts of all processes; others than these contribute nothing.
            weights: float [T, k].
            run: computes this process' experts.
            add_up: sums each token's rows.

        Returns:
            [T, H], like ``x``.
        """
        order, send_counts, receive_counts = self._count(ids)
        sizes = torch.stack([send_counts.sum(dim=1), receive_counts.sum(dim=1)])
        send, receive = sizes.tolist()  # the one wait for the device

        order = order[: sum(send)]
        packed = self.wire.pack(x)[order // max(1, ids.shape[1])]
        arrived = packed.new_empty(sum(receive), self.wire.row_bytes)
        all_to_all_single(arrived, packed, receive, send, group=self.group)

        local = torch.arange(self.experts, device=x.device).repeat(len(receive))
        local = local.repeat_interleave(receive_counts.flatten(), output_size=sum(receive))
        results = run(self.wire.unpack(arrived), local)

        rows = results.new_empty(sum(send), x.shape[1])
        all_to_all_single(rows, results, send, receive, group=self.group)

        position = torch.full((ids.numel(),), -1, dtype=torch.int64, device=x.device)
        position[order] = torch.arange(len(order), device=x.device)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        add_up(rows, position.view(ids.shape), ids, weights.to(torch.float32), out)
        self._record(send, receive, x)
        return out

    def _count(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs sorted by expert, those of none last; and how many each process' experts get from and send to others.

        Returns:
            [T k], [processes, experts] of the rows that are sent, and the same of those that arrive.
        """
        processes = self.group.size()
        every = processes * self.experts
        expert = ids.flatten().to(torch.int64)
        expert = torch.where((expert >= 0) & (expert < every), expert, every)
        counts = torch.zeros(every + 1, dtype=torch.int64, device=ids.device)
        counts.scatter_add_(0, expert, torch.ones_like(expert))
        send = counts[:every].view(processes, self.experts)
        receive = torch.empty_like(send)
        all_to_all_single(receive, send, group=self.group)
        return torch.argsort(expert, stable=True), send, receive

    def _record(self, send: list[int], receive: list[int], x: Tensor) -> None:
        me = self.group.rank()
        sent, returned = sum(send) - send[me], sum(receive) - receive[me]
        row = x.shape[1] * x.itemsize
        traffic.exchanges += 1
        traffic.counts += 8 * self.experts * (len(send) - 1)
        traffic.inputs += sent * self.wire.row_bytes
        traffic.outputs += returned * x.shape[1] * self.sums.itemsize
        traffic.stock_inputs += sent * row
        traffic.stock_outputs += returned * row


def own_share(group: ProcessGroup, tokens: int) -> slice:
    """Of a batch that every process of a group holds, the tokens that are this one's to bring to their experts."""
    share = -(-tokens // group.size())
    return slice(min(tokens, group.rank() * share), min(tokens, (group.rank() + 1) * share))


def gather_shares(group: ProcessGroup, share: Tensor, tokens: int) -> Tensor:
    """[tokens, H] from the results of every process' ``own_share``."""
    each = -(-tokens // group.size())
    padded = share.new_zeros(each, share.shape[1])
    padded[: len(share)] = share
    whole = share.new_empty(each * group.size(), share.shape[1])
    all_gather(list(whole.split(max(1, each))), padded, group=group)
    traffic.gathered += padded.nbytes * (group.size() - 1)
    return whole[:tokens]
