/* Sixteen numbers side by side in two registers of AVX2; the words of `avx512.h`, with the same results. With
 * DOVETAIL_AVX_VNNI, products of 8-bit weights are those of AVX-VNNI. */
#ifndef DOVETAIL_AVX2_H
#define DOVETAIL_AVX2_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifdef DOVETAIL_AVX_VNNI
#define TARGET __attribute__((target("avx2,fma,bmi,popcnt,avxvnni")))
#else
#define TARGET __attribute__((target("avx2,fma,bmi,popcnt")))
#endif
#define INLINE static inline __attribute__((always_inline)) TARGET

enum {
  WIDE = 0, /* 16 registers of 8 numbers */
#ifdef DOVETAIL_AVX_VNNI
  SIDE_BY_SIDE = 4, /* inputs of 8-bit weights whose products are added in one step */
  ZERO_POINT = 128, /* of 8-bit weights */
#else
  SIDE_BY_SIDE = 2,
  ZERO_POINT = 0,
#endif
};

typedef struct { __m256 low, high; } Floats;  /* 16 in float32 */
typedef struct { __m256i low, high; } Ints;   /* 16 of 32 bits, or smaller ones in the same places */
typedef __m256i Halves;                       /* 16 of 16 bits */
typedef uint32_t Lanes;                       /* a bit for each of 16 numbers */

#define ON_FLOATS(name, operation) \
  INLINE Floats name(Floats a, Floats b) { return (Floats){operation(a.low, b.low), operation(a.high, b.high)}; }
#define ON_INTS(name, operation) \
  INLINE Ints name(Ints a, Ints b) { return (Ints){operation(a.low, b.low), operation(a.high, b.high)}; }

/* Lanes from `at` on as masks of eight numbers. */
INLINE __m256i spread(Lanes lanes, int at) {
  const __m256i bits = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)(lanes >> at)), bits), bits);
}

INLINE Floats every(float value) { return (Floats){_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
INLINE Floats zeros(void) { return (Floats){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Floats load_floats(const float *from) { return (Floats){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
INLINE Floats load_lanes(const float *from, Lanes lanes) {
  if (lanes == 0xffff) return load_floats(from);
  return (Floats){_mm256_maskload_ps(from, spread(lanes, 0)), _mm256_maskload_ps(from + 8, spread(lanes, 8))};
}
INLINE void store_floats(float *to, Floats values) {
  _mm256_storeu_ps(to, values.low);
  _mm256_storeu_ps(to + 8, values.high);
}
INLINE void store_lanes(float *to, Lanes lanes, Floats values) {
  if (lanes == 0xffff) {
    store_floats(to, values);
  } else {
    _mm256_maskstore_ps(to, spread(lanes, 0), values.low);
    _mm256_maskstore_ps(to + 8, spread(lanes, 8), values.high);
  }
}
ON_FLOATS(plus, _mm256_add_ps)
ON_FLOATS(less, _mm256_sub_ps)
ON_FLOATS(times, _mm256_mul_ps)
ON_FLOATS(over, _mm256_div_ps)
ON_FLOATS(larger, _mm256_max_ps)
INLINE Floats root(Floats a) { return (Floats){_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
INLINE Floats times_plus(Floats a, Floats b, Floats c) {
  return (Floats){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE Floats minus_times(Floats a, Floats b, Floats c) { /* c - a b */
  return (Floats){_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
INLINE float sum_of(Floats a) { /* in the order of AVX512's */
  const __m256 eight = _mm256_add_ps(a.high, a.low);
  const __m128 four = _mm_add_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(two) + _mm_cvtss_f32(_mm_movehdup_ps(two));
}
INLINE float most_of(Floats a) {
  const __m256 eight = _mm256_max_ps(a.high, a.low);
  const __m128 four = _mm_max_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

INLINE Ints bits_of(Floats a) { return (Ints){_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
INLINE Floats floats_of(Ints a) { return (Floats){_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
INLINE Floats to_floats(Ints a) { return (Floats){_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
INLINE Ints every_int(int32_t value) { return (Ints){_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
INLINE Ints every_byte(char value) { return (Ints){_mm256_set1_epi8(value), _mm256_set1_epi8(value)}; }
INLINE Ints zero_ints(void) { return (Ints){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE Ints load_ints(const void *from) {
  return (Ints){_mm256_loadu_si256(from), _mm256_loadu_si256((const __m256i *)from + 1)};
}
INLINE void store_ints(void *to, Ints values) {
  _mm256_storeu_si256(to, values.low);
  _mm256_storeu_si256((__m256i *)to + 1, values.high);
}
ON_INTS(both, _mm256_and_si256)
ON_INTS(either, _mm256_or_si256)
ON_INTS(differing, _mm256_xor_si256)
ON_INTS(plus_ints, _mm256_add_epi32)
ON_INTS(larger_ints, _mm256_max_epi32)
INLINE Ints up_16(Ints a) { return (Ints){_mm256_slli_epi32(a.low, 16), _mm256_slli_epi32(a.high, 16)}; }
INLINE Ints down_16(Ints a) { return (Ints){_mm256_srli_epi32(a.low, 16), _mm256_srli_epi32(a.high, 16)}; }
INLINE Ints down_4(Ints a) { return (Ints){_mm256_srli_epi16(a.low, 4), _mm256_srli_epi16(a.high, 4)}; }
INLINE int32_t sum_of_ints(Ints a) {
  const __m256i eight = _mm256_add_epi32(a.low, a.high);
  const __m128i four = _mm_add_epi32(_mm256_extracti128_si256(eight, 1), _mm256_castsi256_si128(eight));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
}
INLINE int32_t most_of_ints(Ints a) {
  const __m256i eight = _mm256_max_epi32(a.low, a.high);
  const __m128i four = _mm_max_epi32(_mm256_extracti128_si256(eight, 1), _mm256_castsi256_si128(eight));
  const __m128i two = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 1)));
}

INLINE Ints from_halves(Halves bits) {
  const __m128i low = _mm256_castsi256_si128(bits), high = _mm256_extracti128_si256(bits, 1);
  return (Ints){_mm256_cvtepu16_epi32(low), _mm256_cvtepu16_epi32(high)};
}
INLINE Halves to_halves(Ints values) { /* of numbers below 2^16 */
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(values.low, values.high), 0xd8);
}
INLINE Halves load_halves(const void *from, Lanes lanes) { /* the first ones */
  Halves values = _mm256_setzero_si256();
  if (lanes == 0xffff) return _mm256_loadu_si256(from);
  memcpy(&values, from, 2 * (size_t)__builtin_popcount(lanes));
  return values;
}
INLINE void store_halves(void *to, Lanes lanes, Halves values) { /* the first ones */
  if (lanes == 0xffff) _mm256_storeu_si256(to, values);
  else memcpy(to, &values, 2 * (size_t)__builtin_popcount(lanes));
}
/* Up to 32 numbers of 16 bits, zeros behind them. */
INLINE Ints load_all_halves(const void *from, long count) {
  Ints values = zero_ints();
  if (count >= 32) return load_ints(from);
  if (count > 0) memcpy(&values, from, 2 * (size_t)count);
  return values;
}

INLINE Lanes signs_of(__m256 low, __m256 high) {
  return (Lanes)_mm256_movemask_ps(low) | (Lanes)_mm256_movemask_ps(high) << 8;
}
INLINE Lanes not_below(Floats a, Floats b) { /* so is NaN */
  return signs_of(_mm256_cmp_ps(a.low, b.low, _CMP_NLT_UQ), _mm256_cmp_ps(a.high, b.high, _CMP_NLT_UQ));
}
INLINE Lanes at_least(Floats a, Floats b) {
  return signs_of(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ));
}
INLINE Lanes above(Lanes lanes, Floats a, Floats b) {
  return lanes & signs_of(_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ));
}
INLINE Lanes not_zero(const uint8_t *from, Lanes lanes) { /* the first ones */
  __m128i bytes = _mm_setzero_si128();
  if (lanes == 0xffff) bytes = _mm_loadu_si128((const __m128i *)from);
  else memcpy(&bytes, from, (size_t)__builtin_popcount(lanes));
  return 0xffff & ~(Lanes)_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()));
}
INLINE Floats choose(Lanes lanes, Floats yes, Floats no) {
  return (Floats){_mm256_blendv_ps(no.low, yes.low, _mm256_castsi256_ps(spread(lanes, 0))),
                  _mm256_blendv_ps(no.high, yes.high, _mm256_castsi256_ps(spread(lanes, 8)))};
}
INLINE Floats plus_lanes(Lanes lanes, Floats a, Floats b) { return choose(lanes, plus(a, b), a); }
INLINE Floats larger_lanes(Lanes lanes, Floats a, Floats b) { return choose(lanes, larger(a, b), a); }
/* The chosen numbers one after the other, the first of them in lane `at`, around the end; zeros elsewhere. */
INLINE Floats gather_from(Floats values, Lanes chosen, int at) {
  float given[16], found[16] = {0};
  store_floats(given, values);
  for (; chosen; chosen &= chosen - 1, at++) found[at & 15] = given[__builtin_ctz(chosen)];
  return load_floats(found);
}

/* To the next integer. */
INLINE Floats nearest(Floats a) { return (Floats){_mm256_round_ps(a.low, 8), _mm256_round_ps(a.high, 8)}; }
INLINE __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
/* y 2^n for whole n from -126 to 127; 0 in other lanes. */
INLINE Floats scale_by_power(Lanes lanes, Floats y, Floats n) {
  return choose(lanes, times(y, (Floats){power_of_two(n.low), power_of_two(n.high)}), zeros());
}

#ifdef DOVETAIL_AVX_VNNI
/* Sixteen columns of 8-bit weights of as many inputs as stand side by side. */
INLINE Ints load_columns(const uint8_t *from) { return load_ints(from); }
/* Products of 8-bit weights and levels are added. */
INLINE Ints add_products(Ints sums, Ints weights, Ints levels) {
  return (Ints){_mm256_dpbusd_avx_epi32(sums.low, weights.low, levels.low),
                _mm256_dpbusd_avx_epi32(sums.high, weights.high, levels.high)};
}
/* The same for the 4-bit weights of a group, whose sums are then finished by `whole_sums`. */
INLINE Ints add_small_products(Ints sums, Ints weights, Ints levels) { return add_products(sums, weights, levels); }
INLINE Ints whole_sums(Ints sums) { return sums; }
#else
/* Sixteen columns of 8-bit weights of as many inputs as stand side by side, in 16 bits: products of 8 bits with a sign
 * and of 8 without could not be added in 16. */
INLINE Ints load_columns(const uint8_t *from) {
  return (Ints){_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from)),
                _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from + 1))};
}
/* Products of 8-bit weights and levels are added. */
INLINE Ints add_products(Ints sums, Ints weights, Ints levels) {
  return (Ints){_mm256_add_epi32(sums.low, _mm256_madd_epi16(weights.low, levels.low)),
                _mm256_add_epi32(sums.high, _mm256_madd_epi16(weights.high, levels.high))};
}
/* The same for the 4-bit weights of a group: 16 products of 15 and 128 at most fit 16 bits. Finished by `whole_sums`. */
INLINE Ints add_small_products(Ints sums, Ints weights, Ints levels) {
  return (Ints){_mm256_add_epi16(sums.low, _mm256_maddubs_epi16(weights.low, levels.low)),
                _mm256_add_epi16(sums.high, _mm256_maddubs_epi16(weights.high, levels.high))};
}
INLINE Ints whole_sums(Ints sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  return (Ints){_mm256_madd_epi16(sums.low, ones), _mm256_madd_epi16(sums.high, ones)};
}
#endif
/* Levels -128..127 of numbers in whose lowest byte they stand with zero point 128. */
INLINE Ints to_levels(Ints values) {
  const __m256i byte = _mm256_set1_epi32(255), zero = _mm256_set1_epi32(128);
  return (Ints){_mm256_sub_epi32(_mm256_and_si256(values.low, byte), zero),
                _mm256_sub_epi32(_mm256_and_si256(values.high, byte), zero)};
}
/* Levels of 16 inputs, `side` of them (two or four) in four bytes. */
INLINE void pack_levels(Ints levels, int side, int32_t packed[8]) {
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(levels.low, levels.high), 0xd8);
  if (side == 2) {
    _mm256_storeu_si256((__m256i *)packed, halves);
  } else {
    const __m128i low = _mm256_castsi256_si128(halves), high = _mm256_extracti128_si256(halves, 1);
    _mm_storeu_si128((__m128i *)packed, _mm_packs_epi16(low, high));
  }
}

/* Sixteen pairs of bf16 numbers, whose products are added in as many parts as PAIR_PARTS: first those of the pairs' first
 * numbers. The second ones are read anew, since there are no registers to keep them in. */
enum { PAIR_PARTS = 2 };
typedef Floats Pairs;
INLINE Pairs part_of_pairs(Ints pairs, int part) {
  return floats_of(part ? both(pairs, every_int((int)0xffff0000)) : up_16(pairs));
}
INLINE Pairs load_pairs_part(const void *from, int part) {
  __asm__ volatile("" : "+r"(from));
  return part_of_pairs(load_ints(from), part);
}
INLINE Pairs every_pair_part(const void *from, int part) {
  int32_t bits;
  __asm__ volatile("" : "+r"(from));
  memcpy(&bits, from, 4);
  return part_of_pairs(every_int(bits), part);
}
/* In assembly, since compilers move the sums from register to register. */
INLINE Floats add_pairs(Floats sums, Pairs weights, Pairs pairs) {
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(sums.low) : "x"(weights.low), "x"(pairs.low));
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(sums.high) : "x"(weights.high), "x"(pairs.high));
  return sums;
}

INLINE void transpose_eight(__m256i block[8]) {
  __m256i other[8];
  for (int i = 0; i < 8; i += 2) {
    other[i] = _mm256_unpacklo_epi32(block[i], block[i + 1]);
    other[i + 1] = _mm256_unpackhi_epi32(block[i], block[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    block[i] = _mm256_unpacklo_epi64(other[i], other[i + 2]);
    block[i + 1] = _mm256_unpackhi_epi64(other[i], other[i + 2]);
    block[i + 2] = _mm256_unpacklo_epi64(other[i + 1], other[i + 3]);
    block[i + 3] = _mm256_unpackhi_epi64(other[i + 1], other[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    other[i] = _mm256_permute2x128_si256(block[i], block[i + 4], 0x20);
    other[i + 4] = _mm256_permute2x128_si256(block[i], block[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) block[i] = other[i];
}
/* 16 x 16 numbers of 32 bits. */
INLINE void transpose(Ints block[16]) {
  for (int column = 0; column < 2; column++)
    for (int row = column; row < 2; row++) {
      __m256i a[8], b[8];
      for (int i = 0; i < 8; i++) {
        a[i] = column ? block[8 * row + i].high : block[8 * row + i].low;
        b[i] = row ? block[8 * column + i].high : block[8 * column + i].low;
      }
      transpose_eight(a);
      if (row != column) transpose_eight(b);
      for (int i = 0; i < 8; i++) {
        if (row) block[8 * column + i].high = a[i];
        else block[8 * column + i].low = a[i];
        if (row == column) continue;
        if (column) block[8 * row + i].high = b[i];
        else block[8 * row + i].low = b[i];
      }
    }
}

#undef ON_FLOATS
#undef ON_INTS

#endif
