// A projection of the tokens of each expert, where they are few: an item is a tile of tokens times UNITS units of 32 rows.
// A warp has one unit, or part of its K, whose codes it decodes in registers as the A of mma.sync, and all of the tile's tokens,
// which are B in shared memory. Several blocks on a multiprocessor hide each other's waiting.
//
//   SHARE     warps of a unit
//   DEPTH     slices that a warp has room for
//   CHUNK     steps of 64 of K whose inputs are in shared memory, twice; SHARE * (DEPTH - 1) at least
//   BLOCKS    blocks on a multiprocessor
//   EXACT     whether products of a block of 32 of K are added up in float32: sums within mma.sync are truncated
#include "overlap.cuh"
#include "product.cuh"
#include "weights.cuh"

constexpr int WARPS = UNITS * SHARE;
constexpr int THREADS = 32 * WARPS;
constexpr int ROW = CHUNK * 128;                // bytes of a token's inputs
constexpr int PLANE = MOST_N * ROW;
constexpr int STAGE = PLANES * PLANE;

// A chunk of a tile's inputs, by all threads. Those of odd rows are exchanged so that lanes find theirs in different banks.
DI void copy_chunk(const Projection& q, const Item& item, const u32* rows, int chunk, u32 stage) {
  const int pieces = min(CHUNK, q.steps - chunk * CHUNK) * 8;
  for (int i = threadIdx.x; i < item.tile.count * (CHUNK * 8); i += THREADS) {
    const int row = i / (CHUNK * 8), piece = i % (CHUNK * 8);
    if (piece >= pieces) continue;
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) {
      copy16(stage + plane * PLANE + row * ROW + ((piece ^ ((row & 1) << 2)) << 4),
             (const u8*)q.x + (rows[row] + chunk * (CHUNK * 8) + piece) * (u64)16 + plane * q.plane);
    }
  }
}

template <int N, int J> DI void multiply_block(float (&c)[2][N / 8][4], const Slice& slice, u32 tokens) {
  u32 a[2][2][4];
  decode_block<J>(slice, a);
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    float block[2][4] = {};
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) {
      const Quad b = load_shared4<0>(tokens + plane * PLANE + j * 8 * ROW);
#pragma unroll
      for (int i = 0; i < 2; i++) mma(EXACT ? block[i] : c[i][j], a[i][0], b.x, b.y);
#pragma unroll
      for (int i = 0; i < 2; i++) mma(EXACT ? block[i] : c[i][j], a[i][1], b.z, b.w);
    }
    if constexpr (EXACT) {
#pragma unroll
      for (int i = 0; i < 8; i++) c[i / 4][j][i % 4] += block[i / 4][i % 4];
    }
  }
}

template <int N>
DI void compute(const Args& p, const Projection& q, const Item& item, const u32* rows, u8* shared, int warp, int lane) {
  float c[2][N / 8][4] = {};
  const int unit = warp / SHARE, part = warp % SHARE, n = lane >> 2, t = lane & 3;
  const u32 stages = shared_address(shared);
  const u32 first = n * ROW + ((t ^ ((n & 1) << 2)) << 4), second = n * ROW + (((t + 4) ^ ((n & 1) << 2)) << 4);
  copy_chunk(q, item, rows, 0, stages);  // waited for with the first weights
  const u8* weights = q.unit(item.tile, min(item.unit + unit, q.units - 1)) + part * SLICE;
  u8* room = shared + 2 * STAGE + warp * (DEPTH * Ring<DEPTH>::PLACE);
  Ring<DEPTH> ring(room, weights, (q.steps - part + SHARE - 1) / SHARE, SHARE * SLICE, lane);
  for (int begin = 0, chunk = 0; begin < q.steps; begin += CHUNK, chunk++) {
    wait_copies<DEPTH - 2>();
    __syncthreads();
    if (begin + CHUNK < q.steps) copy_chunk(q, item, rows, chunk + 1, stages + (chunk + 1 & 1) * STAGE);
    u32 tokens = stages + (chunk & 1) * STAGE + part * 128;
    const int end = min(q.steps, begin + CHUNK);
    for (int step = begin + part; step < end; step += SHARE) {
      const Slice slice = load_slice(ring.take(), lane);
      multiply_block<N, 0>(c, slice, tokens + first);
      multiply_block<N, 1>(c, slice, tokens + second);
      tokens += SHARE * 128;
    }
  }
  if constexpr (SHARE > 1) {  // the first of a unit's warps adds up what all have
    float* sums = (float*)shared + (unit * 32 + lane) * (N + 1);
    for (int other = SHARE - 1; other > 0; other--) {
      __syncthreads();
      if (part == other) {
#pragma unroll
        for (int i = 0; i < N; i++) sums[i] = c[i / (N / 2)][i / 4 % (N / 8)][i % 4];
      }
      __syncthreads();
      if (part == 0) {
#pragma unroll
        for (int i = 0; i < N; i++) c[i / (N / 2)][i / 4 % (N / 8)][i % 4] += sums[i];
      }
    }
    if (part != 0) return;
  }
  store_results<N>(p, q, item, item.unit + unit, c, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) narrow(const __grid_constant__ Args p) {
  extern __shared__ __align__(16) u8 shared[];
  __shared__ u32 rows[MOST_N];
  wait_for_previous();
  let_next_start();
  const Projection q(p);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int items = q.items();
  for (int i = blockIdx.x; i < items; i += gridDim.x) {
    const Item item(q.tiles, q.items_of_tile, i);
    __syncthreads();  // all have read what the item before had in shared memory
    for (int n = threadIdx.x; n < item.tile.count; n += THREADS) rows[n] = q.row(item.tile, n);
    __syncthreads();
    switch (item.tile.n) {
#define CASE(N) case N: if constexpr (N <= MOST_N) compute<N>(p, q, item, rows, shared, warp, lane); break;
      CASE(8) CASE(16) CASE(24) CASE(32) CASE(40) CASE(48) CASE(56) CASE(64)
    }
  }
}
