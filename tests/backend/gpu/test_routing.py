"""Grouping on the device against loops over lists."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxperts.backend.gpu import routing
from mxperts.backend.reference.experts import local_experts

CASES = [  # experts, tokens, k, block_m, mapped, dtype
    (5, 7, 3, 16, False, torch.int64),
    (5, 1, 1, 16, False, torch.int32),
    (5, 130, 4, 16, True, torch.int64),
    (1024, 20, 8, 16, False, torch.int32),
    (3, 300, 2, 32, True, torch.int32),
    (1, 260, 1, 128, False, torch.int64),
]


@pytest.mark.parametrize("by", [routing._by_comparing, routing._by_sorting], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("experts", "tokens", "k", "block_m", "mapped", "dtype"), CASES)
def test_groups(
    by: object, experts: int, tokens: int, k: int, block_m: int, mapped: bool, dtype: torch.dtype, device: str
) -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-2, (2 * experts if mapped else experts) + 2, (tokens, k), generator=g).to(dtype)
    expert_map = None
    if dtype is torch.int64:
        ids[0, 0] = 2**40 + 1
    if mapped:
        expert_map = torch.full((2 * experts,), -1, dtype=torch.int64 if dtype is torch.int32 else torch.int32)
        expert_map[1::2] = torch.arange(experts)
        expert_map[0] = experts + 3
    local, order, blocks = expected(ids, expert_map, experts, block_m)
    on_device = None if expert_map is None else expert_map.to(device)
    found = by(ids.reshape(-1).to(device), on_device, experts, block_m)  # type: ignore[operator]
    used, unused = len(blocks), found.blocks - len(blocks)
    assert unused >= 0
    assert torch.equal(found.local.cpu().long(), local)
    assert found.order[: len(order)].tolist() == order
    assert found.block_expert.tolist() == [expert for expert, _, _ in blocks] + [-1] * unused
    assert found.block_first[:used].tolist() == [first for _, first, _ in blocks]
    assert found.block_end[:used].tolist() == [end for _, _, end in blocks]
    tables = (found.local, found.order, found.block_expert, found.block_first, found.block_end)
    assert {t.dtype for t in tables} == {torch.int32}


def expected(
    ids: Tensor, expert_map: Tensor | None, experts: int, block_m: int
) -> tuple[Tensor, list[int], list[tuple[int, int, int]]]:
    """Local experts, pairs in order, and the expert, first row and end of every block."""
    local = local_experts(ids, expert_map, experts).reshape(-1)
    order: list[int] = []
    blocks = []
    for expert in range(experts):
        pairs = [pair for pair, of in enumerate(local.tolist()) if of == expert]
        end = len(order) + len(pairs)
        blocks += [(expert, first, end) for first in range(len(order), end, block_m)]
        order += pairs
    return local, order, blocks


@pytest.mark.parametrize(("few", "by"), [(8, "_by_comparing"), (7, "_by_sorting")])
def test_many_pairs_are_sorted(few: int, by: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "FEW_PAIRS", few)
    monkeypatch.setattr(routing, by, lambda *_: "asked")
    assert routing.group(torch.zeros(4, 2, dtype=torch.int64, device=device), None, 3, 16) == "asked"


def test_most_blocks() -> None:
    """Every expert but one with one pair, and the bound is reached; with few pairs it is one block a pair."""
    assert routing.most_blocks(8, 128, 16) == 8
    assert routing.most_blocks(4 + 33, 5, 16) == 4 + 3
    assert routing.most_blocks(1, 1, 128) == 1
