// The sum over a token's slots, in their order, rounded once; a block a token. As sum_slots of grouped.py, bit for bit.
#include "grouped.cuh"
#include "overlap.cuh"

constexpr int THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS) combine(const __grid_constant__ Args p) {
  wait_for_previous();
  let_next_start();
  const i64 token = blockIdx.x;
  const int H = (int)p.H, k = (int)p.k, height = units_of(p, true) * 32;
  for (int h = threadIdx.x * 4; h < H; h += THREADS * 4) {
    float total[4] = {};
#pragma unroll 4
    for (int slot = 0; slot < k; slot++) {
      const i64 pair = token * k + slot;
      const int at = p.position[pair];
      if (at < 0) continue;
      const float weight = p.on_input ? 1.f : load_number(p.routing, pair, (int)p.routing_dtype);
      const Quad q = *(const Quad*)(p.y + (i64)at * height + h);
      total[0] = fmaf(__uint_as_float(q.x), weight, total[0]), total[1] = fmaf(__uint_as_float(q.y), weight, total[1]);
      total[2] = fmaf(__uint_as_float(q.z), weight, total[2]), total[3] = fmaf(__uint_as_float(q.w), weight, total[3]);
    }
    if (RESULT == 0 && H % 4 == 0 && ((u64)p.out & 7) == 0) {
      *(Pair*)((u16*)p.out + token * H + h) = {to_bf16x2(total[0], total[1]), to_bf16x2(total[2], total[3])};
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (h + j < H) store_result(p.out, token * H + h + j, total[j]);
    }
  }
}
