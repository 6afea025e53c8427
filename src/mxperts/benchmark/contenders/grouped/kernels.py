# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, misc"
"""The Triton kernels of dense experts. Triton's types are not Python's."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["pairs", "blocks_m"])
def grouped_matmul(
    x_ptr,
    w_ptr,
    y_ptr,
    router_ptr,
    pairs_ptr,
    experts_ptr,
    pairs,
    N,
    blocks_m,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Rows of x [., K] times the weights [E, N, K] of their experts, transposed: y [pairs, N].

    A block of rows, ``pairs_ptr`` [blocks_m * BLOCK_M], has one expert, ``experts_ptr`` [blocks_m]. A row is a pair of
    a token and one of its experts, and reads row pair // SLOTS of x; pairs from ``pairs`` on are padding. Sums are
    float32, and multiplied by the pair's router weight if WEIGHTED.
    """
    block = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    in_group = GROUP_M * blocks_n  # blocks of rows in a group take turns, so that they share tiles of weights in L2
    first_m = block // in_group * GROUP_M
    group_m = min(blocks_m - first_m, GROUP_M)
    block_m = first_m + block % in_group % group_m
    block_n = block % in_group // group_m

    expert = tl.load(experts_ptr + block_m).to(tl.int64)
    pair = tl.load(pairs_ptr + block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    real = pair < pairs
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x = x_ptr + (tl.where(real, pair, 0) // SLOTS)[:, None] * K + k[None, :]
    w = w_ptr + expert * N * K + (column % N).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x_tile = tl.load(x, mask=real[:, None], other=0.0)
            w_tile = tl.load(w)
        else:
            x_tile = tl.load(x, mask=real[:, None] & (k[None, :] < K - start), other=0.0)
            w_tile = tl.load(w, mask=k[:, None] < K - start, other=0.0)
        total = tl.dot(x_tile, w_tile, total)
        x += BLOCK_K
        w += BLOCK_K
    if WEIGHTED:
        total *= tl.load(router_ptr + pair, mask=real, other=0.0)[:, None]
    y = y_ptr + pair[:, None] * N + column[None, :]
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=real[:, None] & (column < N)[None, :])


@triton.jit
def gate(h_ptr, a_ptr, width, alpha, limit, SWIGLUOAI: tl.constexpr, BLOCK: tl.constexpr):
    """The gated activation of h [., 2 * width], gate columns first: a [., width]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    g = tl.load(h_ptr + row * 2 * width + column, mask=real, other=0.0).to(tl.float32)
    u = tl.load(h_ptr + row * 2 * width + width + column, mask=real, other=0.0).to(tl.float32)
    if SWIGLUOAI:
        g = tl.minimum(g, limit)
        u = tl.minimum(tl.maximum(u, -limit), limit)
        a = g * tl.sigmoid(alpha * g) * (u + 1.0)
    else:
        a = g * tl.sigmoid(g) * u
    tl.store(a_ptr + row * width + column, a.to(a_ptr.dtype.element_ty), mask=real)


@triton.jit
def sum_slots(y_ptr, router_ptr, out_ptr, width, SLOTS: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over a token's experts, y [T, SLOTS, width] times router weights if WEIGHTED: out [T, width]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        y = tl.load(y_ptr + (row * SLOTS + slot) * width + column, mask=real, other=0.0).to(tl.float32)
        total += y * tl.load(router_ptr + row * SLOTS + slot) if WEIGHTED else y
    tl.store(out_ptr + row * width + column, total.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def silu_of_pairs(h):
    """silu(gate) * up of h [rows, 2 * columns], whose columns are gate and up in turn: a fused activation of a peer."""
    pairs = tl.reshape(h, (h.shape[0], h.shape[1] // 2, 2))
    gate_, up = tl.split(pairs)
    gate_ = gate_.to(tl.float32)
    return gate_ / (1.0 + tl.exp(-gate_)) * up.to(tl.float32)
