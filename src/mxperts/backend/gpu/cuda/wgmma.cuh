// wgmma.m64nNk16 for bf16, and m64nNk32 for fp8: A in registers, B in shared memory with rows of K.
// d[j] are the four sums of a lane and 8 columns of B, as mma.m16n8k16 has them.
#pragma once
#include "common.cuh"

DI void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DI void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> DI void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory"); }
// B's descriptor: 128-byte rows, swizzled, 1024 bytes for each eight of them.
DI u64 swizzled_rows(u32 at) { return (u64)1 << 62 | (u64)64 << 32 | (u64)1 << 16 | (u64)((at & 0x3ffff) >> 4); }

#if WEIGHTS_E5M2
#define FP8_OF_A "e5m2"
#else
#define FP8_OF_A "e4m3"
#endif

template <int N> struct Wgmma;

// The instruction wants its registers one by one: R_j names those of d[0] .. d[j], D_j gives them.
#define D(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define R_0 "%0, %1, %2, %3"
#define D_0 D(0)
#define R_1 R_0 ", %4, %5, %6, %7"
#define D_1 D_0, D(1)
#define R_2 R_1 ", %8, %9, %10, %11"
#define D_2 D_1, D(2)
#define R_3 R_2 ", %12, %13, %14, %15"
#define D_3 D_2, D(3)
#define R_4 R_3 ", %16, %17, %18, %19"
#define D_4 D_3, D(4)
#define R_5 R_4 ", %20, %21, %22, %23"
#define D_5 D_4, D(5)
#define R_6 R_5 ", %24, %25, %26, %27"
#define D_6 D_5, D(6)
#define R_7 R_6 ", %28, %29, %30, %31"
#define D_7 D_6, D(7)
#define R_8 R_7 ", %32, %33, %34, %35"
#define D_8 D_7, D(8)
#define R_9 R_8 ", %36, %37, %38, %39"
#define D_9 D_8, D(9)
#define R_10 R_9 ", %40, %41, %42, %43"
#define D_10 D_9, D(10)
#define R_11 R_10 ", %44, %45, %46, %47"
#define D_11 D_10, D(11)
#define R_12 R_11 ", %48, %49, %50, %51"
#define D_12 D_11, D(12)
#define R_13 R_12 ", %52, %53, %54, %55"
#define D_13 D_12, D(13)
#define R_14 R_13 ", %56, %57, %58, %59"
#define D_14 D_13, D(14)
#define R_15 R_14 ", %60, %61, %62, %63"
#define D_15 D_14, D(15)
#define R_16 R_15 ", %64, %65, %66, %67"
#define D_16 D_15, D(16)
#define R_17 R_16 ", %68, %69, %70, %71"
#define D_17 D_16, D(17)
#define R_18 R_17 ", %72, %73, %74, %75"
#define D_18 D_17, D(18)
#define R_19 R_18 ", %76, %77, %78, %79"
#define D_19 D_18, D(19)

// `last` is N / 8 - 1; the numbers are those of the operands behind the sums. Products in fp8 begin with sums of 0 where `more` is 0.
#define WGMMA_OF(N, last, A0, A1, A2, A3, B, MORE)                                                                          \
  template <> struct Wgmma<N> {                                                                                           \
    static DI void multiply(float (&d)[N / 8][4], const u32 (&a)[4], u64 b) {                                             \
      asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" #N                             \
                   "k16.f32.bf16.bf16 {" R_##last "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, 0;}"     \
                   : D_##last                                                                                             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                 \
    }                                                                                                                     \
    static DI void multiply_fp8(float (&d)[N / 8][4], const u32 (&a)[4], u64 b, int more) {                              \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #MORE ", 0; wgmma.mma_async.sync.aligned.m64n" #N                    \
                   "k32.f32." FP8_OF_A ".e4m3 {" R_##last "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1;}"       \
                   : D_##last                                                                                             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));                                      \
    }                                                                                                                     \
  };
WGMMA_OF(8, 0, 4, 5, 6, 7, 8, 9)
WGMMA_OF(16, 1, 8, 9, 10, 11, 12, 13)
WGMMA_OF(24, 2, 12, 13, 14, 15, 16, 17)
WGMMA_OF(32, 3, 16, 17, 18, 19, 20, 21)
WGMMA_OF(40, 4, 20, 21, 22, 23, 24, 25)
WGMMA_OF(48, 5, 24, 25, 26, 27, 28, 29)
WGMMA_OF(56, 6, 28, 29, 30, 31, 32, 33)
WGMMA_OF(64, 7, 32, 33, 34, 35, 36, 37)
WGMMA_OF(72, 8, 36, 37, 38, 39, 40, 41)
WGMMA_OF(80, 9, 40, 41, 42, 43, 44, 45)
WGMMA_OF(96, 11, 48, 49, 50, 51, 52, 53)
WGMMA_OF(112, 13, 56, 57, 58, 59, 60, 61)
WGMMA_OF(128, 15, 64, 65, 66, 67, 68, 69)
WGMMA_OF(144, 17, 72, 73, 74, 75, 76, 77)
WGMMA_OF(160, 19, 80, 81, 82, 83, 84, 85)

// Tokens of a tile, see STEP_N.
#if STEP_N == 8
#define FOR_EACH_N(X) X(8) X(16) X(24) X(32) X(40) X(48)
#else
#define FOR_EACH_N(X) X(16) X(32) X(48) X(64) X(80) X(96) X(112) X(128) X(144) X(160)
#endif
