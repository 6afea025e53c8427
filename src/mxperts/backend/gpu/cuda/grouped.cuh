// What the kernels for all but a few tokens share. One after the other they sort the pairs (token, slot) by expert, write the inputs
// of the first projection, compute it, write the inputs of the second, compute it, and sum over each token's slots.
//
//   LEAST_N, MOST_N    fewest and most tokens that a tile has room for
//   STEP_N             what their number is rounded up to a multiple of
//   WGMMA              whether products are wgmma's, which wants its inputs in another order than mma.sync
//   FOLDED             whether products are fp8's: an expert's positions then begin at a multiple of 8, and what the activation
//                      function makes of the first one's results, not these, is written to memory
#pragma once
#include "common.cuh"

// Tokens of one expert that are computed together, times all rows of its weights.
struct Tile {
  int expert, first, count;  // positions of the sorted pairs
  int n;                     // count, rounded up to what there is an instruction for
  int group, of_group;       // first of the tiles that are computed together, and how many they are
  int unused[2];
};

struct Args : Call {
  int* totals;    // number of tiles, number of positions, and of those outside, by projection
  Tile* tiles;
  int* position;  // [pairs] where a pair is among those sorted by expert; -1 if it has none
  int* source;    // [pairs] the token at a position
  short* expert;  // [pairs] the expert at a position
  short* local;   // [pairs] the expert of a pair
  u16* xq;        // [PLANES, T or pairs, K1 * 64] inputs of the first projection
  u16* a;         // [PLANES, pairs, K2 * 64] inputs of the second
  void* h;        // [pairs, units1 * 32] results of the first projection, rows in the order of their tiles
  float* y;       // [pairs, units2 * 32] results of the second
  i64 aligned;    // whether rows of hidden states can be read 16 bytes at a time
  i64 second;     // which projection
  // For products in fp8 only, see folded.cu.
  u8* folded;     // inputs of a projection: [K / 128, positions, 128]
  float* base;    // [positions] what they are to be multiplied by
  u8* outside;    // [positions] whether fp8 has not all of a position's inputs
  int* picked;    // those positions, in their order
  Tile* exact;    // the tiles that they are computed in, see pick.cuh
  const u8* rows1;  // exponents of the weights' rows [E, units * 32]
  const u8* rows2;
  const u8* unfit;  // [E] whether fp8 has not all of an expert's weights
  u64* counted;   // positions that were computed, and those of them that were outside, in all calls
  i64 positions;  // room for
};

// Of four neighbouring lanes with four words each: the words that stand at a lane's own number, from all of them.
DI Quad exchange(u32 (&w)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  u32 r0 = __shfl_xor_sync(0xffffffffu, odd ? w[0] : w[1], 1), r1 = __shfl_xor_sync(0xffffffffu, odd ? w[2] : w[3], 1);
  u32 a0 = odd ? r0 : w[0], a1 = odd ? w[1] : r0, b0 = odd ? r1 : w[2], b1 = odd ? w[3] : r1;
  r0 = __shfl_xor_sync(0xffffffffu, high ? a0 : b0, 2), r1 = __shfl_xor_sync(0xffffffffu, high ? a1 : b1, 2);
  return high ? Quad{r0, r1, b0, b1} : Quad{a0, a1, r0, r1};
}
