// Stages in shared memory that some warps fill and others use, in turn.
//
//   STAGES      their number
#pragma once
#include "common.cuh"

// 1024-byte aligned, as the swizzle wants it.
DI u32 stages_at(const u8* shared) { return (shared_address(shared) + 1023) & ~1023u; }

DI void barrier_init(u32 b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(arrivals) : "memory");
}
DI void barrier_arrive(u32 b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(b) : "memory"); }
DI void barrier_wait(u32 b, u32 phase) {
  asm volatile("{.reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra DONE; bra AGAIN; DONE: }"
               :: "r"(b), "r"(phase) : "memory");
}
DI void make_visible() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }  // what was written, to wgmma
DI void make_barriers_visible() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  make_visible();
}

// Stages of the ring, in turn.
struct Turn {
  u32 stage, phase;
  DI void advance() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};
