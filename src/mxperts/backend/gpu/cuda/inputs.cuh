// What the kernels that write a projection's inputs share: eight values a thread, blocks of 32 in four neighbouring lanes.
#pragma once
#include "grouped.cuh"
#include "overlap.cuh"

constexpr int THREADS = 128;

// Eight numbers in the dtype of hidden states.
DI void load8(const void* p, i64 i, float (&v)[8]) {
  if constexpr (HIDDEN == 2) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Quad q = *(const Quad*)((const float*)p + i + 4 * half);
      v[4 * half] = __uint_as_float(q.x), v[4 * half + 1] = __uint_as_float(q.y);
      v[4 * half + 2] = __uint_as_float(q.z), v[4 * half + 3] = __uint_as_float(q.w);
    }
  } else {
    Quad q = *(const Quad*)((const u16*)p + i);
    const u32 w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      v[2 * j] = HIDDEN == 0 ? of_bf16(w[j] & 0xffffu) : of_half((u16)w[j]);
      v[2 * j + 1] = HIDDEN == 0 ? __uint_as_float(w[j] & 0xffff0000u) : of_half((u16)(w[j] >> 16));
    }
  }
}

#if QDQ == 1
// As quantize_in_block of single.cu, for a block in four neighbouring lanes.
DI void quantize_block(float (&v)[8]) {
  u32 amax = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) amax = max(amax, __float_as_uint(v[i]) & 0x7fffffffu);
  amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 1));
  amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 2));
  const SharedScale scale(amax);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = amax >= 0x7f800000u ? __uint_as_float(0x7fffffffu) : scale.quantize(v[i]);
}
#else
DI void quantize_block(float (&)[8]) {}
#endif

// Lane t of four has the values 8 t .. 8 t + 7 of a block of 32, in words 2 m + h the values 8 t + 4 m + 2 h + {0, 1}. wgmma's products
// take them from the places 16 m + 8 h + 2 t + {0, 1}.
DI Quad in_order(u32 (&w)[4], int lane) { return WGMMA ? exchange(w, lane) : Quad{w[0], w[1], w[2], w[3]}; }

// As store_planes of single.cu.
DI void store8(u16* to, i64 plane, float (&v)[8], int lane, bool wanted) {
#pragma unroll
  for (int p = 0; p < PLANES; p++) {
    u32 w[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      w[j] = to_bf16x2(v[2 * j], v[2 * j + 1]);
      if (p + 1 < PLANES) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float& x = v[2 * j + i];
          float rest = x - __uint_as_float(i ? w[j] & 0xffff0000u : w[j] << 16);
          x = p == 0 && !(fabsf(x) < __uint_as_float(0x7f800000u)) ? 0.f : rest;
        }
      }
    }
    Quad q = in_order(w, lane);
    if (wanted) *(Quad*)(to + p * plane) = q;
  }
}

// Values i .. i + 7 of a token's hidden states; 0 beyond their end.
DI void read_hidden(const Args& p, int token, int i, float (&v)[8]) {
  const int k = (int)p.H;
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = 0.f;
  if (i >= k) return;
  const i64 at = token * p.x_stride + i;
  if (p.aligned && i + 8 <= k) load8(p.x, at, v);
  else {
    for (int j = 0; j < 8; j++)
      if (i + j < k) v[j] = load_number(p.x, at + j, HIDDEN);
  }
  if (p.on_input) {
    float weight = load_number(p.routing, token, (int)p.routing_dtype);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = i + j < k ? round_to_hidden(v[j] * weight) : 0.f;
  }
}

// The largest of all threads' values.
DI u32 most_of_block(u32 most) {
  __shared__ u32 warp_most[THREADS / 32];
  most = __reduce_max_sync(0xffffffffu, most);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) warp_most[threadIdx.x >> 5] = most;
  __syncthreads();
  for (int w = 0; w < THREADS / 32; w++) most = max(most, warp_most[w]);
  return most;
}
// The scale of a row of fp8 numbers, of the bits of its largest magnitude.
DI float scale_of_row(u32 most) {
  float scale = __fdiv_rn(__uint_as_float(most), 448.f);
  return scale == 0.f ? 1.f : scale;
}
