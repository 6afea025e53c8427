// What the kernels that compute a projection of grouped tokens share: which items there are, and where results go.
//
//   UNITS    units of 32 rows of an item
#pragma once
#include "grouped.cuh"

struct Projection {
  const u8* w;
  int units, steps, items_of_tile;
  const Tile* tiles;
  int number_of_tiles;
  const u16* x;       // inputs [PLANES, rows, steps * 64]
  i64 plane;          // bytes
  u32 pitch;          // of a row, in 16 bytes
  const int* source;  // rows of positions; or 0 if those are the same
  const int* picked;  // positions of tiles that are no neighbours; or 0

  // `exact` is the number of tiles that are computed although products are fp8's.
  DI explicit Projection(const Args& p, int exact = 0) {
    const bool second = p.second;
    units = units_of(p, second), steps = steps_of(p, second), items_of_tile = (units + UNITS - 1) / UNITS;
    w = second ? p.w2 : p.w1;
    x = second ? p.a : p.xq;
    pitch = steps * 8;
    if (FOLDED) {
      tiles = p.exact, number_of_tiles = exact, source = picked = p.picked, plane = 0;
      return;
    }
    tiles = p.tiles, number_of_tiles = p.totals[0], picked = nullptr;
    plane = (second || p.per_expert1 ? p.T * p.k : p.T) * steps * 128;
    source = second || p.per_expert1 ? nullptr : p.source;
    if (!second && p.direct) x = (const u16*)p.x, pitch = (u32)(p.x_stride / 8);
  }
  DI int items() const { return number_of_tiles * items_of_tile; }
  // The position that results of a tile's n-th token go to.
  DI int position(const Tile& tile, int n) const { return picked ? picked[tile.first + n] : tile.first + n; }
  // Where a token's inputs are, in 16 bytes; beyond the tile's, what is there does not matter.
  DI u32 row(const Tile& tile, int n) const {
    int at = tile.first + min(n, tile.count - 1);
    return (u32)(source ? source[at] : at) * pitch;
  }
  DI const u8* unit(const Tile& tile, int unit) const { return w + ((i64)tile.expert * units + unit) * steps * SLICE; }
};

// Items in an order that lets those at work at one time share weights: the tiles of a group, then the next 256 rows.
struct Item {
  Tile tile;
  int unit;

  DI Item(const Tile* list, int items_of_tile, int i) {
    const Tile& any = list[i / items_of_tile];
    const int first = any.group, tiles = any.of_group, within = i - first * items_of_tile;
    unit = within / tiles * UNITS;
    tile = list[first + within % tiles];
  }
};

// ---- results -------------------------------------------------------------------------------------------------------

DI float bias_of(const Args& p, int expert, int row) {
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

// Of a matrix [row, column] of 8 x 8, of which lane 4 r + c has columns 2 c and 2 c + 1 of row r, the same of its transpose.
DI u32 transposed(u32 pair) {
  u32 d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(pair));
  return d;
}

// What the activation function makes of a cell's results, of which a lane has rows g and g + 8, of each the tokens 8 j + 2 t + {0, 1}.
// `at` gives the position of a token, -1 for none.
template <int N, typename At> DI void store_activated(const Args& p, int cell, float (&c)[N / 8][4], int lane, At at) {
  constexpr int VALUES = GATED ? 1 : 2;  // that a lane makes of two rows
  const i64 width = steps_of(p, true) * 64;
  if (cell * 8 * VALUES >= width) return;
#pragma unroll
  for (int first = 0; first < N / 8; first += 4) {
    u32 w[VALUES][4] = {};
#pragma unroll
    for (int m = 0; m < 4; m++) {
      if (first + m >= N / 8) continue;
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = round_to_hidden(c[first + m][i]);
#pragma unroll
      for (int r = 0; r < VALUES; r++) {
        float low = activate(v[2 * r], GATED ? v[2] : 0.f, p.constants), high = activate(v[2 * r + 1], GATED ? v[3] : 0.f, p.constants);
        w[r][m] = transposed(to_bf16x2(low, high));
      }
    }
    const int n = (first + (lane & 3)) * 8 + (lane >> 2), position = n < N ? at(n) : -1;
#pragma unroll
    for (int r = 0; r < VALUES; r++) {
      Quad q = exchange(w[r], lane);
      if (position >= 0) *(Quad*)(p.a + position * width + (cell * VALUES + r) * 8) = q;
    }
  }
}

// A lane has rows g, g + 8, g + 16 and g + 24 of its unit, of each the tokens 8 j + 2 t + {0, 1}.
template <int N>
DI void store_results(const Args& p, const Projection& q, const Item& item, int unit, float (&c)[2][N / 8][4], int lane) {
  if (unit >= q.units) return;
  const int g = lane >> 2, t = lane & 3, height = q.units * 32, count = item.tile.count;
  float bias[4];
#pragma unroll
  for (int i = 0; i < 4; i++) bias[i] = bias_of(p, item.tile.expert, unit * 32 + 8 * i + g);
  if (HIDDEN == 2 || p.second) {
    float* to = (p.second ? p.y : (float*)p.h) + unit * 32 + g;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
      for (int b = 0; b < 2; b++) {
        const int n = 8 * j + 2 * t + b;
        if (n < count) {
#pragma unroll
          for (int i = 0; i < 4; i++)
            to[(i64)q.position(item.tile, n) * height + 8 * i] = c[i >> 1][j][2 * (i & 1) + b] + bias[i];
        }
      }
    }
    return;
  }
  if constexpr (FOLDED) {
#pragma unroll
    for (int cell = 0; cell < 2; cell++) {
#pragma unroll
      for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) c[cell][j][i] += bias[2 * cell + i / 2];
      }
      store_activated<N>(p, unit * 2 + cell, c[cell], lane, [&](int n) { return n < count ? q.position(item.tile, n) : -1; });
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

// ---- weights -------------------------------------------------------------------------------------------------------

// What a lane has of a slice.
struct Slice {
  Codes cell[2];
  Pair scales;
};

DI Slice load_slice(u32 slice, int lane) {
  Slice s;
  s.cell[0] = load_codes<0>(slice, lane);
  s.cell[1] = load_codes<1>(slice, lane);
  s.scales = load_scales(slice, lane >> 2);
  return s;
}
// Both cells' A for block J of the step.
template <int J> DI void decode_block(const Slice& s, u32 (&a)[2][2][4]) {
#pragma unroll
  for (int cell = 0; cell < 2; cell++) {
    const u32 scales = cell ? s.scales.y : s.scales.x;
    const u32 even = scale_factors<0>(scales), odd = scale_factors<1>(scales);
    fragment<J, 0>(s.cell[cell], even, odd, a[cell][0]);
    fragment<J, 1>(s.cell[cell], even, odd, a[cell][1]);
  }
}
