// What runs beside a kernel's own instructions: copies, the barriers that tell of their arrival, and the next launch.
#pragma once
#include "common.cuh"

// ---- launches that overlap, from compute capability 9.0 on ----------------------------------------------------------

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

// ---- bulk copies into shared memory, likewise -----------------------------------------------------------------------

#if __CUDA_ARCH__ >= 900
DI void barrier_init(u32 b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(arrivals) : "memory");
}
DI void barrier_arrive(u32 b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(b) : "memory"); }
DI void barrier_expect(u32 b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(b), "r"(bytes) : "memory");
}
DI void barrier_wait(u32 b, u32 phase) {
  asm volatile("{.reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra DONE; bra AGAIN; DONE: }"
               :: "r"(b), "r"(phase) : "memory");
}
DI void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
DI void make_visible() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }  // what was written, to copies and wgmma
DI void make_barriers_visible() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  make_visible();
}
#endif

// ---- weights straight into registers ---------------------------------------------------------------------------------

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
DI u32 load_weights1(const u8* p) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// What a lane reads of a slice: CELLS of its two cells, from the `cell`-th on.
template <int CELLS> struct Weights {
  Codes codes[CELLS];
  u32 scales[CELLS];

  DI void load(const u8* slice, int cell, int lane) {
#pragma unroll
    for (int i = 0; i < CELLS; i++) {
      const u8* at = slice + (cell + i) * CELL_CODES;
      codes[i].main[0] = load_weights4(at + lane * 16);
      if constexpr (BITS == 8) codes[i].main[1] = load_weights4(at + 512 + lane * 16);
      if constexpr (BITS == 6) codes[i].rest[0] = load_weights2(at + 512 + lane * 8);
    }
    const u8* at = slice + 2 * CELL_CODES + (lane >> 2) * 8 + cell * 4;
    if constexpr (CELLS == 2) {
      const Pair both = load_weights2(at);
      scales[0] = both.x, scales[1] = both.y;
    } else {
      scales[0] = load_weights1(at);
    }
  }
};
