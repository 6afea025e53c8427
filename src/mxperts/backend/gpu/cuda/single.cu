// A layer for a few pairs (token, slot), each by itself: many small blocks, which read weights straight into registers.
//
// Two launches. In `first` a block computes 16 or 32 intermediate values of one pair, its warps sharing K; in `second` 16
// values of one token, its warps sharing K and the slots. `second` is launched while `first` still runs, where a GPU can do
// that, and waits for it behind its first loads. `inputs` before them and `middle` between them quantise where these cannot.
#include "common.cuh"

struct Args : Call {
  u16* xq;    // [PLANES, rows, K1 * 64] inputs; unused where the hidden states do as they are
  u16* a;     // [PLANES, pairs, K2 * 64] what the second projection reads
  float* af;  // [pairs, K2 * 64] the same before it is quantised with a row's scale; unused otherwise
};

DI void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
DI void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DI Quad load_weights4(const u8* p) {
  Quad v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DI Pair load_weights2(const u8* p) {
  Pair v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// What a lane reads of a slice, CELLS of its two cells, and of the row of inputs that goes with it.
template <int CELLS> struct Load {
  Codes codes[CELLS];
  Pair scales;
  Quad x[PLANES][2];
};

template <int CELLS> DI void load_slice(Load<CELLS>& to, const u8* slice, int cell, int lane) {
#pragma unroll
  for (int i = 0; i < CELLS; i++) {
    const u8* at = slice + (cell + i) * CELL_CODES;
    to.codes[i].main[0] = load_weights4(at + lane * 16);
    if constexpr (BITS == 8) to.codes[i].main[1] = load_weights4(at + 512 + lane * 16);
    if constexpr (BITS == 6) to.codes[i].rest[0] = load_weights2(at + 512 + lane * 8);
  }
  to.scales = load_weights2(slice + 2 * CELL_CODES + (lane >> 2) * 8);
}
// Only the mma's first column is used, whose values the first four lanes hold.
template <int CELLS> DI void load_row(Load<CELLS>& to, const u16* row, i64 plane, int step, int lane, bool there) {
#pragma unroll
  for (int i = 0; i < PLANES; i++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      to.x[i][j] = {0, 0, 0, 0};
      load_global4_if(to.x[i][j], row + i * plane + step * 64 + 32 * j + lane * 8, there && lane < 4);
    }
  }
}

template <int CELLS> DI void multiply(float (&c)[CELLS][4], const Load<CELLS>& v, int cell) {
#pragma unroll
  for (int i = 0; i < CELLS; i++) multiply_cell(c[i], v.codes[i], cell + i ? v.scales.y : v.scales.x, v.x);
}

constexpr int VALUES = GATED ? 16 : 32;                // intermediate values of a unit
constexpr int UNITS = QDQ == 1 && GATED ? 2 : 1;       // of a block: as many as hold a block of 32 that is quantised
constexpr int SHARE1 = WARPS1 / UNITS;                 // warps of a unit

extern "C" __global__ void __launch_bounds__(WARPS1 * 32) first(const __grid_constant__ Args p) {
  __shared__ float sums[WARPS1][32];
  let_next_start();
  const i64 pair = blockIdx.y, e = expert_of(p, pair), pairs = p.T * p.k;
  if (e < 0) return;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int units = units_of(p, false), steps = steps_of(p, false);
  const int unit = blockIdx.x * UNITS + warp % UNITS, part = warp / UNITS;
  const u8* weights = p.w1 + (e * units + min(unit, units - 1)) * steps * SLICE;
  const i64 row = QDQ == 2 && p.per_expert1 ? pair : pair / p.k, rows = QDQ == 2 && p.per_expert1 ? pairs : p.T;
  const u16* x = p.direct ? (const u16*)p.x + row * p.x_stride : p.xq + row * steps * 64;
  Load<2> now[DEEP1], then[DEEP1];
  float c[2][4] = {};
  auto load = [&](Load<2> (&to)[DEEP1], int at) {
#pragma unroll
    for (int i = 0; i < DEEP1; i++) load_slice<2>(to[i], weights + (i64)min(at + i * SHARE1, steps - 1) * SLICE, 0, lane);
  };
  auto load_rows = [&](Load<2> (&to)[DEEP1], int at) {
#pragma unroll
    for (int i = 0; i < DEEP1; i++) load_row<2>(to[i], x, rows * steps * 64, at + i * SHARE1, lane, at + i * SHARE1 < steps);
  };
  auto use = [&](const Load<2> (&v)[DEEP1]) {
#pragma unroll
    for (int i = 0; i < DEEP1; i++) multiply<2>(c, v[i], 0);
  };
  load(now, part);
  if (!p.direct) wait_for_previous();
  load_rows(now, part);
  for (int at = part; at < steps; at += 2 * SHARE1 * DEEP1) {
    const int middle = at + SHARE1 * DEEP1, next = middle + SHARE1 * DEEP1;
    if (middle < steps) load(then, middle), load_rows(then, middle);
    use(now);
    if (middle >= steps) break;
    if (next < steps) load(now, next), load_rows(now, next);
    use(then);
  }
  if (lane % 4 == 0) {
    const int g = lane / 4;
#pragma unroll
    for (int cell = 0; cell < 2; cell++) sums[warp][cell * 16 + g] = c[cell][0], sums[warp][cell * 16 + 8 + g] = c[cell][2];
  }
  __syncthreads();
  if (threadIdx.x >= UNITS * VALUES) return;
  const int v = threadIdx.x, u = v / VALUES, in_unit = v % VALUES, i = blockIdx.x * UNITS * VALUES + v;
  const int at = GATED ? in_unit / 8 * 16 + in_unit % 8 : in_unit;
  float gate = 0.f, up = 0.f, a = 0.f;
#pragma unroll
  for (int w = 0; w < SHARE1; w++) {
    gate += sums[w * UNITS + u][at];
    if (GATED) up += sums[w * UNITS + u][at + 8];
  }
  if (i < p.I) {
    if (p.bias1) {
      const i64 b = GATED ? e * 2 * p.I + (INTERLEAVED ? 2 * i : i) : e * p.I + i;
      gate += load_number(p.bias1, b, (int)p.bias1_dtype);
      if (GATED) up += load_number(p.bias1, b + (INTERLEAVED ? 1 : p.I), (int)p.bias1_dtype);
    }
    a = round_to_hidden(activate(round_to_hidden(gate), round_to_hidden(up), p.constants));
  }
  if (QDQ == 1) a = round_to_hidden(quantize_in_block(a));
  if (QDQ == 2 && i < p.I) a = round_to_hidden(quantize_fp8(a, p.scale2[p.per_expert2 ? e : 0]));
  const int width = steps_of(p, true) * 64;
  for (int to = i; to < width; to += blockIdx.x + 1 == gridDim.x ? UNITS * VALUES : width) {  // and zeros behind the last
    if (QDQ == 3) p.af[pair * width + to] = a;
    else store_planes(p.a, pair * width + to, pairs * width, a);
    a = 0.f;
  }
}

extern "C" __global__ void __launch_bounds__(WARPS2 * 32) second(const __grid_constant__ Args p) {
  __shared__ float sums[WARPS2][16];
  __shared__ const u8* weights[SLOTS];
  __shared__ float factors[SLOTS];
  let_next_start();
  const i64 token = blockIdx.y, pairs = p.T * p.k;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, k = (int)p.k;
  const int units = units_of(p, true), steps = steps_of(p, true), unit = blockIdx.x / 2, cell = blockIdx.x % 2;
  for (int slot = threadIdx.x; slot < k; slot += WARPS2 * 32) {
    i64 e = expert_of(p, token * k + slot);
    weights[slot] = e < 0 ? (const u8*)0 : p.w2 + (e * units + unit) * steps * SLICE;
    factors[slot] = p.on_input ? 1.f : load_number(p.routing, token * k + slot, (int)p.routing_dtype);
  }
  __syncthreads();
  const int all = k * steps, width = steps * 64;
  Load<1> now[DEEP2], then[DEEP2];
  auto load = [&](Load<1> (&to)[DEEP2], int at) {
#pragma unroll
    for (int i = 0; i < DEEP2; i++) {
      const int f = min(at + i * WARPS2, all - 1), slot = f / steps;
      const u8* w = weights[slot];
      load_slice<1>(to[i], (w ? w : p.w2) + (i64)(f - slot * steps) * SLICE, cell, lane);
    }
  };
  auto load_rows = [&](Load<1> (&to)[DEEP2], int at) {
#pragma unroll
    for (int i = 0; i < DEEP2; i++) {
      const int f = min(at + i * WARPS2, all - 1), slot = f / steps;
      load_row<1>(to[i], p.a + (token * k + slot) * width, pairs * width, f - slot * steps, lane,
                  at + i * WARPS2 < all && weights[slot]);
    }
  };
  float total[2] = {};
  auto use = [&](const Load<1> (&v)[DEEP2], int at) {
#pragma unroll
    for (int i = 0; i < DEEP2; i++) {
      float c[1][4] = {};
      multiply<1>(c, v[i], cell);
      const int f = at + i * WARPS2;
      if (f < all && weights[f / steps]) {
        total[0] = fmaf(c[0][0], factors[f / steps], total[0]);
        total[1] = fmaf(c[0][2], factors[f / steps], total[1]);
      }
    }
  };
  load(now, warp);
  wait_for_previous();
  load_rows(now, warp);
  for (int at = warp; at < all; at += 2 * WARPS2 * DEEP2) {
    const int middle = at + WARPS2 * DEEP2, next = middle + WARPS2 * DEEP2;
    if (middle < all) load(then, middle), load_rows(then, middle);
    use(now, at);
    if (middle >= all) break;
    if (next < all) load(now, next), load_rows(now, next);
    use(then, middle);
  }
  if (lane % 4 == 0) sums[warp][lane / 4] = total[0], sums[warp][8 + lane / 4] = total[1];
  __syncthreads();
  const int h = unit * 32 + cell * 16 + threadIdx.x;
  if (threadIdx.x >= 16 || h >= p.H) return;
  float y = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS2; w++) y += sums[w][threadIdx.x];
  if (p.bias2) {
    for (int slot = 0; slot < k; slot++) {
      if (!weights[slot]) continue;
      i64 e = expert_of(p, token * k + slot);
      y = fmaf(load_number(p.bias2, e * p.H + h, (int)p.bias2_dtype), factors[slot], y);
    }
  }
  store_hidden(p.out, token * p.H + h, y);
}

// Inputs of the first projection, where they are not the hidden states as they are.
extern "C" __global__ void __launch_bounds__(256) inputs(const __grid_constant__ Args p) {
  let_next_start();
  const i64 rows = QDQ == 2 && p.per_expert1 ? p.T * p.k : p.T;
  auto read = [&](i64 row, int i) { return input_of(p, QDQ == 2 && p.per_expert1 ? row / p.k : row, i); };
  auto scale = [&](i64 row) { return p.scale1[p.per_expert1 ? max(0, expert_of(p, row)) : 0]; };
  quantize_rows(rows, (int)p.H, steps_of(p, false) * 64, p.xq, (float*)0, read, scale, blockIdx.x * 8 + (threadIdx.x >> 5),
                gridDim.x * 8, threadIdx.x & 31);
}

// Of the second projection, where a scale is a whole row's.
extern "C" __global__ void __launch_bounds__(256) middle(const __grid_constant__ Args p) {
  let_next_start();
  wait_for_previous();
  const int width = steps_of(p, true) * 64;
  auto read = [&](i64 row, int i) { return expert_of(p, row) < 0 ? 0.f : p.af[row * width + i]; };
  auto scale = [&](i64 row) { return 1.f; };
  quantize_rows(p.T * p.k, (int)p.I, width, p.a, (float*)0, read, scale, blockIdx.x * 8 + (threadIdx.x >> 5), gridDim.x * 8,
                threadIdx.x & 31);
}
