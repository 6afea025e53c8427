// The inputs of a projection, quantised, as bf16 numbers: one row a block, eight values a thread. The first projection's are
// the hidden states (rows are tokens, or with a scale for each expert positions); the second's, what the activation function
// makes of the first one's results (rows are positions).
//
//   SECOND    which
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

#if WGMMA
// Lane t of four has the values 8 t .. 8 t + 7 of a block of 32, in words 2 m + h the values 8 t + 4 m + 2 h + {0, 1}. Products
// take them from the places 16 m + 8 h + 2 t + {0, 1}: word q of all four lanes goes to lane q.
DI Quad in_order(u32 (&w)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  u32 r0 = __shfl_xor_sync(0xffffffffu, odd ? w[0] : w[1], 1), r1 = __shfl_xor_sync(0xffffffffu, odd ? w[2] : w[3], 1);
  u32 a0 = odd ? r0 : w[0], a1 = odd ? w[1] : r0, b0 = odd ? r1 : w[2], b1 = odd ? w[3] : r1;
  r0 = __shfl_xor_sync(0xffffffffu, high ? a0 : b0, 2), r1 = __shfl_xor_sync(0xffffffffu, high ? a1 : b1, 2);
  return high ? Quad{r0, r1, b0, b1} : Quad{a0, a1, r0, r1};
}
#else
DI Quad in_order(u32 (&w)[4], int) { return {w[0], w[1], w[2], w[3]}; }
#endif

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

// The values i .. i + 7 of a row; 0 beyond its end.
DI void read8(const Args& p, i64 row, int token, int i, float (&v)[8]) {
  const int k = (int)(SECOND ? p.I : p.H);
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = 0.f;
  if (i >= k) return;
#if SECOND
  const i64 at = row * units_of(p, false) * 32 + (GATED ? 2 * i : i);
  float up[8] = {};
  load8(p.h, at, v);
  if (GATED) load8(p.h, at + 8, up);
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = i + j < k ? round_to_hidden(activate(v[j], up[j], p.constants)) : 0.f;
#else
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
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) inputs(const __grid_constant__ Args p) {
  wait_for_previous();
  let_next_start();
  const i64 row = blockIdx.x;
  const bool positions = SECOND || p.per_expert1;
  if (positions && row >= p.totals[1]) return;
  const int token = positions ? p.source[row] : (int)row;
  const int lane = threadIdx.x & 31, width = steps_of(p, SECOND) * 64, k = (int)(SECOND ? p.I : p.H);
  const i64 plane = (SECOND || p.per_expert1 ? p.T * p.k : p.T) * width;
  u16* to = (SECOND ? p.a : p.xq) + row * width;

  float scale = 1.f;
  bool bad = false;
  if (QDQ == 2) {
    const float* scales = SECOND ? p.scale2 : p.scale1;
    scale = scales[(SECOND ? p.per_expert2 : p.per_expert1) ? p.expert[row] : 0];
  }
  if (QDQ == 3) {
    __shared__ u32 warp_most[THREADS / 32];
    u32 most = 0;
    for (int i = threadIdx.x * 8; i < k; i += THREADS * 8) {
      float v[8];
      read8(p, row, token, i, v);
#pragma unroll
      for (int j = 0; j < 8; j++) most = max(most, __float_as_uint(v[j]) & 0x7fffffffu);
    }
    most = __reduce_max_sync(0xffffffffu, most);
    if (lane == 0) warp_most[threadIdx.x >> 5] = most;
    __syncthreads();
    for (int w = 0; w < THREADS / 32; w++) most = max(most, warp_most[w]);
    bad = most >= 0x7f800000u;
    scale = __fdiv_rn(__uint_as_float(most), 448.f);
    if (scale == 0.f) scale = 1.f;
  }
  for (int first = (threadIdx.x & ~31) * 8; first < width; first += THREADS * 8) {
    const int i = first + lane * 8;
    float v[8];
    read8(p, row, token, i, v);
    quantize_block(v);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (QDQ >= 2 && i + j < k) v[j] = bad ? __uint_as_float(0x7fffffffu) : quantize_fp8(v[j], scale);
      if (QDQ) v[j] = round_to_hidden(v[j]);
    }
    store8(to + i, plane, v, lane, i < width);
  }
}
