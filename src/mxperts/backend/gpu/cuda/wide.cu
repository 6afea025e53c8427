// A projection of the tokens of each expert, on Hopper. An item is a tile of tokens times UNITS = 8 or 16 units of 32 rows.
// A warp has one unit, whose codes it decodes in registers as the A of wgmma, and all of the tile's tokens, which are B in
// shared memory. Sums stay in registers over all of K. Four warps copy, which leave registers to the groups of four that
// compute: two of them, which have room for the sums of many tokens, or four, which decode faster.
//
// Where products are fp8's, it computes what these have not all inputs of.
//
//   STAGES      steps of 64 of K that are in shared memory
#include "overlap.cuh"
#if FOLDED
#include "pick.cuh"
#endif
#include "product.cuh"
#include "ring.cuh"
#include "wgmma.cuh"

constexpr int ROW = 128;                        // bytes of a token's inputs in a step
constexpr int PLANE = MOST_N * ROW;
constexpr int WEIGHTS = PLANES * PLANE;         // where they begin in a stage
constexpr int STAGE = (WEIGHTS + UNITS * SLICE + 1023) / 1024 * 1024;
constexpr int THREADS = 128 + 32 * UNITS;
constexpr int COPYING = UNITS == 8 ? 40 : 32, COMPUTING = UNITS == 8 ? 232 : 112;  // registers of a thread
static_assert(128 * COPYING + 32 * UNITS * COMPUTING <= 65536 / THREADS / 8 * 8 * THREADS, "what a block is launched with");

// ---- copying and computing warps ---------------------------------------------------------------------------------------

constexpr int LAG = STAGES > 6 ? 5 : STAGES - 2;  // steps whose copies are on their way while those of the next are begun
constexpr int QUARTER = UNITS / 4;                // units of a copying warp

// A slice of each of a warp's units. Bulk copies of so few bytes were measured to be slow where many are under way.
DI void copy_slices(u32 to, const u8* from, u32 stride, int units, int lane) {
#pragma unroll
  for (int u = 0; u < QUARTER; u++) {
    if (u < units) {
#pragma unroll
      for (int i = 0; i + 512 <= SLICE; i += 512) copy16(to + u * SLICE + i + lane * 16, from + u * stride + i + lane * 16);
    }
  }
  const int rest = SLICE / 512 * 512, u = lane >> 2;
  static_assert(SLICE - rest == 64, "four lanes a unit");
  copy16_if(to + u * SLICE + rest + (lane & 3) * 16, from + u * stride + rest + (lane & 3) * 16, u < QUARTER && u < units);
}

DI void copy_items(const Args& p, const Projection& q, int items, u32 stages, u32 full, u32 empty) {
  const int thread = threadIdx.x, chunk = thread & 7, row = thread >> 3;
  Turn turn = {0, 0}, ready = {0, 0};
  int begun = 0;
  for (int i = blockIdx.x; i < items; i += gridDim.x) {
    const Item item(q.tiles, q.items_of_tile, i);
    const int first = (thread >> 5) * QUARTER, units = min(QUARTER, q.units - item.unit - first);
    u32 from[MOST_N / 16];
#pragma unroll
    for (int r = 0; r < MOST_N / 16; r++) from[r] = 16 * r < item.tile.n ? q.row(item.tile, row + 16 * r) : 0;
    const u8* weights = q.unit(item.tile, item.unit + first);
    const u8* inputs = (const u8*)q.x + chunk * 16;
    const u32 to = row * ROW + ((chunk ^ (row & 7)) << 4);
    for (int step = 0; step < q.steps; step++) {
      const u32 stage = stages + turn.stage * STAGE, barrier = full + 8 * turn.stage;
      barrier_wait(empty + 8 * turn.stage, turn.phase ^ 1);
      copy_slices(stage + WEIGHTS + first * SLICE, weights, q.steps * SLICE, units, thread & 31);
#pragma unroll
      for (int r = 0; r < MOST_N / 16; r++) {
        if (16 * r < item.tile.n) {
#pragma unroll
          for (int plane = 0; plane < PLANES; plane++)
            copy16(stage + plane * PLANE + to + r * 16 * ROW, inputs + from[r] * (u64)16 + plane * q.plane);
        }
      }
      commit_copies();
      inputs += ROW, weights += SLICE;
      turn.advance();
      if (++begun > LAG) {
        wait_copies<LAG>();
        make_visible();
        barrier_arrive(full + 8 * ready.stage);
        ready.advance();
      }
    }
  }
  wait_copies<0>();
  make_visible();
  for (int left = min(begun, LAG); left > 0; left--) {
    barrier_arrive(full + 8 * ready.stage);
    ready.advance();
  }
}

template <int N, int J> DI void multiply_block(float (&c)[2][N / 8][4], const u32 (&a)[2][2][4], u64 tokens) {
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) {
#pragma unroll
      for (int cell = 0; cell < 2; cell++)
        Wgmma<N>::multiply(c[cell], a[cell][m], tokens + plane * (PLANE >> 4) + 4 * J + 2 * m);
    }
  }
}

// While the products of one block of 32 of K are under way, those of the next are decoded.
template <int N>
DI void compute(const Args& p, const Projection& q, const Item& item, Turn& turn, u32 stages, u32 full, u32 empty, int warp,
                int lane) {
  float c[2][N / 8][4] = {};
  u32 a[2][2][2][4];
  const u32 own = WEIGHTS + warp * SLICE;
  barrier_wait(full + 8 * turn.stage, turn.phase);
  Slice s = load_slice(stages + turn.stage * STAGE + own, lane);
  decode_block<0>(s, a[0]);
  for (int step = 0; step < q.steps; step++) {
    const u64 tokens = swizzled_rows(stages + turn.stage * STAGE);
    wgmma_begin();
    multiply_block<N, 0>(c, a[0], tokens);
    wgmma_commit();
    decode_block<1>(s, a[1]);
    wgmma_wait<0>();
    wgmma_begin();
    multiply_block<N, 1>(c, a[1], tokens);
    wgmma_commit();
    const u32 read = turn.stage;
    turn.advance();
    if (step + 1 < q.steps) {
      barrier_wait(full + 8 * turn.stage, turn.phase);
      s = load_slice(stages + turn.stage * STAGE + own, lane);
      decode_block<0>(s, a[0]);
    }
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(empty + 8 * read);
  }
#pragma unroll
  for (int cell = 0; cell < 2; cell++) {
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) asm volatile("" : "+f"(c[cell][j][i]) :: "memory");
    }
  }
  store_results<N>(p, q, item, item.unit + warp, c, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) wide(const __grid_constant__ Args p) {
  extern __shared__ u8 shared[];
  __shared__ u64 barriers[2 * STAGES];
  const u32 stages = stages_at(shared), full = shared_address(barriers), empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + 8 * i, 128);
      barrier_init(empty + 8 * i, UNITS);
    }
    make_barriers_visible();
  }
  __syncthreads();
  wait_for_previous();
  let_next_start();
#if FOLDED
  const int outside = p.totals[2 + p.second];
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    atomicAdd(p.counted, (u64)(p.T * p.k));
    atomicAdd(p.counted + 1, (u64)outside);
  }
  if (outside == 0) return;
  const Projection q(p, pick<THREADS>(p, (int*)shared));
#else
  const Projection q(p);
#endif
  const int items = q.items();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COPYING));
    copy_items(p, q, items, stages, full, empty);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COMPUTING));
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) - 4;
    Turn turn = {0, 0};
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
      const Item item(q.tiles, q.items_of_tile, i);
      switch (item.tile.n) {
#define CASE(N) case N: if constexpr (LEAST_N <= N && N <= MOST_N) compute<N>(p, q, item, turn, stages, full, empty, warp, lane); break;
        FOR_EACH_N(CASE)
      }
    }
  }
}
