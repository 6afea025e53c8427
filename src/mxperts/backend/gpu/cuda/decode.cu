// A whole layer in one launch, for few tokens: every warp streams its share of the weights of both projections without a
// break, while what the second projection needs from the first is waited for behind copies that are already under way.
//
// One block of ALL_WARPS warps sits on every multiprocessor. Pairs (token, slot) of one expert form groups of up to 8, the N of
// an mma. An *item* is a unit of 32 rows for one group, or one of several parts of it along K; warps work on items for
// themselves and leave float32 sums in memory. Phases, between which the whole grid waits for each other: inputs are
// quantised; first projection; activation function, whose results are quantised; second projection; sum over the slots.
#include "common.cuh"

struct Args : Call {
  u16* xq;   // [PLANES, rows, K1 * 64] inputs; unused where the hidden states do as they are
  u16* a;    // [PLANES, pairs, K2 * 64] what the second projection reads
  float* af; // [pairs, K2 * 64] the same before it is quantised with a row's scale; unused otherwise
  float* h;  // [parts1, pairs, units1 * 32] sums of the first projection, rows in the order of their tiles
  float* y;  // [parts2, pairs, units2 * 32]
  i64 parts1, parts2;
};

constexpr int THREADS = 32 * ALL_WARPS;
constexpr int SLOT = (SLICE + 15) / 16 * 16;
constexpr int COPIES = SLICE / 16;

// Dynamic shared memory.
struct Routing {
  short expert[PAIRS];      // of a pair; -1 for none
  short rank[PAIRS];        // among the pairs of its expert
  short group_expert[PAIRS];
  short group_order[PAIRS]; // among the groups of its expert
  u8 group_count[PAIRS];
  short member[PAIRS][8];
  short count[EXPERTS], first[EXPERTS];
  int groups;
};

DI void grid_wait() {
  u64 workspace;  // which the driver gives to cooperative launches; its second word counts
  asm("{.reg .b32 h, l; mov.b32 l, %%envreg2; mov.b32 h, %%envreg1; mov.b64 %0, {l, h};}" : "=l"(workspace));
  u32* arrived = (u32*)workspace + 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    u32 add = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u, before, now;
    asm volatile("atom.add.release.gpu.u32 %0, [%1], %2;" : "=r"(before) : "l"(arrived), "r"(add) : "memory");
    do asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
    while (((before ^ now) & 0x80000000u) == 0);
  }
  __syncthreads();
}

// Groups of up to 8 pairs of one expert, in order of appearance: the same in every block.
DI void route(const Args& p, Routing& r) {
  const int pairs = (int)(p.T * p.k), lane = threadIdx.x & 31;
  if (pairs <= 32) {  // the usual case of one token: one warp, nothing counted
    if (threadIdx.x < 32) {
      int e = lane < pairs ? expert_of(p, lane) : -1;
      u32 same = __match_any_sync(0xffffffffu, e), before = (1u << lane) - 1;
      int rank = __popc(same & before);
      u32 leaders = __ballot_sync(0xffffffffu, e >= 0 && rank % 8 == 0);
      if (lane < pairs) r.expert[lane] = (short)e;
      if (e >= 0) {
        u32 mine = leaders & same & (before | 1u << lane);  // the leader of this pair's group is the last of them
        int group = __popc(leaders & ((1u << (31 - __clz(mine))) - 1));
        r.member[group][rank % 8] = (short)lane;
        if (rank % 8 == 0) {
          r.group_expert[group] = (short)e;
          r.group_count[group] = (u8)min(8, __popc(same) - rank);
        }
      }
      if (lane == 0) r.groups = __popc(leaders);
    }
    __syncthreads();
    return;
  }
  for (int i = threadIdx.x; i < (int)p.E; i += THREADS) r.count[i] = 0;
  for (int i = threadIdx.x; i < pairs; i += THREADS) r.expert[i] = (short)expert_of(p, i);
  __syncthreads();
  if (threadIdx.x < 32) {
    int groups = 0;
    for (int first = 0; first < pairs; first += 32) {
      int i = first + lane, e = i < pairs ? r.expert[i] : -1;
      u32 same = __match_any_sync(0xffffffffu, e), before = (1u << lane) - 1;
      int rank = e >= 0 ? r.count[e] + __popc(same & before) : 1;
      bool leads = e >= 0 && rank % 8 == 0;
      u32 leaders = __ballot_sync(0xffffffffu, leads);
      __syncwarp();
      if (leads) {
        int group = groups + __popc(leaders & before);
        r.group_expert[group] = (short)e;
        r.group_order[group] = (short)(rank / 8);
        if (rank == 0) r.first[e] = (short)group;
      }
      if (e >= 0) {
        r.rank[i] = (short)rank;
        if ((same >> lane) == 1u) r.count[e] = (short)(rank + 1);
      }
      __syncwarp();
      groups += __popc(leaders);
    }
    if (lane == 0) r.groups = groups;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += THREADS) {
    int e = r.expert[i];
    if (e < 0) continue;
    int order = r.rank[i] / 8, group = r.first[e];
    while (r.group_expert[group] != e || r.group_order[group] != order) group++;
    r.member[group][r.rank[i] % 8] = (short)i;
    if (r.rank[i] % 8 == 0) r.group_count[group] = (u8)min(8, r.count[e] - 8 * order);
  }
  __syncthreads();
}

// One of the projections, as a warp sees it. Items are numbered group by group, in the order in which they are in memory.
struct Projection {
  const u8* w;
  int units, steps, parts;  // of a group; slices of a unit; items of a unit
  int item, end;            // the warp's share of all items
  const u16* x;             // rows of inputs
  i64 stride, plane;
  float* sums;
};

DI void share(Projection& q, int groups, int worker, int workers) {
  i64 total = (i64)groups * q.units * q.parts;
  q.item = (int)(total * worker / workers);
  q.end = (int)(total * (worker + 1) / workers);
}

// An item.
struct Place {
  int group, unit, part;

  DI Place(const Projection& q, int item) {
    int unit_of_all = item / q.parts;
    part = item - unit_of_all * q.parts;
    group = unit_of_all / q.units;
    unit = unit_of_all - group * q.units;
  }
  DI void advance(const Projection& q) {
    if (++part < q.parts) return;
    part = 0;
    if (++unit < q.units) return;
    unit = 0, group++;
  }
  DI int first_step(const Projection& q) const { return q.steps * part / q.parts; }
};

// Where a warp's copies are: the next slice, over both projections. What only a new group needs is in shared memory.
struct Walk {
  int phase, group, last_group, last_slices;  // slices of the last group that are this warp's, from its beginning
};

struct Cursor {
  const u8* at;  // the next slice
  int left;      // slices before the next group; 0 once there are none

  DI void begin(Walk& s, int phase, const Projection& q, const Routing& r) {
    s.phase = phase;
    left = 0;
    if (q.item >= q.end) return;
    Place first(q, q.item), last(q, q.end);
    s.group = first.group, s.last_group = last.group;
    s.last_slices = last.unit * q.steps + last.first_step(q);
    aim(s, q, r, first.unit * q.steps + first.first_step(q));
  }
  DI void aim(const Walk& s, const Projection& q, const Routing& r, int first) {
    at = q.w + ((i64)r.group_expert[s.group] * q.units * q.steps + first) * SLICE;
    left = (s.group == s.last_group ? s.last_slices : q.units * q.steps) - first;
  }
  DI void next_group(Walk& s, const Projection& first, const Projection& second, const Routing& r) {
    if (s.phase < 2 && ++s.group <= s.last_group) {
      const Projection& q = s.phase == 0 ? first : second;
      if (s.group < s.last_group || s.last_slices > 0) aim(s, q, r, 0);
    }
    if (left == 0 && s.phase == 0) begin(s, 1, second, r);
  }
};

// One slice, 16 bytes a lane and copy.
DI void copy_slice(u32 to, const u8* from, int lane) {
#pragma unroll
  for (int i = 0; i + 32 <= COPIES; i += 32) copy16(to + i * 16, from + i * 16);
  copy16_if(to + COPIES / 32 * 512, from + COPIES / 32 * 512, lane < COPIES % 32);
}
DI void copy_next(Cursor& c, Walk& s, const Projection& first, const Projection& second, const Routing& r, u32 slot, int lane) {
  if (c.left > 0) {
    copy_slice(slot + lane * 16, c.at + lane * 16, lane);
    c.at += SLICE;
    if (--c.left == 0) c.next_group(s, first, second, r);
  }
  commit_copies();
}

// A lane's values of one step: 8 t .. 8 t + 7 of both blocks of one row.
struct Inputs { Quad block[PLANES][2]; };

// The row that a lane reads of a group: none for the mma's columns beyond the group's pairs, whose inputs stay 0.
struct Row {
  const u16* at;
  bool there;
};

template <int PHASE> DI Row row_of(const Args& p, const Projection& q, const Routing& r, int group, int lane) {
  int n = lane >> 2;
  if (group >= r.groups || n >= r.group_count[group]) return {q.x, false};
  int pair = r.member[group][n];
  i64 row = PHASE == 0 && !(QDQ == 2 && p.per_expert1) && p.k > 1 ? pair / (int)p.k : pair;
  return {q.x + row * q.stride + (lane & 3) * 8, true};
}

DI void load_inputs(Inputs& in, const Projection& q, const Row& row, int step) {
#pragma unroll
  for (int i = 0; i < PLANES; i++) {
#pragma unroll
    for (int j = 0; j < 2; j++)
      load_global4_if(in.block[i][j], row.at + i * q.plane + step * 64 + 32 * j, row.there);
  }
}

DI void multiply(float (&c)[2][4], u32 slot, const Inputs& in, int lane) {
  Pair scales = load_scales(slot, lane >> 2);
  multiply_cell(c[0], load_codes<0>(slot, lane), scales.x, in.block);
  multiply_cell(c[1], load_codes<1>(slot, lane), scales.y, in.block);
}

// Slots of a warp in shared memory: the next to be read, the one before, the last of all.
struct Ring { u32 next, freed, last; };

template <int PHASE>
DI void project(const Args& p, const Projection& q, const Projection& first, const Projection& second, const Routing& r,
                Cursor& cursor, Walk& walk, Ring& ring, int lane) {
  if (q.item >= q.end) return;
  Place place(q, q.item);
  int step = place.first_step(q);
  Inputs in = {};
  Row row = row_of<PHASE>(p, q, r, place.group, lane);
  load_inputs(in, q, row, step);
  for (int item = q.item; item < q.end; item++) {
    const Place here = place;
    place.advance(q);
    const int end = here.part + 1 < q.parts ? place.first_step(q) : q.steps;
    float c[2][4] = {};
    while (true) {
      wait_copies<DEPTH - 2>();
      __syncwarp();
      copy_next(cursor, walk, first, second, r, ring.freed, lane);  // into what was read in the step before
      multiply(c, ring.next, in, lane);
      ring.freed = ring.next;
      ring.next = ring.next == ring.last ? ring.last - (DEPTH - 1) * SLOT : ring.next + SLOT;
      if (++step == end) break;
      load_inputs(in, q, row, step);
    }
    if (step == q.steps) step = 0;
    if (item + 1 < q.end) {
      if (place.group != here.group) {
        row = row_of<PHASE>(p, q, r, place.group, lane);
        in = {};
      }
      load_inputs(in, q, row, step);
    }
    // c0, c1 are of row g, c2, c3 of row g + 8, each with pairs 2 t and 2 t + 1.
    const int count = r.group_count[here.group], height = q.units * 32;
#pragma unroll
    for (int b = 0; b < 2; b++) {
      const int n = 2 * (lane & 3) + b;
      if (n >= count) continue;
      float* to = q.sums + ((i64)here.part * p.T * p.k + r.member[here.group][n]) * height + here.unit * 32 + (lane >> 2);
#pragma unroll
      for (int i = 0; i < 4; i++) __stcg(to + i * 8, c[i >> 1][2 * (i & 1) + b]);
    }
  }
}

// The sum of a row of a pair over the parts.
DI float sum_parts(const float* sums, i64 parts, i64 pairs, i64 pair, i64 height, i64 row) {
  float total = 0.f;
  for (i64 part = 0; part < parts; part++) total += __ldcg(sums + (part * pairs + pair) * height + row);
  return total;
}

// What the activation function makes of the first projection's sums.
DI float activation(const Args& p, const Routing& r, i64 pair, int i, int height) {
  const i64 pairs = p.T * p.k, e = r.expert[pair], rows = GATED ? 2 * p.I : p.I;
  const int at = GATED ? i / 8 * 16 + i % 8 : i;
  float gate = sum_parts(p.h, p.parts1, pairs, pair, height, at), up = 0.f;
  if (GATED) up = sum_parts(p.h, p.parts1, pairs, pair, height, at + 8);
  if (p.bias1) {
    const i64 b = e * rows + (GATED && INTERLEAVED ? 2 * i : i);
    gate += load_number(p.bias1, b, (int)p.bias1_dtype);
    if (GATED) up += load_number(p.bias1, b + (INTERLEAVED ? 1 : p.I), (int)p.bias1_dtype);
  }
  return round_to_hidden(activate(round_to_hidden(gate), round_to_hidden(up), p.constants));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode(const __grid_constant__ Args p) {
  extern __shared__ __align__(16) u8 slots[];
  Walk* walks = (Walk*)(slots + ALL_WARPS * DEPTH * SLOT);
  Routing& r = *(Routing*)(walks + ALL_WARPS);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int worker = warp * gridDim.x + blockIdx.x, workers = ALL_WARPS * gridDim.x;

  route(p, r);
  const int steps1 = steps_of(p, false), steps2 = steps_of(p, true), width = steps2 * 64;
  const i64 pairs = p.T * p.k, rows1 = QDQ == 2 && p.per_expert1 ? pairs : p.T;
  const int units1 = units_of(p, false), units2 = units_of(p, true);
  Projection first = {p.w1, units1, steps1, (int)p.parts1, 0, 0, p.xq, steps1 * 64, rows1 * steps1 * 64, p.h};
  if (p.direct) first.x = (const u16*)p.x, first.stride = p.x_stride;
  Projection second = {p.w2, units2, steps2, (int)p.parts2, 0, 0, p.a, width, pairs * width, p.y};
  share(first, r.groups, worker, workers);
  // Warps with one item less of the first projection are the likelier to have one more of the second.
  share(second, r.groups, workers - 1 - worker, workers);

  const u32 base = shared_address(slots) + warp * (DEPTH * SLOT);
  Ring ring = {base, base + (DEPTH - 1) * SLOT, base + (DEPTH - 1) * SLOT};
  Walk& walk = walks[warp];
  Cursor cursor;
  cursor.begin(walk, 0, first, r);
  if (cursor.left == 0) cursor.begin(walk, 1, second, r);
  for (int i = 0; i < DEPTH - 1; i++) copy_next(cursor, walk, first, second, r, base + i * SLOT, lane);

  if (!p.direct) {
    auto read = [&](i64 row, int i) { return input_of(p, QDQ == 2 && p.per_expert1 ? row / p.k : row, i); };
    auto scale = [&](i64 row) { return p.scale1[p.per_expert1 ? max((int)r.expert[row], 0) : 0]; };
    quantize_rows(rows1, (int)p.H, steps1 * 64, p.xq, (float*)0, read, scale, worker, workers, lane);
    grid_wait();
  }
  project<0>(p, first, first, second, r, cursor, walk, ring, lane);
  grid_wait();
  {
    auto read = [&](i64 pair, int i) { return r.expert[pair] < 0 ? 0.f : activation(p, r, pair, i, units1 * 32); };
    auto scale = [&](i64 row) { return p.scale2[p.per_expert2 ? max((int)r.expert[row], 0) : 0]; };
    quantize_rows(pairs, (int)p.I, width, p.a, p.af, read, scale, worker, workers, lane);
  }
  grid_wait();
  project<1>(p, second, first, second, r, cursor, walk, ring, lane);
  grid_wait();
  for (i64 i = worker * 32 + lane; i < p.T * p.H; i += workers * 32) {
    i64 token = i / p.H, h = i - token * p.H;
    float total = 0.f;
    for (int slot = 0; slot < p.k; slot++) {
      i64 pair = token * p.k + slot, e = r.expert[pair];
      if (e < 0) continue;
      float y = sum_parts(p.y, p.parts2, pairs, pair, units2 * 32, h);
      if (p.bias2) y += load_number(p.bias2, e * p.H + h, (int)p.bias2_dtype);
      total += p.on_input ? y : y * load_number(p.routing, pair, (int)p.routing_dtype);
    }
    store_hidden(p.out, i, total);
  }
}
