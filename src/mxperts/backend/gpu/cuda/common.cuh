// What every kernel here needs: words, bf16 arithmetic, decoding weights, quantising and activating.
//
// A kernel is compiled for one problem: the numbers below in capitals are defined by the launcher (see macros.py).
//   BITS, OFFSET            width of a code; decoded patterns are the element's value times 2^-OFFSET as bf16
//   SHIFT, MASK             8-bit floats: exponent and mantissa move right by SHIFT into MASK
//   INTEGER                 two's complement codes
//   LOW                     6-bit floats: which bits of a pattern the two bits outside the nibble are, as a mask
//   HIDDEN, RESULT          dtypes of hidden states and of the result: 0 bf16, 1 float16, 2 float32
//   PLANES                  bf16 numbers that one input value is split into, exactly
//   QDQ                     how inputs are quantised: 0 not, 1 in blocks, 2 fp8 with given scales, 3 fp8, scale of a row
//   RULE_*                  of the blocks: see rule.BlockRule
//   GATED, FUNCTION         the activation function
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define DI __device__ __forceinline__

struct alignas(16) Quad { u32 x, y, z, w; };
struct alignas(8) Pair { u32 x, y; };

DI u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DI void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"(to), "l"(from) : "memory");
}
DI void copy16_if(u32 to, const void* from, bool wanted) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.cg.shared.global.L2::128B [%0], [%1], 16;}"
               :: "r"(to), "l"(from), "r"((u32)wanted) : "memory");
}
DI void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DI void wait_copies() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

template <int AT> DI Quad load_shared4(u32 a) {
  Quad v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4+%5];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a), "n"(AT));
  return v;
}
template <int AT> DI Pair load_shared2(u32 a) {
  Pair v;
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2+%3];" : "=r"(v.x), "=r"(v.y) : "r"(a), "n"(AT));
  return v;
}

// Two bf16 numbers in a word.
DI u32 multiply2(u32 a, u32 b) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
  return d;
}
DI u32 add2(u32 a, u32 b) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return d;
}
DI u32 to_bf16x2(float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
DI float of_bf16(u32 low16) { return __uint_as_float(low16 << 16); }
DI float round_to_bf16(float x) { return of_bf16(to_bf16x2(x, 0.f) & 0xffffu); }
DI float round_to_half(float x) {
  float y;
  asm("{.reg .f16 h; cvt.rn.f16.f32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(y) : "f"(x));
  return y;
}
DI float of_half(u16 bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}
DI u16 to_half(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

DI void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Numbers of any float dtype: 0 bf16, 1 float16, 2 float32.
DI float load_number(const void* p, i64 i, int dtype) {
  if (dtype == 2) return ((const float*)p)[i];
  u16 bits = ((const u16*)p)[i];
  return dtype == 0 ? of_bf16(bits) : of_half(bits);
}
DI float round_to_hidden(float x) { return HIDDEN == 0 ? round_to_bf16(x) : HIDDEN == 1 ? round_to_half(x) : x; }
DI void store_result(void* p, i64 i, float x) {
  if (RESULT == 2) ((float*)p)[i] = x;
  else if (RESULT == 1) ((u16*)p)[i] = to_half(x);
  else ((u16*)p)[i] = (u16)to_bf16x2(x, 0.f);
}

struct Constants { float limit, alpha, beta, linear_beta; };  // NaN where there is none

// What every kernel is given of a call, as arguments.py has it. Weights are slices [E, units, K / 64].
struct Call {
  const void* x;        // hidden states [T, H]
  const void* ids;      // [T, k]
  const void* routing;  // [T, k]
  const void* map;      // or 0
  const u8* w1;
  const u8* w2;
  const void* bias1;    // or 0
  const void* bias2;
  const float* scale1;  // of static fp8
  const float* scale2;
  void* out;            // [T, H]
  i64 x_stride, T, k, E, H, I, map_size;
  i64 ids64, map64, routing_dtype, bias1_dtype, bias2_dtype;
  i64 direct;           // whether the first projection can read the hidden states as they are
  i64 on_input, per_expert1, per_expert2;
  Constants constants;
};

// The expert of a pair (token, slot); -1 for none, also for ids that are out of range.
DI int expert_of(const Call& p, i64 pair) {
  i64 id = p.ids64 ? ((const i64*)p.ids)[pair] : ((const int*)p.ids)[pair];
  if (p.map) id = id >= 0 && id < p.map_size ? (p.map64 ? ((const i64*)p.map)[id] : ((const int*)p.map)[id]) : -1;
  return id >= 0 && id < p.E ? (int)id : -1;
}

// Units and steps of a projection.
DI int units_of(const Call& p, bool second) {
  return (int)(second ? (p.H + 31) / 32 : (p.I + (GATED ? 15 : 31)) / (GATED ? 16 : 32));
}
DI int steps_of(const Call& p, bool second) { return (int)(((second ? p.I : p.H) + 63) / 64); }

// ---- weights -------------------------------------------------------------------------------------------------------
// A cell is 16 rows times 64 of K. Of its two blocks of 32, lane (g, t) = (lane / 4, lane % 4) of a warp holds the codes of rows
// g and g + 8 and k = 8 t .. 8 t + 7, which is what four mma.m16n8k16 want as their A, if B holds k in the same order.

constexpr int CELL_CODES = 16 * 64 * BITS / 8;
constexpr int SLICE = 2 * CELL_CODES + 64;  // two cells: their codes, then their scales, as layout.py has it

struct Codes {
  Quad main[BITS == 8 ? 2 : 1];
  Pair rest[BITS == 6 ? 1 : 0 + 1];
};

template <int CELL> DI Codes load_codes(u32 slice, int lane) {
  Codes c;
  c.main[0] = load_shared4<CELL * CELL_CODES>(slice + lane * 16);
  if constexpr (BITS == 8) c.main[1] = load_shared4<CELL * CELL_CODES + 512>(slice + lane * 16);
  if constexpr (BITS == 6) c.rest[0] = load_shared2<CELL * CELL_CODES + 512>(slice + lane * 8);
  return c;
}
// The scales of both cells: bytes of rows g and g + 8 in the first block, then in the second.
DI Pair load_scales(u32 slice, int g) { return load_shared2<2 * CELL_CODES>(slice + g * 8); }

// What patterns of rows g (ROW 0) or g + 8 (ROW 1) are to be multiplied by: for the first block in the low half of a word, for the
// second in the high one.
template <int ROW> DI u32 scale_factors(u32 scales) {
  return __byte_perm(scales, 0, ROW ? 0x4341 : 0x4240) * 128u + (u32)(OFFSET * 128) * 0x10001u;
}
template <int HALF> DI u32 twice(u32 pair) {
  u32 d;
  if constexpr (HALF == 0) asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l};}" : "=r"(d) : "r"(pair));
  else asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h};}" : "=r"(d) : "r"(pair));
  return d;
}

#define NIBBLE 0x81C081C0u
DI u32 pick(u32 w, int left, u32 mask) { return (left >= 0 ? w << (left & 31) : w >> (-left & 31)) & mask; }

// The A of one mma: rows g, g + 8, g, g + 8 and k = 8 t + 4 m + {0, 1, 0, 1, 2, 3, 2, 3}; without scales.
template <int J, int M> DI void patterns(const Codes& c, u32 (&a)[4]) {
  if constexpr (BITS == 8) {
    const Quad& q = c.main[J];
    u32 v[2] = {M ? q.z : q.x, M ? q.w : q.y};
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        u32 w = h ? v[i] << 8 : v[i];
        if constexpr (INTEGER) {
          u32 low = h ? v[i] : v[i] >> 8;
          a[2 * i + h] = add2((low & 0x007f007fu) | 0x43004300u, (low & 0x00800080u) | 0xc300c300u);
        } else {
          a[2 * i + h] = (w & 0x80008000u) | ((w >> SHIFT) & MASK);
        }
      }
    }
  } else {
    u32 w = J ? (M ? c.main[0].w : c.main[0].z) : (M ? c.main[0].y : c.main[0].x);
    a[0] = w & NIBBLE;
    a[1] = (w << 3) & NIBBLE;
    a[2] = ((w << 6) & 0x01C001C0u) | ((w << 2) & 0x80008000u);
    a[3] = ((w >> 3) & 0x01C001C0u) | ((w << 1) & 0x80008000u);
    if constexpr (BITS == 6) {
      u32 r = J ? c.rest[0].y : c.rest[0].x;
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] |= pick(r, REST_LEFT(4 * M + i), LOW);
    }
  }
}

// float16 hidden states want weights as float16 has them.
DI u32 round2_to_half(u32 w) {
  return to_bf16x2(round_to_half(of_bf16(w & 0xffffu)), round_to_half(__uint_as_float(w & 0xffff0000u)));
}

template <int J, int M> DI void fragment(const Codes& c, u32 even, u32 odd, u32 (&a)[4]) {
  patterns<J, M>(c, a);
  a[0] = multiply2(a[0], twice<J>(even));
  a[1] = multiply2(a[1], twice<J>(odd));
  a[2] = multiply2(a[2], twice<J>(even));
  a[3] = multiply2(a[3], twice<J>(odd));
  if constexpr (HIDDEN == 1) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = round2_to_half(a[i]);
  }
}

// ---- inputs --------------------------------------------------------------------------------------------------------

DI float power_of_two(int e) { return __uint_as_float((u32)(e + 127) << 23); }

#if QDQ == 1
// The shared scale of a block, as what its values are multiplied by: in two factors, both normal numbers.
struct SharedScale {
  float to1, to2, from1, from2;

  // The scale byte of a block whose largest magnitude has these bits.
  DI static int of(u32 amax) {
    int field = (int)((amax + RULE_CARRY) >> 23);
    return field >= RULE_OVERFLOW ? 254 : min(max(field - RULE_OFFSET, 0), 254);
  }
  DI explicit SharedScale(u32 amax) {
    int e = 127 - of(amax), e1 = e >> 1, e2 = e - e1;
    to1 = power_of_two(e1), to2 = power_of_two(e2), from1 = power_of_two(-e1), from2 = power_of_two(-e2);
  }
  // The element that a finite value becomes.
  DI float quantize_element(float x) const {
    float m = fabsf(x) * to1 * to2;
    int top = min(max((int)(__float_as_uint(m) >> 23) - 127, RULE_EMIN), RULE_ETOP);
    float magic = power_of_two(top + 23 - RULE_MANTISSA);  // its unit in the last place is the element's
    return copysignf(fminf((m + magic) - magic, __uint_as_float(RULE_LARGEST)), x);
  }
  // A finite value, quantised and back.
  DI float quantize(float x) const { return quantize_element(x) * from1 * from2; }
};
#endif

// E4M3, the nearest, ties to even, saturating; NaN stays.
DI float quantize_fp8(float x, float scale) {
  float v = __fdiv_rn(x, scale), m = fminf(fabsf(v), 448.f);
  int top = max((int)(__float_as_uint(m) >> 23) - 127, -6);
  float magic = __uint_as_float((u32)(top + 147) << 23);
  float q = (m + magic) - magic;
  return v != v ? v : copysignf(q, v) * scale;
}

// ---- between the projections ---------------------------------------------------------------------------------------

// float32 hidden states show what float arithmetic would lose where an exponential is tiny.
#if HIDDEN == 2
typedef double real;
#else
typedef float real;
#endif

DI bool given(float c) { return c == c; }
DI real clamp_above(real x, real most) { return x > most ? most : x; }  // NaN stays
DI real clamp_both(real x, real most) { return x > most ? most : x < -most ? -most : x; }
#if HIDDEN == 0
// x * sigmoid(z) by two instructions' approximations, which bf16 does not show.
DI float times_sigmoid(float x, float z) {
  const float scaled = z * 1.4426950408889634f;
  float e, y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(e) : "f"(z > -80.f ? -scaled : scaled));  // e^z where 1 + e^-z would be too large
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(1.f + e));
  return x * (z > -80.f ? y : e);
}
#else
// x * sigmoid(z); the exponential neither overflows nor underflows before the result does.
DI real times_sigmoid(real x, real z) {
  if (z >= 0) return x / (1 + exp(-z));
  real e = exp(z / 2);
  return x * e * e / (1 + e * e);
}
#endif
DI real gelu(real x) { return x * erfc(x * (real)-0.70710678118654752) / 2; }
DI real gelu_tanh(real x) { return times_sigmoid(x, (real)1.5957691216057308 * (x + (real)0.044715 * x * x * x)); }
DI real relu2(real x) { return x < 0 ? 0 : x * x; }

// FUNCTION: 0 silu, 1 gelu, 2 gelu_tanh, 3 relu2, 4 swigluoai, 5 situ, 6 swiglustep
DI float activate(float gate, float up, const Constants& c) {
  real g = gate, u = up;
  if (FUNCTION == 5) {
    if (given(c.linear_beta)) u = (real)c.linear_beta * tanh(u / (real)c.linear_beta);
    return (float)(times_sigmoid((real)c.beta * tanh(g / (real)c.beta), g) * u);
  }
  if (given(c.limit)) u = clamp_both(u, c.limit);
  if (FUNCTION == 6) return (float)(clamp_above(times_sigmoid(g, g), c.limit) * u);
  if (given(c.limit)) g = clamp_above(g, c.limit);
  if (FUNCTION == 4) return (float)(times_sigmoid(g, (real)c.alpha * g) * (u + (real)c.beta));
  real a = FUNCTION == 0 ? times_sigmoid(g, g) : FUNCTION == 1 ? gelu(g) : FUNCTION == 2 ? gelu_tanh(g) : relu2(g);
  return (float)(GATED ? a * u : a);
}
