// The positions whose inputs fp8 has not all of, and the tiles to compute them in with bf16. Every block makes the same list for
// itself and all others: mostly there is nothing to be picked.
//
//   EXPERTS     at least the number of experts
#pragma once
#include "grouped.cuh"

// The number of tiles, to all THREADS of a block; `length` has room for EXPERTS.
template <int THREADS> DI int pick(const Args& p, int* length) {
  __shared__ int before[THREADS / 32], tiles;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, end = p.totals[1], E = (int)p.E;
  for (int e = threadIdx.x; e < EXPERTS; e += THREADS) length[e] = 0;
  __syncthreads();
  int picked = 0;
  for (int first = 0; first < end; first += THREADS) {
    const int at = first + threadIdx.x;
    const bool mine = at < end && p.source[at] >= 0 && p.outside[at];
    const u32 all = __ballot_sync(0xffffffffu, mine);
    if (lane == 0) before[warp] = __popc(all);
    __syncthreads();
    int rank = __popc(all & ((1u << lane) - 1)), total = 0;
    for (int w = 0; w < THREADS / 32; w++) {
      rank += w < warp ? before[w] : 0;
      total += before[w];
    }
    if (mine) {
      p.picked[picked + rank] = at;
      atomicAdd(length + p.expert[at], 1);
    }
    picked += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    int position = 0;
    tiles = 0;
    for (int e = 0; e < E; e++) {
      const int n = length[e], t = (n + MOST_N - 1) / MOST_N;
      for (int i = 0; i < t; i++) {
        const int count = min(MOST_N, n - i * MOST_N), of_tile = max(LEAST_N, (count + STEP_N - 1) / STEP_N * STEP_N);
        p.exact[tiles + i] = {e, position + i * MOST_N, count, of_tile, tiles, t, {0, 0}};
      }
      position += n, tiles += t;
    }
  }
  __syncthreads();
  return tiles;
}
