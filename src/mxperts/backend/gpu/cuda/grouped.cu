// A projection of many tokens, on the tensor cores. An item is a tile of tokens times 256 rows of an expert's weights; a warp
// has one unit of 32 of those rows, whose codes it decodes in registers as the A of its products, and all of the tile's
// tokens, which are B in shared memory. Sums stay in registers over all of K.
//
// With WGMMA four warps copy, which leave registers to the two groups of four that compute. Otherwise eight warps do both.
//
//   STAGES      steps of 64 of K that are in shared memory
#include "grouped.cuh"
#if WGMMA
#include "wgmma.cuh"
#endif

constexpr int UNITS = 8;                        // of an item
constexpr int ROW = 128;                        // bytes of a token's inputs in a step
constexpr int PLANE = MOST_N * ROW;
constexpr int WEIGHTS = PLANES * PLANE;         // where they begin in a stage
constexpr int STAGE = (WEIGHTS + UNITS * SLICE + 1023) / 1024 * 1024;
constexpr int THREADS = WGMMA ? 384 : 256;

// 1024-byte aligned, as the swizzle wants it.
DI u32 stages_at(const u8* shared) { return (shared_address(shared) + 1023) & ~1023u; }

struct Projection {
  const u8* w;
  int units, steps, items_of_tile;
  const u16* x;       // inputs [PLANES, rows, steps * 64]
  i64 plane;          // bytes
  const int* source;  // rows of positions; or 0 if those are the same

  DI explicit Projection(const Args& p) {
    const bool second = p.second;
    units = units_of(p, second), steps = steps_of(p, second), items_of_tile = (units + UNITS - 1) / UNITS;
    w = second ? p.w2 : p.w1;
    x = second ? p.a : p.xq;
    plane = (second || p.per_expert1 ? p.T * p.k : p.T) * steps * 128;
    source = second || p.per_expert1 ? nullptr : p.source;
  }
  // Where a token's inputs are, in 16 bytes; beyond the tile's, what is there does not matter.
  DI u32 row(const Tile& tile, int n) const {
    int at = tile.first + min(n, tile.count - 1);
    return (u32)(source ? source[at] : at) * (u32)(steps * 8);
  }
  DI const u8* unit(const Tile& tile, int unit) const { return w + ((i64)tile.expert * units + unit) * steps * SLICE; }
};

// Items in an order that lets those at work at one time share weights: the tiles of a group, then the next 256 rows.
struct Item {
  Tile tile;
  int unit;

  DI Item(const Args& p, const Projection& q, int i) {
    const Tile& any = p.tiles[i / q.items_of_tile];
    const int first = any.group, tiles = any.of_group, within = i - first * q.items_of_tile;
    unit = within / tiles * UNITS;
    tile = p.tiles[first + within % tiles];
  }
};

// ---- results -------------------------------------------------------------------------------------------------------

DI float bias_of(const Args& p, const Projection& q, int expert, int row) {
  const void* bias = p.second ? p.bias2 : p.bias1;
  if (!bias) return 0.f;
  i64 rows = p.second ? p.H : GATED ? 2 * p.I : p.I, at = row;
  if (GATED && !p.second) {
    const i64 i = row / 16 * 8 + row % 8, up = row >> 3 & 1;
    if (i >= p.I) return 0.f;
    at = INTERLEAVED ? 2 * i + up : up * p.I + i;
  }
  return at < rows ? load_number(bias, expert * rows + at, (int)(p.second ? p.bias2_dtype : p.bias1_dtype)) : 0.f;
}

DI u32 round2_to_hidden(float low, float high) {
  return HIDDEN == 0 ? to_bf16x2(low, high) : (u32)to_half(low) | (u32)to_half(high) << 16;
}

// A lane has rows g, g + 8, g + 16 and g + 24 of its unit, of each the tokens 8 j + 2 t + {0, 1}.
template <int N>
DI void store_results(const Args& p, const Projection& q, const Item& item, int unit, float (&c)[2][N / 8][4], int lane) {
  if (unit >= q.units) return;
  const int g = lane >> 2, t = lane & 3, height = q.units * 32, count = item.tile.count;
  float bias[4];
#pragma unroll
  for (int i = 0; i < 4; i++) bias[i] = bias_of(p, q, item.tile.expert, unit * 32 + 8 * i + g);
  if (HIDDEN == 2 || p.second) {
    float* to = (p.second ? p.y : (float*)p.h) + (i64)(item.tile.first + 2 * t) * height + unit * 32 + g;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
      for (int b = 0; b < 2; b++) {
        if (8 * j + 2 * t + b < count) {
#pragma unroll
          for (int i = 0; i < 4; i++) to[(i64)(8 * j + b) * height + 8 * i] = c[i >> 1][j][2 * (i & 1) + b] + bias[i];
        }
      }
    }
    return;
  }
  // Eight lanes exchange what they have of eight rows until each has all of one token's, of eight rows.
  const bool odd = g & 1, second = g & 2, third = g & 4;
  u16* to = (u16*)p.h + (i64)(item.tile.first + 2 * t + odd) * height + unit * 32 + (g >> 1) * 8;
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    u32 v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float(&s)[4] = c[i >> 1][j];
      u32 own = round2_to_hidden(s[2 * (i & 1)] + bias[i], s[2 * (i & 1) + 1] + bias[i]);
      u32 other = __shfl_xor_sync(0xffffffffu, own, 4);
      v[i] = __byte_perm(own, other, odd ? 0x3276 : 0x5410);
    }
    u32 r0 = __shfl_xor_sync(0xffffffffu, second ? v[0] : v[1], 8), r1 = __shfl_xor_sync(0xffffffffu, second ? v[2] : v[3], 8);
    u32 a0 = second ? r0 : v[0], a1 = second ? v[1] : r0, b0 = second ? r1 : v[2], b1 = second ? v[3] : r1;
    r0 = __shfl_xor_sync(0xffffffffu, third ? a0 : b0, 16), r1 = __shfl_xor_sync(0xffffffffu, third ? a1 : b1, 16);
    Quad all = third ? Quad{r0, r1, b0, b1} : Quad{a0, a1, r0, r1};
    if (8 * j + 2 * t + odd < count) *(Quad*)(to + (i64)(8 * j) * height) = all;
  }
}

#define FOR_EACH_N(X) X(16) X(32) X(48) X(64) X(80) X(96) X(112) X(128)

#if WGMMA
// ---- with copying and computing warps ------------------------------------------------------------------------------

DI void barrier_init(u32 b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(arrivals) : "memory");
}
DI void barrier_arrive(u32 b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(b) : "memory"); }
DI void barrier_expect(u32 b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(b), "r"(bytes) : "memory");
}
DI void barrier_wait(u32 b, u32 phase) {
  asm volatile("{.reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra DONE; bra AGAIN; DONE: }"
               :: "r"(b), "r"(phase) : "memory");
}
DI void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
DI void make_visible() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }  // what was written, to wgmma
DI void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DI void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> DI void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory"); }

// Stages of the ring, in turn.
struct Turn {
  u32 stage, phase;
  DI void advance() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

constexpr int LAG = STAGES > 4 ? 3 : STAGES - 2;  // steps whose copies are on their way while those of the next are begun

DI void copy_items(const Args& p, const Projection& q, int items, u32 stages, u32 full, u32 empty) {
  const int thread = threadIdx.x, chunk = thread & 7, row = thread >> 3;
  Turn turn = {0, 0}, ready = {0, 0};
  int begun = 0;
  for (int i = blockIdx.x; i < items; i += gridDim.x) {
    const Item item(p, q, i);
    const int units = min(UNITS, q.units - item.unit);
    u32 from[MOST_N / 16];
#pragma unroll
    for (int r = 0; r < MOST_N / 16; r++) from[r] = 16 * r < item.tile.n ? q.row(item.tile, row + 16 * r) : 0;
    const u8* weights = q.unit(item.tile, item.unit + (thread < units ? thread : 0));
    const u8* inputs = (const u8*)q.x + chunk * 16;
    const u32 to = row * ROW + ((chunk ^ (row & 7)) << 4);
    for (int step = 0; step < q.steps; step++) {
      const u32 stage = stages + turn.stage * STAGE, barrier = full + 8 * turn.stage;
      barrier_wait(empty + 8 * turn.stage, turn.phase ^ 1);
      if (thread < 32) {
        if (thread == 0) barrier_expect(barrier, units * SLICE);
        __syncwarp();
        if (thread < units) copy_bulk(stage + WEIGHTS + thread * SLICE, weights, SLICE, barrier);
      }
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

struct Slices {
  Codes cell[2];
  Pair scales;
};

DI Slices load_slice(u32 slice, int lane) {
  Slices s;
  s.cell[0] = load_codes<0>(slice, lane);
  s.cell[1] = load_codes<1>(slice, lane);
  s.scales = load_scales(slice, lane >> 2);
  return s;
}
// Both cells' A for block J of the step.
template <int J> DI void decode_block(const Slices& s, u32 (&a)[2][2][4]) {
#pragma unroll
  for (int cell = 0; cell < 2; cell++) {
    const u32 scales = cell ? s.scales.y : s.scales.x;
    const u32 even = scale_factor<2 * J>(scales), odd = scale_factor<2 * J + 1>(scales);
    fragment<J, 0>(s.cell[cell], even, odd, a[cell][0]);
    fragment<J, 1>(s.cell[cell], even, odd, a[cell][1]);
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
  Slices s = load_slice(stages + turn.stage * STAGE + own, lane);
  decode_block<0>(s, a[0]);
  for (int step = 0; step < q.steps; step++) {
    // 128-byte rows, swizzled, 1024 bytes for each eight of them.
    const u64 tokens = (u64)1 << 62 | (u64)64 << 32 | (u64)1 << 16 | (u64)(((stages + turn.stage * STAGE) & 0x3ffff) >> 4);
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

extern "C" __global__ void __launch_bounds__(THREADS, 1) grouped(const __grid_constant__ Args p) {
  extern __shared__ u8 shared[];
  __shared__ u64 barriers[2 * STAGES];
  const u32 stages = stages_at(shared), full = shared_address(barriers), empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + 8 * i, 129);
      barrier_init(empty + 8 * i, UNITS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    make_visible();
  }
  __syncthreads();
  const Projection q(p);
  const int items = p.totals[0] * q.items_of_tile;
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    copy_items(p, q, items, stages, full, empty);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) - 4;
    Turn turn = {0, 0};
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
      const Item item(p, q, i);
      switch (item.tile.n) {
#define CASE(N) case N: if constexpr (N <= MOST_N) compute<N>(p, q, item, turn, stages, full, empty, warp, lane); break;
        FOR_EACH_N(CASE)
      }
    }
  }
}

#else
// ---- with mma.sync -------------------------------------------------------------------------------------------------

constexpr int COPIES = SLICE / 16;

// A step of an item, by all threads.
DI void copy_step(const Projection& q, const Item& item, const u32* rows, int step, u32 stage) {
  const int units = min(UNITS, q.units - item.unit);
  for (int i = threadIdx.x; i < units * COPIES; i += THREADS) {
    int unit = i / COPIES, at = i - unit * COPIES;
    copy16(stage + WEIGHTS + unit * SLICE + at * 16, q.unit(item.tile, item.unit + unit) + (i64)step * SLICE + at * 16);
  }
  for (int i = threadIdx.x; i < item.tile.n * 8; i += THREADS) {
    const int row = i >> 3, chunk = i & 7;
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) {
      copy16(stage + plane * PLANE + row * ROW + ((chunk ^ ((row & 1) << 2)) << 4),
             (const u8*)q.x + (rows[row] + step * 8 + chunk) * (u64)16 + plane * q.plane);
    }
  }
}

template <int N, int J>
DI void multiply_block(float (&c)[2][N / 8][4], const Codes (&cell)[2], const Pair& scales, u32 tokens) {
  u32 a[2][2][4];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 of_cell = i ? scales.y : scales.x, even = scale_factor<2 * J>(of_cell), odd = scale_factor<2 * J + 1>(of_cell);
    fragment<J, 0>(cell[i], even, odd, a[i][0]);
    fragment<J, 1>(cell[i], even, odd, a[i][1]);
  }
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) {
      const Quad b = load_shared4<0>(tokens + plane * PLANE + j * 8 * ROW);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        mma(c[i][j], a[i][0], b.x, b.y);
        mma(c[i][j], a[i][1], b.z, b.w);
      }
    }
  }
}

template <int N>
DI void compute(const Args& p, const Projection& q, const Item& item, const u32* rows, u32 stages, int warp, int lane) {
  float c[2][N / 8][4] = {};
  const int n = lane >> 2, t = lane & 3;
  const u32 first = n * ROW + ((t ^ ((n & 1) << 2)) << 4), second = n * ROW + (((t + 4) ^ ((n & 1) << 2)) << 4);
  for (int step = 0; step < STAGES - 1; step++) {
    if (step < q.steps) copy_step(q, item, rows, step, stages + step * STAGE);
    commit_copies();
  }
  int at = 0;
  for (int step = 0; step < q.steps; step++) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    const int next = step + STAGES - 1;
    if (next < q.steps) copy_step(q, item, rows, next, stages + (at == 0 ? STAGES - 1 : at - 1) * STAGE);
    commit_copies();
    const u32 stage = stages + at * STAGE, slice = stage + WEIGHTS + warp * SLICE;
    const Codes cell[2] = {load_codes<0>(slice, lane), load_codes<1>(slice, lane)};
    const Pair scales = load_scales(slice, n);
    multiply_block<N, 0>(c, cell, scales, stage + first);
    multiply_block<N, 1>(c, cell, scales, stage + second);
    if (++at == STAGES) at = 0;
  }
  store_results<N>(p, q, item, item.unit + warp, c, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) grouped(const __grid_constant__ Args p) {
  extern __shared__ u8 shared[];
  __shared__ u32 rows[MOST_N];
  const Projection q(p);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int items = p.totals[0] * q.items_of_tile;
  for (int i = blockIdx.x; i < items; i += gridDim.x) {
    const Item item(p, q, i);
    __syncthreads();  // all have read what the item before had in shared memory
    for (int n = threadIdx.x; n < item.tile.n; n += THREADS) rows[n] = q.row(item.tile, n);
    __syncthreads();
    switch (item.tile.n) {
#define CASE(N) case N: if constexpr (N <= MOST_N) compute<N>(p, q, item, rows, stages_at(shared), warp, lane); break;
      FOR_EACH_N(CASE)
    }
  }
}
#endif
