// How a warp reads prepared weights.
#pragma once
#include "common.cuh"

// ---- through shared memory --------------------------------------------------------------------------------------------

// A warp's slices, one after the other, through places in shared memory that are its own: PLACES - 1 are on their way.
template <int PLACES> struct Ring {
  static constexpr int PLACE = (SLICE + 15) / 16 * 16;
  u32 next, freed, last;  // places: the next to be read, that read before, and the last of all
  const u8* from;         // of the slice to be copied, what this lane copies
  int left, lane;
  i64 stride;

  // Of `slices` ones, `stride` bytes apart.
  DI Ring(u8* shared, const u8* first, int slices, i64 stride, int lane) : left(slices), lane(lane), stride(stride) {
    next = shared_address(shared), last = freed = next + (PLACES - 1) * PLACE;
    from = first + lane * 16;
    for (int i = 0; i < PLACES - 1; i++) copy(next + i * PLACE);
  }
  DI void copy(u32 to) {
    if (left > 0) {
      to += lane * 16;
#pragma unroll
      for (int i = 0; i + 512 <= SLICE; i += 512) copy16(to + i, from + i);
      copy16_if(to + SLICE / 512 * 512, from + SLICE / 512 * 512, lane < SLICE % 512 / 16);
      from += stride, left--;
    }
    commit_copies();
  }
  // The next slice, to be read before the next but one is asked for.
  DI u32 take() {
    wait_copies<PLACES - 2>();
    __syncwarp();
    copy(freed);
    freed = next;
    next = next == last ? last - (PLACES - 1) * PLACE : next + PLACE;
    return freed;
  }
};

// ---- straight into registers --------------------------------------------------------------------------------------------

template <int AT> DI Quad load_weights4(const u8* p) {
  Quad v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p), "n"(AT));
  return v;
}
template <int AT> DI Pair load_weights2(const u8* p) {
  Pair v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0,%1}, [%2+%3];" : "=r"(v.x), "=r"(v.y) : "l"(p), "n"(AT));
  return v;
}
DI u32 load_weights1(const u8* p) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// Where a lane finds what it reads of slices, from the `cell`-th cell on. Its i-th slice is a product away, not sums.
struct Slices {
  const u8 *codes, *rest, *scales;

  DI Slices(const u8* first, int cell, int lane)
      : codes(first + cell * CELL_CODES + lane * 16),
        rest(first + cell * CELL_CODES + 512 + lane * 8),
        scales(first + 2 * CELL_CODES + cell * 4 + (lane >> 2) * 8) {
    asm("" : "+l"(codes), "+l"(rest), "+l"(scales));
  }
};

// What a lane reads of a slice, CELLS of its two cells.
template <int CELLS> struct Weights {
  Codes codes[CELLS];
  u32 scales[CELLS];

  DI void load(const Slices& from, int i) {
    load_codes_of<0>(from, (i64)i * SLICE);
    if constexpr (CELLS == 2) {
      load_codes_of<1>(from, (i64)i * SLICE);
      const Pair both = load_weights2<0>(from.scales + (i64)i * SLICE);
      scales[0] = both.x, scales[1] = both.y;
    } else {
      scales[0] = load_weights1(from.scales + (i64)i * SLICE);
    }
  }
  template <int CELL> DI void load_codes_of(const Slices& from, i64 at) {
    codes[CELL].main[0] = load_weights4<CELL * CELL_CODES>(from.codes + at);
    if constexpr (BITS == 8) codes[CELL].main[1] = load_weights4<CELL * CELL_CODES + 512>(from.codes + at);
    if constexpr (BITS == 6) codes[CELL].rest[0] = load_weights2<CELL * CELL_CODES>(from.rest + at);
  }
};
