// A layer for a few pairs (token, slot), each by itself: many small blocks, which read weights straight into registers.
//
// Two launches. In `first` a block computes 16 or 32 intermediate values of one pair, its warps sharing K; in `second` 16
// values of one token, its warps sharing K and the slots. A launch starts while the one before it still runs, where a GPU can
// do that, and waits for it where it needs its results: `second` behind its first weights. `inputs` before them and `middle`
// between them quantise where these cannot.
//
//   DEEP1, DEEP2    slices that a warp loads at a time
#include "overlap.cuh"
#include "weights.cuh"

struct Args : Call {
  u16* xq;   // [PLANES, rows, K1 * 64] inputs; unused where the hidden states do as they are
  u16* a;    // [PLANES, pairs, K2 * 64] what the second projection reads
  float* af; // [pairs, K2 * 64] the same before it is quantised with a row's scale; unused otherwise
};

// ---- products with one row -----------------------------------------------------------------------------------------

// A cell's products with a lane's values 8 t .. 8 t + 7 of both blocks of one row, which are B.
template <int J, int M> DI void multiply_part(float (&c)[4], const Codes& codes, u32 even, u32 odd, const Quad (&x)[PLANES][2]) {
  u32 a[4];
  fragment<J, M>(codes, even, odd, a);
#pragma unroll
  for (int i = 0; i < PLANES; i++) mma(c, a, M ? x[i][J].z : x[i][J].x, M ? x[i][J].w : x[i][J].y);
}
DI void multiply_cell(float (&c)[4], const Codes& codes, u32 scales, const Quad (&x)[PLANES][2]) {
  const u32 even = scale_factors<0>(scales), odd = scale_factors<1>(scales);
  multiply_part<0, 0>(c, codes, even, odd, x);
  multiply_part<0, 1>(c, codes, even, odd, x);
  multiply_part<1, 0>(c, codes, even, odd, x);
  multiply_part<1, 1>(c, codes, even, odd, x);
}

// For products with one row, sums of blocks are what scales are best applied to: they are fewer than weights. Of patterns as
// they are, they need inputs times 2^OFFSET. float16 would round weights, which then are to have their scales.
constexpr bool SCALE_SUMS = HIDDEN != 1;

template <int BYTE> DI float scale_of_sum(u32 scales) {  // 2^(byte - 127); 0 for byte 0, which only zeros have
  return __uint_as_float((BYTE == 0 ? scales << 23 : BYTE == 1 ? scales << 15 : BYTE == 2 ? scales << 7 : scales >> 1) & 0x7f800000u);
}
template <int J> DI void multiply_block_by_row(float (&sums)[2], const Codes& codes, u32 scales, const Quad (&x)[PLANES][2]) {
  u32 a[4];
  float c[4] = {};
  patterns<J, 0>(codes, a);
#pragma unroll
  for (int i = 0; i < PLANES; i++) mma(c, a, x[i][J].x, x[i][J].y);
  patterns<J, 1>(codes, a);
#pragma unroll
  for (int i = 0; i < PLANES; i++) mma(c, a, x[i][J].z, x[i][J].w);
  sums[0] = fmaf(c[0], scale_of_sum<2 * J>(scales), sums[0]);
  sums[1] = fmaf(c[2], scale_of_sum<2 * J + 1>(scales), sums[1]);
}
// A cell's products with a row, which all columns of B are; the sums of rows g and g + 8.
DI void multiply_row(float (&sums)[2], const Codes& codes, u32 scales, const Quad (&x)[PLANES][2]) {
  if constexpr (SCALE_SUMS) {
    multiply_block_by_row<0>(sums, codes, scales, x);
    multiply_block_by_row<1>(sums, codes, scales, x);
  } else {
    float c[4] = {};  // sums within mma.sync are truncated: they are kept short
    multiply_cell(c, codes, scales, x);
    sums[0] += c[0], sums[1] += c[2];
  }
}

// A warp's run of inputs, in shared memory [PLANES, slices, 64], and what sums of products with them are to be multiplied by.
struct Inputs {
  u32 at, plane;  // bytes
  float factor1, factor2;

  // Reads them. What is multiplied by patterns, which are as small as bf16 numbers can be, is brought to where the products
  // are float32 numbers of common size: a power of two for a run, by its largest.
  DI Inputs(u8* shared, const u16* from, i64 from_plane, int slices, int lane) : at(shared_address(shared)), plane(slices * 128) {
    const int pieces = slices * 8;
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < PLANES; i++) {
      for (int piece = lane; piece < pieces; piece += 32) {
        const Quad v = *(const Quad*)(from + i * from_plane + piece * 8);
        *(Quad*)(shared + i * plane + piece * 16) = v;
        if (i == 0) most = max(max(largest(v.x), largest(v.y)), max(most, max(largest(v.z), largest(v.w))));
      }
    }
    if constexpr (SCALE_SUMS) {
      const int exponent = min(max((int)(__reduce_max_sync(0xffffffffu, most) >> 7), 1), 254) - 127;
      const int up = OFFSET - exponent, up1 = up >> 1, up2 = up - up1;
      const u32 by1 = (u32)(up1 + 127) * 0x800080u, by2 = (u32)(up2 + 127) * 0x800080u;
#pragma unroll
      for (int i = 0; i < PLANES; i++) {
        for (int piece = lane; piece < pieces; piece += 32) {
          Quad& v = *(Quad*)(shared + i * plane + piece * 16);
          v = {multiply2(multiply2(v.x, by1), by2), multiply2(multiply2(v.y, by1), by2),
               multiply2(multiply2(v.z, by1), by2), multiply2(multiply2(v.w, by1), by2)};
        }
      }
      factor1 = power_of_two(exponent >> 1), factor2 = power_of_two(exponent - (exponent >> 1));
    }
    __syncwarp();
  }
  DI static u32 largest(u32 v) { return max(v & 0x7fffu, v >> 16 & 0x7fffu); }
  DI void load(Quad (&x)[PLANES][2], int slice, int lane) const {
#pragma unroll
    for (int i = 0; i < PLANES; i++) {
      x[i][0] = load_shared4<0>(at + i * plane + slice * 128 + (lane & 3) * 16);
      x[i][1] = load_shared4<64>(at + i * plane + slice * 128 + (lane & 3) * 16);
    }
  }
  DI float restore(float sum) const { return SCALE_SUMS ? sum * factor1 * factor2 : sum; }
};

// Sums of rows g and g + 8 of cells. All columns of the products are the same.
template <int CELLS> DI void multiply(float (&sums)[CELLS][2], const Weights<CELLS>& w, const Inputs& inputs, int slice, int lane) {
  Quad x[PLANES][2];
  inputs.load(x, slice, lane);
#pragma unroll
  for (int i = 0; i < CELLS; i++) multiply_row(sums[i], w.codes[i], w.scales[i], x);
}

// A run of slices, DEEP at a time, whose loads are on their way while those before them are used. `now` is loaded.
template <int DEEP, typename W, typename Load, typename Use> DI void stream(W (&now)[DEEP], int slices, Load load, Use use) {
  W then[DEEP];
  auto load_all = [&](W (&to)[DEEP], int at) {
#pragma unroll
    for (int i = 0; i < DEEP; i++)
      if (at + i < slices) load(to[i], at + i);
  };
  auto use_all = [&](const W (&w)[DEEP], int at) {
#pragma unroll
    for (int i = 0; i < DEEP; i++)
      if (at + i < slices) use(w[i], at + i);
  };
  for (int at = 0; at < slices; at += 2 * DEEP) {
    load_all(then, at + DEEP);
    use_all(now, at);
    load_all(now, at + 2 * DEEP);
    use_all(then, at + DEEP);
  }
}

// ---- quantising ----------------------------------------------------------------------------------------------------

// An input of the first projection, before it is quantised.
DI float input_of(const Call& p, i64 token, int i) {
  float v = load_number(p.x, token * p.x_stride + i, HIDDEN);
  return p.on_input ? round_to_hidden(v * load_number(p.routing, token, (int)p.routing_dtype)) : v;
}

// One value of a block of 32, quantised and back; a whole warp, one value a lane.
DI float quantize_in_block(float x) {
#if QDQ == 1
  u32 amax = __reduce_max_sync(0xffffffffu, __float_as_uint(x) & 0x7fffffffu);
  if (amax >= 0x7f800000u) return __uint_as_float(0x7fffffffu);
  return SharedScale(amax).quantize(x);
#else
  return x;
#endif
}

// A value of a row, split into bf16 numbers that add up to it, one for each plane of `stride` values.
DI void store_planes(u16* to, i64 i, i64 stride, float x) {
#pragma unroll
  for (int p = 0; p < PLANES; p++) {
    u32 part = to_bf16x2(x, 0.f) & 0xffffu;
    to[p * stride + i] = (u16)part;
    float rest = x - of_bf16(part);
    x = p == 0 && !(fabsf(x) < __uint_as_float(0x7f800000u)) ? 0.f : rest;  // Inf and NaN are in the first
  }
}

// Rows of values, quantised by whole warps: in blocks of 32, or with a scale.
template <typename Read, typename Scale>
DI void quantize_rows(i64 rows, int k, int width, u16* to, Read read, Scale scale_of, int worker, int workers, int lane) {
  const int blocks = width / 32;
  if (QDQ == 3) {
    for (i64 row = worker; row < rows; row += workers) {
      u32 most = 0;
      for (int i = lane; i < k; i += 32) most = max(most, __float_as_uint(read(row, i)) & 0x7fffffffu);
      most = __reduce_max_sync(0xffffffffu, most);
      float scale = __fdiv_rn(__uint_as_float(most), 448.f);
      if (scale == 0.f) scale = 1.f;
      for (int i = lane; i < width; i += 32) {
        float v = 0.f;
        if (i < k) v = most >= 0x7f800000u ? __uint_as_float(0x7fffffffu) : quantize_fp8(read(row, i), scale);
        store_planes(to, row * width + i, rows * width, round_to_hidden(v));
      }
    }
    return;
  }
  for (i64 block = worker; block < rows * blocks; block += workers) {
    i64 row = block / blocks;
    int i = (int)(block - row * blocks) * 32 + lane;
    float v = i < k ? read(row, i) : 0.f;
    if (QDQ == 1) v = quantize_in_block(v);
    if (QDQ == 2) v = i < k ? quantize_fp8(v, scale_of(row)) : 0.f;
    store_planes(to, row * width + i, rows * width, round_to_hidden(v));
  }
}

// ---- the launches --------------------------------------------------------------------------------------------------

constexpr int VALUES = GATED ? 16 : 32;                // intermediate values of a unit
constexpr int UNITS = QDQ == 1 && GATED ? 2 : 1;       // of a block: as many as hold a block of 32 that is quantised
constexpr int SHARE1 = WARPS1 / UNITS;                 // warps of a unit

extern "C" __global__ void __launch_bounds__(WARPS1 * 32) first(const __grid_constant__ Args p) {
  extern __shared__ __align__(16) u8 shared[];
  __shared__ float sums[WARPS1][32];
  if (p.direct) wait_for_previous();
  let_next_start();
  const i64 pair = blockIdx.y, e = expert_of(p, pair), pairs = p.T * p.k;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int units = units_of(p, false), steps = steps_of(p, false), width = steps_of(p, true) * 64;
  if (e >= 0) {
    const int unit = blockIdx.x * UNITS + warp % UNITS, part = warp / UNITS;
    const int begin = steps * part / SHARE1, slices = steps * (part + 1) / SHARE1 - begin;
    const Slices weights(p.w1 + ((e * units + min(unit, units - 1)) * steps + begin) * SLICE, 0, lane);
    auto load = [&](Weights<2>& to, int i) { to.load(weights, i); };
    Weights<2> now[DEEP1];
#pragma unroll
    for (int i = 0; i < DEEP1; i++)
      if (i < slices) load(now[i], i);
    if (!p.direct) wait_for_previous();
    const bool by_pair = QDQ == 2 && p.per_expert1;
    const i64 row = by_pair ? pair : pair / p.k, rows = by_pair ? pairs : p.T;
    const u16* x = p.direct ? (const u16*)p.x + row * p.x_stride : p.xq + row * steps * 64;
    u8* room = shared + warp * ((steps + SHARE1 - 1) / SHARE1) * (PLANES * 128);
    const Inputs inputs(room, x + begin * 64, rows * steps * 64, slices, lane);
    float c[2][2] = {};
    stream<DEEP1>(now, slices, load, [&](const Weights<2>& w, int i) { multiply<2>(c, w, inputs, i, lane); });
    if (lane % 4 == 0) {
#pragma unroll
      for (int i = 0; i < 4; i++) sums[warp][i * 8 + lane / 4] = inputs.restore(c[i >> 1][i & 1]);
    }
  } else if (!p.direct) {
    wait_for_previous();
  }
  __syncthreads();
  if (threadIdx.x >= UNITS * VALUES) return;
  const int v = threadIdx.x, u = v / VALUES, in_unit = v % VALUES, i = blockIdx.x * UNITS * VALUES + v;
  const int at = GATED ? in_unit / 8 * 16 + in_unit % 8 : in_unit;
  float a = 0.f;
  if (e >= 0) {  // otherwise the pair's inputs of the second projection are zeros
    float gate = 0.f, up = 0.f;
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
  }
  for (int to = i; to < width; to += blockIdx.x + 1 == gridDim.x ? UNITS * VALUES : width) {  // and zeros behind the last
    if (QDQ == 3) p.af[pair * width + to] = a;
    else store_planes(p.a, pair * width + to, pairs * width, a);
    a = 0.f;
  }
}

// A slice of the second projection.
struct alignas(8) Source {
  int slice;  // among all
  float factor;
};

extern "C" __global__ void __launch_bounds__(WARPS2 * 32) second(const __grid_constant__ Args p) {
  extern __shared__ __align__(16) u8 shared[];
  __shared__ float sums[WARPS2][16];
  let_next_start();
  const i64 token = blockIdx.y, pairs = p.T * p.k;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, k = (int)p.k;
  const int units = units_of(p, true), steps = steps_of(p, true), unit = blockIdx.x / 2, cell = blockIdx.x % 2;
  const int all = k * steps, begin = all * warp / WARPS2, slices = all * (warp + 1) / WARPS2 - begin, width = steps * 64;
  auto expert = [&](int slot) { return expert_of(p, token * k + slot); };
  auto factor = [&](int slot) { return p.on_input ? 1.f : load_number(p.routing, token * k + slot, (int)p.routing_dtype); };
  const int most = (all + WARPS2 - 1) / WARPS2 + 1 & ~1;  // even, for addresses
  u8* room = shared + warp * most * (sizeof(Source) + PLANES * 128);
  Source* sources = (Source*)(room + most * PLANES * 128);
  for (int i = lane; i < slices; i += 32) {  // any weights do for no expert: its inputs are zeros
    const int slot = (begin + i) / steps, e = expert(slot);
    sources[i] = {(max(e, 0) * units + unit) * steps + begin + i - slot * steps, e < 0 ? 0.f : factor(slot)};
  }
  __syncwarp();
  float total[2] = {};
  if (slices > 0) {
    const Slices weights(p.w2, cell, lane);
    auto load = [&](Weights<1>& to, int i) { to.load(weights, sources[i].slice); };
    Weights<1> now[DEEP2];
#pragma unroll
    for (int i = 0; i < DEEP2; i++)
      if (i < slices) load(now[i], i);
    wait_for_previous();
    const Inputs inputs(room, p.a + token * k * width + begin * 64, pairs * width, slices, lane);
    stream<DEEP2>(now, slices, load, [&](const Weights<1>& w, int i) {
      float c[1][2] = {};
      multiply<1>(c, w, inputs, i, lane);
      const float by = sources[i].factor;
      total[0] = fmaf(c[0][0], by, total[0]), total[1] = fmaf(c[0][1], by, total[1]);
    });
    total[0] = inputs.restore(total[0]), total[1] = inputs.restore(total[1]);
  } else {
    wait_for_previous();
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
      const i64 e = expert(slot);
      if (e >= 0) y = fmaf(load_number(p.bias2, e * p.H + h, (int)p.bias2_dtype), factor(slot), y);
    }
  }
  store_result(p.out, token * p.H + h, y);
}

// Inputs of the first projection, where they are not the hidden states as they are.
extern "C" __global__ void __launch_bounds__(256) inputs(const __grid_constant__ Args p) {
  wait_for_previous();
  let_next_start();
  const i64 rows = QDQ == 2 && p.per_expert1 ? p.T * p.k : p.T;
  auto read = [&](i64 row, int i) { return input_of(p, QDQ == 2 && p.per_expert1 ? row / p.k : row, i); };
  auto scale = [&](i64 row) { return p.scale1[p.per_expert1 ? max(0, expert_of(p, row)) : 0]; };
  quantize_rows(rows, (int)p.H, steps_of(p, false) * 64, p.xq, read, scale, blockIdx.x * 8 + (threadIdx.x >> 5),
                gridDim.x * 8, threadIdx.x & 31);
}

// Of the second projection, where a scale is a whole row's.
extern "C" __global__ void __launch_bounds__(256) middle(const __grid_constant__ Args p) {
  let_next_start();
  wait_for_previous();
  const int width = steps_of(p, true) * 64;
  auto read = [&](i64 row, int i) { return expert_of(p, row) < 0 ? 0.f : p.af[row * width + i]; };
  auto scale = [&](i64 row) { return 1.f; };
  quantize_rows(p.T * p.k, (int)p.I, width, p.a, read, scale, blockIdx.x * 8 + (threadIdx.x >> 5), gridDim.x * 8,
                threadIdx.x & 31);
}
