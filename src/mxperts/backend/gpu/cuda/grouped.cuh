// What the kernels for all but a few tokens share. One after the other they sort the pairs (token, slot) by expert, write the inputs
// of the first projection, compute it, write the inputs of the second, compute it, and sum over each token's slots.
//
//   LEAST_N, MOST_N    fewest and most tokens that a tile has room for
//   STEP_N             what their number is rounded up to a multiple of
//   WGMMA              whether products are wgmma's, which wants its inputs in another order than mma.sync
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
  int* totals;    // number of tiles, number of pairs that have an expert
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
};
