// The inputs of a projection, quantised, as bf16 numbers: one row a block, eight values a thread. The first projection's are
// the hidden states (rows are tokens, or with a scale for each expert positions); the second's, what the activation function
// makes of the first one's results (rows are positions).
//
//   SECOND    which
#include "inputs.cuh"

// The values i .. i + 7 of a row; 0 beyond its end.
DI void read8(const Args& p, i64 row, int token, int i, float (&v)[8]) {
#if SECOND
  const int k = (int)p.I;
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = 0.f;
  if (i >= k) return;
  const i64 at = row * units_of(p, false) * 32 + (GATED ? 2 * i : i);
  float up[8] = {};
  load8(p.h, at, v);
  if (GATED) load8(p.h, at + 8, up);
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = i + j < k ? round_to_hidden(activate(v[j], up[j], p.constants)) : 0.f;
#else
  read_hidden(p, token, i, v);
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
    u32 most = 0;
    for (int i = threadIdx.x * 8; i < k; i += THREADS * 8) {
      float v[8];
      read8(p, row, token, i, v);
#pragma unroll
      for (int j = 0; j < 8; j++) most = max(most, __float_as_uint(v[j]) & 0x7fffffffu);
    }
    most = most_of_block(most);
    bad = most >= 0x7f800000u;
    scale = scale_of_row(most);
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
