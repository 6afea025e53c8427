// Pairs (token, slot) sorted by expert, those of one expert in their order, and the tiles they are computed in. Each warp of a few
// blocks has a run of the pairs: it counts them, and once all have counted it knows where they go.
//
//   CLUSTER     blocks, which are a cluster
//   SEGMENTS    warps of each
//   EXPERTS     at least the number of experts
#include "grouped.cuh"
#include "cluster.cuh"
#include "overlap.cuh"

constexpr int THREADS = 32 * SEGMENTS;
constexpr int AT_ONCE = 8;
constexpr int GROUP = 16;  // tiles that share weights: more would not find their tokens in the L2 cache again

// Which lanes have the same expert, bit by bit: __match_any_sync takes a time for each that there is.
DI u32 same_expert(int e) {
  u32 there = __ballot_sync(0xffffffffu, e >= 0), same = e >= 0 ? there : ~there;
#pragma unroll
  for (int bit = 1; bit < EXPERTS; bit *= 2) {
    u32 set = __ballot_sync(0xffffffffu, e & bit);
    same &= e & bit ? set : ~set;
  }
  return same;
}

DI int round_up(int n) { return max(LEAST_N, (n + STEP_N - 1) / STEP_N * STEP_N); }

DI int sum_before(int v, int lane) {
  int sum = v;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    int other = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += other;
  }
  return sum - v;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) sort(const __grid_constant__ Args p) {
  extern __shared__ int counts[];  // [SEGMENTS, EXPERTS]
  int* own = counts + SEGMENTS * EXPERTS;  // [EXPERTS] pairs of this block, as are the next
  int* length = own + EXPERTS;             // pairs of all blocks
  int* start = length + EXPERTS;
  int* tile = start + EXPERTS;
  wait_for_previous();
  let_next_start();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int pairs = (int)(p.T * p.k), k = (int)p.k, E = (int)p.E;
  const int rank = rank_in_cluster(), segments = SEGMENTS * CLUSTER;
  const int run = ((pairs + segments - 1) / segments + 31) / 32 * 32;
  const int begin = (rank * SEGMENTS + warp) * run, end = min(pairs, begin + run);
  int* mine = counts + warp * EXPERTS;

  for (int i = threadIdx.x; i < SEGMENTS * EXPERTS; i += THREADS) counts[i] = 0;
  __syncthreads();
  for (int first = begin; first < end; first += 32 * AT_ONCE) {
    int e[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      int i = first + 32 * u + lane;
      e[u] = i < end ? expert_of(p, i) : -1;
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      int i = first + 32 * u + lane;
      if (i < end) p.local[i] = (short)e[u];
      if (e[u] >= 0) atomicAdd(mine + e[u], 1);
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
    int total = 0;
    for (int s = 0; s < SEGMENTS; s++) {
      int n = counts[s * EXPERTS + e];
      counts[s * EXPERTS + e] = total;
      total += n;
    }
    own[e] = total;
  }
  wait_for_cluster();
  int before_rank[(EXPERTS + THREADS - 1) / THREADS];
#pragma unroll
  for (int i = 0; i < (EXPERTS + THREADS - 1) / THREADS; i++) {
    const int e = i * THREADS + threadIdx.x;
    int total = 0;
    before_rank[i] = 0;
    if (e < EXPERTS) {
      for (int r = 0; r < CLUSTER; r++) {
        if (r == rank) before_rank[i] = total;
        total += load_of_cluster(own + e, r);
      }
      length[e] = total;
    }
  }
  __syncthreads();
  if (warp == 0) {
    int position = 0, tiles = 0;
    for (int e = lane; e < EXPERTS; e += 32) {
      int n = FOLDED ? (length[e] + 7) / 8 * 8 : length[e], t = (length[e] + MOST_N - 1) / MOST_N;
      int before = sum_before(n, lane), tiles_before = sum_before(t, lane);
      start[e] = position + before;
      tile[e] = tiles + tiles_before;
      position += __shfl_sync(0xffffffffu, before + n, 31);
      tiles += __shfl_sync(0xffffffffu, tiles_before + t, 31);
    }
    if (lane == 0 && rank == 0) {
      p.totals[0] = tiles, p.totals[1] = position;
      if (FOLDED) p.totals[2] = p.totals[3] = 0;
    }
  }
  __syncthreads();
  if (FOLDED && rank == 0) {
    for (int e = threadIdx.x; e < E; e += THREADS)
      for (int i = length[e]; i % 8; i++) p.source[start[e] + i] = -1;
  }
  for (int e = threadIdx.x; rank == 0 && e < E; e += THREADS) {
    int n = length[e], t = (n + MOST_N - 1) / MOST_N;
    if (t == 0) continue;
    int size = round_up((n + t - 1) / t);
    for (int i = 0; i < t; i++) {
      int count = min(size, n - i * size);  // something is left: n > MOST_N * (t - 1)
      int group = i / GROUP * GROUP;
      const int n_of_tile = round_up(count), group_at = tile[e] + group;
      p.tiles[tile[e] + i] = {e, start[e] + i * size, count, n_of_tile, group_at, min(GROUP, t - group), {0, 0}};
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < (EXPERTS + THREADS - 1) / THREADS; i++) {
    const int e = i * THREADS + threadIdx.x;
    if (e < EXPERTS) start[e] += before_rank[i];
  }
  __syncthreads();
  for (int first = begin; first < end; first += 32 * AT_ONCE) {
    int e[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      int i = first + 32 * u + lane;
      e[u] = i < end ? p.local[i] : -1;
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      int i = first + 32 * u + lane;
      u32 same = same_expert(e[u]);
      int rank = __popc(same & ((1u << lane) - 1)), before = e[u] >= 0 ? mine[e[u]] : 0;
      __syncwarp();
      if (e[u] >= 0 && (same >> lane) == 1u) mine[e[u]] = before + rank + 1;
      __syncwarp();
      if (e[u] >= 0) {
        int at = start[e[u]] + before + rank;
        p.source[at] = i / k;
        p.expert[at] = (short)e[u];
        p.position[i] = at;
      } else if (i < end) {
        p.position[i] = -1;
      }
    }
  }
  wait_for_cluster();  // others read from here
}
