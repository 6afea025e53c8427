// The inputs of a projection for products in fp8: quantised, each block's scale relative to the row's folded into the exponents
// of its E4M3 numbers. The first projection's are hidden states, a token a warp, written to all its positions; the second's, of a
// position a warp. A row of which E4M3 has not everything is written as `inputs` would write it, to be computed in bf16.
//
//   SECOND                  which
//   FOLD_LEAST, FOLD_MOST   powers of two that an element may be multiplied by in E4M3
//   SPREAD                  how many of them a row's largest scale may be above the mean: sums keep 13 bits of the largest
#include "inputs.cuh"

constexpr int LOWEST_BASE = 40, HIGHEST_BASE = 214;  // scales of rows, whose product with the weights' float32 has

DI void read8(const Args& p, i64 row, int i, float (&v)[8]) {
#if SECOND
  const int k = (int)p.I;
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = 0.f;
  if (i >= k) return;
  load8(p.a, row * steps_of(p, true) * 64 + i, v);
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = i + j < k ? v[j] : 0.f;
#else
  read_hidden(p, (int)row, i, v);
#endif
}

DI u32 block_amax(const float (&v)[8]) {
  u32 amax = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) amax = max(amax, __float_as_uint(v[i]) & 0x7fffffffu);
  amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 1));
  return max(amax, __shfl_xor_sync(0xffffffffu, amax, 2));
}

DI u32 to_e4m3x2(float low, float high) {
  u16 d;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
  return d;
}

// As `inputs` does.
DI void write_exact(const Args& p, i64 row, int at, float scale, bool bad, int lane) {
  const int width = steps_of(p, SECOND) * 64, k = (int)(SECOND ? p.I : p.H);
  u16* to = (SECOND ? p.a : p.xq) + (i64)at * width;
  for (int first = 0; first < width; first += 256) {
    const int i = first + lane * 8;
    float v[8];
    read8(p, row, i, v);
    quantize_block(v);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (QDQ >= 2 && i + j < k) v[j] = bad ? __uint_as_float(0x7fffffffu) : quantize_fp8(v[j], scale);
      v[j] = round_to_hidden(v[j]);
    }
    store8(to + i, 0, v, lane, i < width);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) fold(const __grid_constant__ Args p) {
  wait_for_previous();
  let_next_start();
  const i64 row = (i64)blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5);
  if (row >= (SECOND ? p.totals[1] : p.T) || SECOND && p.source[row] < 0) return;
  const int lane = threadIdx.x & 31, k = (int)(SECOND ? p.I : p.H), width = (k + 127) / 128 * 128;
  const int targets = SECOND ? 1 : (int)p.k;

  // What the whole row has to be known for: its largest scale and its smallest, or its largest magnitude.
  u32 most = 0, least = 0;
  int blocks = 0, sum = 0;  // of scales
  for (int first = 0; first < k; first += 256) {
    float v[8];
    read8(p, row, first + lane * 8, v);
    const u32 amax = block_amax(v);
#if QDQ == 1
    const u32 scale = amax >= 0x7f800000u ? 255 : SharedScale::of(amax);
    if (amax) {
      most = max(most, scale + 1), least = max(least, 256 - scale);
      if ((lane & 3) == 0) blocks++, sum += scale;
    }
#else
    most = max(most, amax);
#endif
  }
  most = __reduce_max_sync(0xffffffffu, most);
  float base, scale = 1.f;
  bool bad, outside;
  int exponent = 0;
#if QDQ == 1
  least = __reduce_max_sync(0xffffffffu, least);
  const int highest = most ? (int)most - 1 : 127 + FOLD_MOST, lowest = most ? 256 - (int)least : highest;
  exponent = highest - FOLD_MOST;
  bad = highest == 255;
  blocks = __reduce_add_sync(0xffffffffu, blocks), sum = __reduce_add_sync(0xffffffffu, sum);
  outside = bad || lowest - exponent < FOLD_LEAST || exponent < LOWEST_BASE || exponent > HIGHEST_BASE ||
            (highest - SPREAD) * blocks > sum;
  base = power_of_two(exponent - 127);
#else
  bad = QDQ == 3 && most >= 0x7f800000u;
  scale = QDQ == 3 ? scale_of_row(most) : (SECOND ? p.scale2 : p.scale1)[0];
  outside = bad || most > 0x7f800000u || scale < power_of_two(LOWEST_BASE - 127) || scale > power_of_two(HIGHEST_BASE - 127);
  base = scale;
#endif

  bool inside = false;  // of any target
  for (int slot = 0; slot < targets; slot++) {
    const int at = SECOND ? (int)row : p.position[row * p.k + slot];
    if (at < 0) continue;
    const bool exact = outside || p.unfit[p.expert[at]];
    if (lane == 0) {
      p.base[at] = base;
      p.outside[at] = exact;
      if (exact) atomicAdd(p.totals + 2 + SECOND, 1);
    }
    if (exact) write_exact(p, row, at, scale, bad, lane);
    else inside = true;
  }
  if (!inside) return;
  for (int first = 0; first < width; first += 256) {
    const int i = first + lane * 8;
    float v[8];
    read8(p, row, i, v);
#if QDQ == 1
    const u32 amax = block_amax(v);
    const SharedScale shared(amax);
    const float folded = power_of_two(amax ? SharedScale::of(amax) - exponent : 0);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = shared.quantize_element(v[j]) * folded;
#else
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = __fdiv_rn(v[j], scale);
#endif
    // Lane t of four has the values 8 t .. 8 t + 7 of a block. Products take byte 4 t + i of either half of it from
    // 8 t + {0, 2, 1, 3}[i], and in the second half from four further.
    const u32 low = to_e4m3x2(v[0], v[2]) | to_e4m3x2(v[1], v[3]) << 16;
    const u32 high = to_e4m3x2(v[4], v[6]) | to_e4m3x2(v[5], v[7]) << 16;
    if (i >= width) continue;
    for (int slot = 0; slot < targets; slot++) {
      const int at = SECOND ? (int)row : p.position[row * p.k + slot];
      if (at < 0) continue;
      // 16-byte pieces of a 128-byte row stand as wgmma wants them in shared memory.
      const int piece = i % 128 / 32 * 2, t = lane & 3;
      u32* to = (u32*)(p.folded + ((i64)(i / 128) * p.positions + at) * 128);
      to[((piece ^ (at & 7)) << 2) + t] = low;
      to[((piece + 1 ^ (at & 7)) << 2) + t] = high;
    }
  }
}
