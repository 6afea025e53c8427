// A projection of the tokens of each expert in fp8, on Hopper. Elements of at most six bits have binades to spare in E4M3, so a
// block's shared scale, relative to its row's, goes into the exponents of its numbers: of weights here, of inputs in fold.cu. Their
// products are then exact, and rows' scales are applied at the end. The sums that wgmma makes of E4M3 numbers lose bits as they
// grow, so they are added up in float32 every PROMOTE of K.
//
// An item is a tile of tokens times 4 * CLUSTER units of 32 rows. A warp has 16 rows, whose codes it decodes in registers as the A
// of wgmma, and all of the tile's tokens, which are B in shared memory. Four warps copy, eight compute. The blocks of a cluster
// have other rows of the same tokens, of which each copies a part for all of them.
//
//   STAGES      steps of 128 of K that are in shared memory
//   CLUSTER     blocks of a cluster
//   PROMOTE     64 or 128
//   WEIGHTS_E5M2  whether weights become E5M2 numbers, which are less to do but have two bits of mantissa, rather than E4M3
//   FLOAT16_OFFSET  for them: decoded patterns are the element's value times 2^-FLOAT16_OFFSET as float16
#include "cluster.cuh"
#include "overlap.cuh"
#include "product.cuh"
#include "ring.cuh"
#include "wgmma.cuh"

constexpr int ROW = 128;                   // bytes of a token's inputs in a stage
constexpr int OWN = 4;                     // units of a block
constexpr int WEIGHTS = MOST_N * ROW;      // where they begin in a stage
constexpr int STAGE = (WEIGHTS + OWN * 2 * SLICE + 1023) / 1024 * 1024;
constexpr int PITCH = 144;                 // bytes of a token's results on their way to the activation function
constexpr int THREADS = 384, COPYING = 40, COMPUTING = 232;  // registers of a thread
static_assert(HIDDEN == 0, "results are rounded to bf16");
static_assert(UNITS == OWN * CLUSTER, "an item is what a cluster computes");

// What those that compute are told of an item.
struct Told {
  int expert, first, count, n, unit, unused[3];
  u8 rows[OWN * 32];    // exponents of the weights' rows
  float base[MOST_N];   // of the tokens
};

// ---- clusters ----------------------------------------------------------------------------------------------------------

DI void arrive_in(u32 barrier, int rank) {
  asm volatile("{.reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [a];}"
               :: "r"(barrier), "r"(rank) : "memory");
}
DI void expect_bytes(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
DI void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
// To the same place in all blocks of the cluster.
DI void copy_bytes_to_all(u32 to, const void* from, u32 bytes, u32 barrier) {
  if (CLUSTER == 1) return copy_bytes(to, from, bytes, barrier);
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
               :: "r"(to), "l"(from), "r"(bytes), "r"(barrier), "h"((u16)((1 << CLUSTER) - 1)) : "memory");
}
// Arrives when all that this thread has begun to copy is there.
DI void arrive_when_copied(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(barrier) : "memory");
}

// ---- copying -----------------------------------------------------------------------------------------------------------

struct Barriers {
  u32 full, empty, told, heard;  // addresses of STAGES, STAGES, 2 and 2
};

DI void copy_items(const Args& p, int units, int steps, int per_tile, int items, u32 stages, Told* told, const Barriers& b) {
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, rank = rank_in_cluster();
  const u8* rows = p.second ? p.rows2 : p.rows1;
  Turn turn = {0, 0};
  for (int i = blockIdx.x / CLUSTER, number = 0; i < items; i += gridDim.x / CLUSTER, number++) {
    const Item item(p.tiles, per_tile, i);
    const int unit = item.unit + rank * OWN, n = item.tile.n;
    if (thread == 0) {
      const int place = number & 1;
      barrier_wait(b.heard + 8 * place, (number >> 1 & 1) ^ 1);
      Told& to = told[place];
      to.expert = item.tile.expert, to.first = item.tile.first, to.count = item.tile.count, to.n = n, to.unit = unit;
      expect_bytes(b.told + 8 * place, OWN * 32 + n * 4);
      copy_bytes(shared_address(to.rows), rows + ((i64)item.tile.expert * units + min(unit, units - 1)) * 32, OWN * 32,
                 b.told + 8 * place);
      copy_bytes(shared_address(to.base), p.base + item.tile.first, n * 4, b.told + 8 * place);
    }
    // A warp copies a unit's slices; beyond the last unit, again the last one's.
    const u8* weights = (p.second ? p.w2 : p.w1) + ((i64)item.tile.expert * units + min(unit + warp, units - 1)) * steps * SLICE;
    const int share = n / CLUSTER * ROW;
    const u8* tokens = p.folded + (i64)item.tile.first * ROW + rank * share;
    for (int step = 0; step < steps; step += 2) {
      const u32 stage = stages + turn.stage * STAGE, full = b.full + 8 * turn.stage;
      barrier_wait(b.empty + 8 * turn.stage, turn.phase ^ 1);
      if (thread == 0) {
        expect_bytes(full, n * ROW);
        copy_bytes_to_all(stage + rank * share, tokens, share, full);
      }
      const int bytes = step + 1 < steps ? 2 * SLICE : SLICE;
      const u32 to = stage + WEIGHTS + warp * 2 * SLICE;
#pragma unroll
      for (int at = 0; at < 2 * SLICE; at += 512) {
        const int mine = at + lane * 16;
        copy16_if(to + mine, weights + mine, mine < bytes);
      }
      arrive_when_copied(full);
      weights += 2 * SLICE, tokens += p.positions * ROW;
      turn.advance();
    }
  }
}

// ---- computing ---------------------------------------------------------------------------------------------------------

#if WEIGHTS_E5M2
// The upper byte of a float16 number is the E5M2 number that it is, if its mantissa has no more than two bits. Codes are float16
// numbers as they are bf16 numbers in `patterns`, three places further to the left.
DI u32 multiply2_half(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// Factors of a row in the slice's two blocks, none below 0: blocks of zeros may have any scale.
DI u32 factors(u32 scales, u32 offset) { return __viaddmax_s16x2_relu(scales, offset, 0) << 10; }
DI int factor_offset(int row) { return (FLOAT16_OFFSET + 15 - row & 0xffff) * 0x10001; }
// Two registers of a block, rows g, g + 8, ..., as one of the A of wgmma for fp8.
DI u32 to_bytes(u32 a, u32 b, u32) { return __byte_perm(a, b, 0x7351); }

template <int J, int M> DI void numbers(const Codes& c, u32 w, u32 even, u32 odd, u32 (&v)[4]) {
  constexpr u32 CODE = 0x0E000E00u, SIGN = 0x80008000u;
  v[0] = ((w << 3) & CODE) | (w & SIGN);
  v[1] = ((w << 6) & CODE) | ((w << 3) & SIGN);
  v[2] = ((w << 9) & CODE) | ((w << 2) & SIGN);
  v[3] = (w & CODE) | ((w << 1) & SIGN);
#if BITS == 6
  const u32 r = J ? c.rest[0].y : c.rest[0].x;
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] |= pick(r, REST_LEFT(4 * M + i) + 3, LOW << 3);
#endif
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = multiply2_half(v[i], i & 1 ? odd : even);
}
#else
// Bits 4 to 10 of a bf16 number below 2^-111 are those of the E4M3 number that is 2^120 times as large: their exponents count from
// the same number, and there is nothing before or behind. Signs are taken from the codes.
DI u32 factors(u32 scales, u32 offset) { return scales * 128u + offset; }
DI int factor_offset(int row) { return (OFFSET + 7 - row) * 128 * 0x10001; }
DI u32 to_bytes(u32 a, u32 b, u32 signs) { return (a >> 4) | (b << 4) | signs; }

template <int J, int M> DI void numbers(const Codes& c, u32 w, u32 even, u32 odd, u32 (&v)[4]) {
  constexpr u32 CODE = 0x01C001C0u;
  v[0] = w & CODE, v[1] = (w << 3) & CODE, v[2] = (w << 6) & CODE, v[3] = (w >> 3) & CODE;
#if BITS == 6
  const u32 r = J ? c.rest[0].y : c.rest[0].x;
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] |= pick(r, REST_LEFT(4 * M + i), LOW);
#endif
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = multiply2(v[i], i & 1 ? odd : even);
}
#endif

// The A of one wgmma from block J of a cell: rows g, g + 8, g, g + 8, and k = 8 t + {0, 2, 1, 3}, the last two four further.
template <int J> DI void decode_fp8(const Codes& c, u32 even, u32 odd, u32 (&a)[4]) {
  const u32 w0 = J ? c.main[0].z : c.main[0].x, w1 = J ? c.main[0].w : c.main[0].y;
  u32 v[4];
  numbers<J, 0>(c, w0, twice<J>(even), twice<J>(odd), v);
  a[0] = to_bytes(v[0], v[2], ((w0 >> 8) & 0x00800080u) | ((w0 << 2) & 0x80008000u));
  a[1] = to_bytes(v[1], v[3], ((w0 >> 5) & 0x00800080u) | ((w0 << 1) & 0x80008000u));
  numbers<J, 1>(c, w1, twice<J>(even), twice<J>(odd), v);
  a[2] = to_bytes(v[0], v[2], ((w1 >> 8) & 0x00800080u) | ((w1 << 2) & 0x80008000u));
  a[3] = to_bytes(v[1], v[3], ((w1 >> 5) & 0x00800080u) | ((w1 << 1) & 0x80008000u));
}

// A lane's share of a warp's cell.
struct Cell {
  u32 at;          // of its codes in a stage
  u32 scales;      // of its scales
  u32 even, odd;   // what makes factors of scales, of rows g and g + 8

  DI void decode(u32 stage, int lane, bool both, u32 (&a)[4][4]) const {
    decode_slice<0>(stage, lane, a);
    if (both) {
      decode_slice<1>(stage, lane, a);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) a[2 + i / 4][i % 4] = 0;
    }
  }
  template <int S> DI void decode_slice(u32 stage, int lane, u32 (&a)[4][4]) const {
    const Codes codes = load_codes<0>(stage + at + S * SLICE, lane);
    u32 s;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(s) : "r"(stage + scales + S * SLICE));
    const u32 e = factors(__byte_perm(s, 0, 0x4240), even), o = factors(__byte_perm(s, 0, 0x4341), odd);
    decode_fp8<0>(codes, e, o, a[2 * S]);
    decode_fp8<1>(codes, e, o, a[2 * S + 1]);
  }
};

// What the activation function makes of the results of four warps, 64 rows: gate and up of 32 values, or 64 without a gate. They go
// through shared memory, from where a loop reads them, as code for each of a lane's results would not stay in the instruction cache.
template <int N> DI void store_activated(const Args& p, const Told& told, const float (&c)[N / 8][4], u8* staged, int warp, int lane) {
  const u32 to = shared_address(staged) + (warp >> 2) * (MOST_N * PITCH);
  auto wait_for_four = [&] { asm volatile("bar.sync %0, 128;" :: "r"(1 + (warp >> 2)) : "memory"); };
  wait_for_four();  // all have read what was there before
  const int matrix = lane >> 3;  // rows g, then g + 8 of eight tokens, then of the next eight
  const u32 mine = to + ((matrix >> 1) * 8 + (lane & 7)) * PITCH + (warp & 3) * 32 + (matrix & 1) * 16;
#pragma unroll
  for (int j = 0; j < N / 8; j += 2) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(mine + j * 8 * PITCH), "r"(to_bf16x2(c[j][0], c[j][1])), "r"(to_bf16x2(c[j][2], c[j][3])),
                    "r"(to_bf16x2(c[j + 1][0], c[j + 1][1])), "r"(to_bf16x2(c[j + 1][2], c[j + 1][3])) : "memory");
  }
  wait_for_four();
  constexpr int PIECES = GATED ? 4 : 8;  // of eight values, of a token
  const i64 width = steps_of(p, true) * 64;
  const int first = (told.unit * 2 + (warp & 4)) * (GATED ? 8 : 16);
#pragma unroll 1
  for (int i = threadIdx.x & 127; i < told.count * PIECES; i += 128) {
    const int n = i / PIECES, piece = i % PIECES;
    if (first + piece * 8 >= width) continue;
    const u32 from = to + n * PITCH + piece * (GATED ? 32 : 16);
    const Quad gate = load_shared4<0>(from), up = GATED ? load_shared4<16>(from) : gate;
    const u32 g[4] = {gate.x, gate.y, gate.z, gate.w}, u[4] = {up.x, up.y, up.z, up.w};
    u32 v[4];
#pragma unroll
    for (int k = 0; k < 4; k++)
      v[k] = to_bf16x2(activate(of_bf16(g[k] & 0xffffu), of_bf16(u[k] & 0xffffu), p.constants),
                       activate(__uint_as_float(g[k] & 0xffff0000u), __uint_as_float(u[k] & 0xffff0000u), p.constants));
    *(Quad*)(p.a + (i64)(told.first + n) * width + first + piece * 8) = {v[0], v[1], v[2], v[3]};
  }
}

// Half of a tile's tokens, whose products are under way while sums of the other half are added up.
template <int N> struct Half {
  float part[N / 8][4];

  // Of the codes of PROMOTE of K, from the `first`-th of four times 32.
  DI void begin(const u32 (&a)[4][4], int first, u64 tokens) {
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < PROMOTE / 32; i++) Wgmma<N>::multiply_fp8(part, a[first + i], tokens + 2 * (first + i), i > 0);
    wgmma_commit();
  }
  // Once they are there.
  DI void add_to(float (*c)[4]) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      asm volatile("" : "+f"(part[i / 4][i % 4])::"memory");
      c[i / 4][i % 4] += part[i / 4][i % 4];
    }
  }
};

template <int N>
DI void compute(const Args& p, const Told& told, int units, int steps, Turn& turn, u32 stages, const Barriers& b, u8* staged, int warp,
                int lane) {
  const int g = lane >> 2, t = lane & 3, cell = warp & 1;
  const int row_even = told.rows[warp * 16 + g], row_odd = told.rows[warp * 16 + g + 8];
  const u32 slices = WEIGHTS + (warp >> 1) * 2 * SLICE;
  const Cell own = {slices + cell * CELL_CODES, slices + 2 * CELL_CODES + g * 8 + cell * 4, (u32)factor_offset(row_even),
                    (u32)factor_offset(row_odd)};
  const int row = told.unit * 32 + warp * 16 + g;
  const float bias_even = bias_of(p, told.expert, row), bias_odd = bias_of(p, told.expert, row + 8);

  constexpr u64 OTHER = N / 2 * ROW >> 4;  // the second half's tokens
  float c[N / 8][4] = {};
  Half<N / 2> one, two;
  u32 a[2][4][4];
  barrier_wait(b.full + 8 * turn.stage, turn.phase);
  own.decode(stages + turn.stage * STAGE, lane, steps > 1, a[0]);
  // While the products of one step are under way, those of the next are decoded.
  auto multiply = [&](const u32 (&now)[4][4], u32 (&next)[4][4], int step) {
    const u32 read = turn.stage;
    const u64 tokens = swizzled_rows(stages + read * STAGE);
    one.begin(now, 0, tokens);
    two.begin(now, 0, tokens + OTHER);
    turn.advance();
    if (step + 2 < steps) {
      barrier_wait(b.full + 8 * turn.stage, turn.phase);
      own.decode(stages + turn.stage * STAGE, lane, step + 3 < steps, next);
    }
    wgmma_wait<1>();
    one.add_to(c);
    wgmma_wait<0>();
    if constexpr (PROMOTE == 64) {
      two.add_to(c + N / 16);
      one.begin(now, 2, tokens);
      two.begin(now, 2, tokens + OTHER);
      wgmma_wait<1>();
      one.add_to(c);
      wgmma_wait<0>();
    }
    if (lane < CLUSTER) arrive_in(b.empty + 8 * read, lane);
    two.add_to(c + N / 16);
  };
  for (int step = 0; step < steps; step += 4) {
    multiply(a[0], a[1], step);
    if (step + 2 < steps) multiply(a[1], a[0], step + 2);
  }

  const float even = power_of_two(row_even - 127), odd = power_of_two(row_odd - 127);
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    const float low = told.base[8 * j + 2 * t], high = told.base[8 * j + 2 * t + 1];
    c[j][0] = fmaf(c[j][0] * even, low, bias_even), c[j][1] = fmaf(c[j][1] * even, high, bias_even);
    c[j][2] = fmaf(c[j][2] * odd, low, bias_odd), c[j][3] = fmaf(c[j][3] * odd, high, bias_odd);
  }
  if (!p.second) {
    store_activated<N>(p, told, c, staged, warp, lane);
    return;
  }
  if (told.unit + (warp >> 1) >= units) return;
  const int height = units * 32;
  float* to = p.y + (i64)(told.first + 2 * t) * height + row;
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (8 * j + 2 * t + i < told.count) {
        to[(i64)(8 * j + i) * height] = c[j][i];
        to[(i64)(8 * j + i) * height + 8] = c[j][2 + i];
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) folded(const __grid_constant__ Args p) {
  extern __shared__ u8 shared[];
  __shared__ u64 barriers[2 * STAGES + 4];
  __shared__ alignas(16) Told told[2];
  const u32 stages = stages_at(shared), first = shared_address(barriers);
  const Barriers b = {first, first + 8 * STAGES, first + 16 * STAGES, first + 16 * STAGES + 16};
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(b.full + 8 * i, 129);
      barrier_init(b.empty + 8 * i, 8 * CLUSTER);
    }
    for (int i = 0; i < 2; i++) {
      barrier_init(b.told + 8 * i, 1);
      barrier_init(b.heard + 8 * i, 8);
    }
    make_barriers_visible();
  }
  wait_for_cluster();
  wait_for_previous();
  asm volatile("fence.proxy.async;" ::: "memory");  // what kernels before wrote, to bulk copies
  let_next_start();
  const int units = units_of(p, p.second), steps = steps_of(p, p.second), per_tile = (units + UNITS - 1) / UNITS;
  const int items = p.totals[0] * per_tile;
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COPYING));
    copy_items(p, units, steps, per_tile, items, stages, told, b);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COMPUTING));
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) - 4;
    u8* staged = shared + (stages - shared_address(shared)) + STAGES * STAGE;
    Turn turn = {0, 0};
    for (int i = blockIdx.x / CLUSTER, number = 0; i < items; i += gridDim.x / CLUSTER, number++) {
      const int place = number & 1;
      barrier_wait(b.told + 8 * place, number >> 1 & 1);
      switch (told[place].n) {
#define CASE(N) \
  case N: if constexpr (LEAST_N <= N && N <= MOST_N) compute<N>(p, told[place], units, steps, turn, stages, b, staged, warp, lane); break;
        FOR_EACH_N(CASE)
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(b.heard + 8 * place);
    }
  }
  wait_for_cluster();
}
