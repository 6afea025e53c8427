"""Which rows each expert gets: (token, slot) pairs sorted by expert and cut into blocks, all on the device.

Nothing here waits for the device, and no size depends on what the ids are, so that it can be part of a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW_PAIRS = 4096
"""Up to here pairs are compared each with each, in two kernels; more are sorted by PyTorch."""
_NOWHERE = tl.constexpr(0x7FFFFFFF)


@dataclass(frozen=True, eq=False)
class Grouping:
    """Pairs grouped by expert, and the blocks of rows that kernels compute.

    Attributes:
        local: int32 [pairs], the local expert of each pair, -1 if it contributes nothing.
        order: int32 [pairs], pairs sorted by expert, those of one expert in their order; then those that contribute
            nothing, in any order.
        block_expert, block_first, block_end: int32 [blocks]: a block's expert, and where in ``order`` its rows begin
            and its expert's end. Blocks beyond the last one in use have expert -1.
        block_m: most rows of a block.
    """

    local: Tensor
    order: Tensor
    block_expert: Tensor
    block_first: Tensor
    block_end: Tensor
    block_m: int

    @property
    def blocks(self) -> int:
        """Most blocks that there may be."""
        return self.block_expert.shape[0]


def most_blocks(pairs: int, experts: int, block_m: int) -> int:
    """Most blocks that ``pairs`` fall into, however they are spread over the experts."""
    return (pairs + min(pairs, experts) * (block_m - 1)) // block_m


def group(top_k_index: Tensor, expert_map: Tensor | None, experts: int, block_m: int) -> Grouping:
    """Group the pairs of ``top_k_index`` [T, k], int32 or int64.

    Ids out of range, of ``expert_map`` [global E] or, mapped, of ``experts``, contribute nothing.
    """
    ids = top_k_index.reshape(-1)
    by = _by_comparing if ids.shape[0] <= FEW_PAIRS else _by_sorting
    return by(ids, expert_map, experts, block_m)


def _by_comparing(ids: Tensor, expert_map: Tensor | None, experts: int, block_m: int) -> Grouping:
    pairs = ids.shape[0]
    blocks = most_blocks(pairs, experts, block_m)
    sizes = [pairs, pairs, blocks, blocks, blocks, pairs, pairs]
    buffer = torch.empty(sum(sizes), dtype=torch.int32, device=ids.device)
    local, order, block_expert, block_first, block_end, place, rank = buffer.split(sizes)
    tile = min(128, max(16, triton.next_power_of_2(pairs)))
    grid = (triton.cdiv(pairs, tile),)
    given = ids if expert_map is None else expert_map  # a pointer that is not used
    map_size = 0 if expert_map is None else expert_map.shape[0]
    place_pairs[grid](ids, given, local, order, place, rank, pairs, map_size, experts, expert_map is not None, tile)
    grid = (triton.cdiv(max(pairs, blocks), tile),)
    place_blocks[grid](local, place, rank, block_expert, block_first, block_end, pairs, blocks, block_m, tile)
    return Grouping(local, order, block_expert, block_first, block_end, block_m)


@triton.jit
def _local_experts(ids_ptr, map_ptr, pair, pairs, map_size, experts, MAPPED: tl.constexpr):
    """The local expert of each pair, int32; -1 of those that contribute nothing, ``_NOWHERE`` beyond the last pair."""
    ids = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1)
    if MAPPED:
        known = (ids >= 0) & (ids < map_size)
        ids = tl.load(map_ptr + ids, mask=known, other=-1)
    local = tl.where((ids >= 0) & (ids < experts), ids, -1).to(tl.int32)
    return tl.where(pair < pairs, local, _NOWHERE)


@triton.jit(do_not_specialize=["pairs"])
def place_pairs(
    ids_ptr,
    map_ptr,
    local_ptr,
    order_ptr,
    place_ptr,
    rank_ptr,
    pairs,
    map_size,
    experts,
    MAPPED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Fill ``local`` and ``order``, and each pair's place in ``order`` and rank among those of its expert."""
    mine = tl.program_id(0) * TILE + tl.arange(0, TILE)
    expert = _local_experts(ids_ptr, map_ptr, mine, pairs, map_size, experts, MAPPED)
    key = tl.where(expert < 0, experts, expert)  # those that contribute nothing come last
    before = tl.zeros([TILE], tl.int32)
    rank = tl.zeros([TILE], tl.int32)
    start = 0
    while start < pairs:
        other = start + tl.arange(0, TILE)
        others = _local_experts(ids_ptr, map_ptr, other, pairs, map_size, experts, MAPPED)
        others = tl.where(others < 0, experts, others)
        before += tl.sum((others[None, :] < key[:, None]).to(tl.int32), axis=1)
        earlier = (others[None, :] == key[:, None]) & (other[None, :] < mine[:, None])
        rank += tl.sum(earlier.to(tl.int32), axis=1)
        start += TILE
    there = mine < pairs
    tl.store(local_ptr + mine, expert, mask=there)
    tl.store(place_ptr + mine, before + rank, mask=there)
    tl.store(rank_ptr + mine, rank, mask=there)
    tl.store(order_ptr + before + rank, mine, mask=there)


@triton.jit(do_not_specialize=["pairs", "blocks"])
def place_blocks(
    local_ptr,
    place_ptr,
    rank_ptr,
    block_expert_ptr,
    block_first_ptr,
    block_end_ptr,
    pairs,
    blocks,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
):
    """Fill the table of blocks: every ``BLOCK_M``-th pair of an expert begins one."""
    mine = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = mine < pairs
    expert = tl.load(local_ptr + mine, mask=there, other=-1)
    place = tl.load(place_ptr + mine, mask=there, other=0)
    rank = tl.load(rank_ptr + mine, mask=there, other=1)
    block = tl.zeros([TILE], tl.int32)
    count = tl.zeros([TILE], tl.int32)
    used = 0
    start = 0
    while start < pairs:
        other = start + tl.arange(0, TILE)
        experts = tl.load(local_ptr + other, mask=other < pairs, other=-1)
        places = tl.load(place_ptr + other, mask=other < pairs, other=0)
        ranks = tl.load(rank_ptr + other, mask=other < pairs, other=1)
        begins = (experts >= 0) & (ranks % BLOCK_M == 0)
        used += tl.sum(begins.to(tl.int32))
        block += tl.sum((begins[None, :] & (places[None, :] < place[:, None])).to(tl.int32), axis=1)
        count += tl.sum((experts[None, :] == expert[:, None]).to(tl.int32), axis=1)
        start += TILE
    begins = there & (expert >= 0) & (rank % BLOCK_M == 0)
    tl.store(block_expert_ptr + block, expert, mask=begins)
    tl.store(block_first_ptr + block, place, mask=begins)
    tl.store(block_end_ptr + block, place - rank + count, mask=begins)
    tl.store(block_expert_ptr + mine, tl.full([TILE], -1, tl.int32), mask=(mine >= used) & (mine < blocks))


def _by_sorting(ids: Tensor, expert_map: Tensor | None, experts: int, block_m: int) -> Grouping:
    pairs, device = ids.shape[0], ids.device
    local = ids
    if expert_map is not None:
        known = (local >= 0) & (local < expert_map.shape[0])
        local = torch.where(known, expert_map[torch.where(known, local, 0)], -1)
    local = local.clamp(-1, experts).to(torch.int32)
    here = (local >= 0) & (local < experts)
    ranked, order = torch.sort(torch.where(here, local, experts), stable=True)
    start = torch.searchsorted(ranked, torch.arange(experts + 1, dtype=torch.int32, device=device), out_int32=True)
    per_expert = (start[1:] - start[:-1] + (block_m - 1)) // block_m
    after = per_expert.cumsum(0, dtype=torch.int32)  # blocks of an expert and those before it
    block = torch.arange(most_blocks(pairs, experts, block_m), dtype=torch.int32, device=device)
    expert = torch.searchsorted(after, block, right=True, out_int32=True)
    known = expert.clamp(max=experts - 1)
    first = start[known] + (block - after[known] + per_expert[known]) * block_m
    return Grouping(
        local=torch.where(here, local, -1),
        order=order.to(torch.int32),
        block_expert=torch.where(expert < experts, expert, -1),
        block_first=first,
        block_end=start[known + 1],
        block_m=block_m,
    )
