/* Sixteen numbers side by side in one register of AVX512; `avx2.h` has the same words for two registers of AVX2. */
#ifndef DOVETAIL_AVX512_H
#define DOVETAIL_AVX512_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifdef DOVETAIL_BF16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16")))
#else
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#endif
#define INLINE static inline __attribute__((always_inline)) TARGET

enum {
  WIDE = 1,         /* 32 registers of 16 numbers */
  SIDE_BY_SIDE = 4, /* inputs of 8-bit weights whose products are added in one step */
  ZERO_POINT = 128, /* of 8-bit weights */
};

typedef __m512 Floats;  /* 16 in float32 */
typedef __m512i Ints;   /* 16 of 32 bits, or smaller ones in the same places */
typedef __m256i Halves; /* 16 of 16 bits */
typedef __mmask16 Lanes; /* a bit for each of 16 numbers */

INLINE Floats every(float value) { return _mm512_set1_ps(value); }
INLINE Floats zeros(void) { return _mm512_setzero_ps(); }
INLINE Floats load_floats(const float *from) { return _mm512_loadu_ps(from); }
INLINE Floats load_lanes(const float *from, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
INLINE void store_floats(float *to, Floats values) { _mm512_storeu_ps(to, values); }
INLINE void store_lanes(float *to, Lanes lanes, Floats values) { _mm512_mask_storeu_ps(to, lanes, values); }
INLINE Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats less(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats over(Floats a, Floats b) { return _mm512_div_ps(a, b); }
INLINE Floats root(Floats a) { return _mm512_sqrt_ps(a); }
INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats times_plus(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats minus_times(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a b */
INLINE float sum_of(Floats a) { return _mm512_reduce_add_ps(a); }
INLINE float most_of(Floats a) { return _mm512_reduce_max_ps(a); }

INLINE Ints bits_of(Floats a) { return _mm512_castps_si512(a); }
INLINE Floats floats_of(Ints a) { return _mm512_castsi512_ps(a); }
INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
INLINE Ints every_int(int32_t value) { return _mm512_set1_epi32(value); }
INLINE Ints every_byte(char value) { return _mm512_set1_epi8(value); }
INLINE Ints zero_ints(void) { return _mm512_setzero_si512(); }
INLINE Ints load_ints(const void *from) { return _mm512_loadu_si512(from); }
INLINE void store_ints(void *to, Ints values) { _mm512_storeu_si512(to, values); }
INLINE Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
INLINE Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
INLINE Ints differing(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
INLINE Ints plus_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE Ints larger_ints(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
INLINE Ints up_16(Ints a) { return _mm512_slli_epi32(a, 16); }
INLINE Ints down_16(Ints a) { return _mm512_srli_epi32(a, 16); }
INLINE Ints down_4(Ints a) { return _mm512_srli_epi16(a, 4); } /* of each 16 bits */
INLINE int32_t sum_of_ints(Ints a) { return _mm512_reduce_add_epi32(a); }
INLINE int32_t most_of_ints(Ints a) { return _mm512_reduce_max_epi32(a); }

INLINE Ints from_halves(Halves bits) { return _mm512_cvtepu16_epi32(bits); }
INLINE Halves to_halves(Ints values) { return _mm512_cvtepi32_epi16(values); } /* of numbers below 2^16 */
INLINE Halves load_halves(const void *from, Lanes lanes) { return _mm256_maskz_loadu_epi16(lanes, from); }
INLINE void store_halves(void *to, Lanes lanes, Halves values) { _mm256_mask_storeu_epi16(to, lanes, values); }
/* Up to 32 numbers of 16 bits, zeros behind them. */
INLINE Ints load_all_halves(const void *from, long count) {
  const __mmask32 mask = count >= 32 ? 0xffffffffu : (__mmask32)((1ull << (count > 0 ? count : 0)) - 1);
  return _mm512_maskz_loadu_epi16(mask, from);
}

INLINE Lanes not_below(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); } /* so is NaN */
INLINE Lanes at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
INLINE Lanes above(Lanes lanes, Floats a, Floats b) { return _mm512_mask_cmp_ps_mask(lanes, a, b, _CMP_GT_OQ); }
INLINE Lanes not_zero(const uint8_t *from, Lanes lanes) {
  const __m128i bytes = _mm_maskz_loadu_epi8(lanes, from);
  return _mm_test_epi8_mask(bytes, bytes);
}
INLINE Floats choose(Lanes lanes, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, lanes, yes); }
INLINE Floats plus_lanes(Lanes lanes, Floats a, Floats b) { return _mm512_mask_add_ps(a, lanes, a, b); }
INLINE Floats larger_lanes(Lanes lanes, Floats a, Floats b) { return _mm512_mask_max_ps(a, lanes, a, b); }
/* The chosen numbers one after the other, the first of them in lane `at`, around the end; zeros elsewhere. */
INLINE Floats gather_from(Floats values, Lanes chosen, int at) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_permutexvar_ps(_mm512_sub_epi32(lanes, _mm512_set1_epi32(at)), _mm512_maskz_compress_ps(chosen, values));
}

/* To the next integer. */
INLINE Floats nearest(Floats a) { return _mm512_roundscale_ps(a, 8); }
/* y 2^n for whole n from -126 to 127; 0 in other lanes. */
INLINE Floats scale_by_power(Lanes lanes, Floats y, Floats n) { return _mm512_maskz_scalef_ps(lanes, y, n); }

/* Sixteen columns of 8-bit weights of as many inputs as stand side by side. */
INLINE Ints load_columns(const uint8_t *from) { return load_ints(from); }
/* Products of 8-bit weights and levels are added. In assembly, since compilers move the sums from register to register. */
INLINE Ints add_products(Ints sums, Ints weights, Ints levels) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(levels));
  return sums;
}
/* The same for the 4-bit weights of a group, whose sums are then finished by `whole_sums`. */
INLINE Ints add_small_products(Ints sums, Ints weights, Ints levels) { return add_products(sums, weights, levels); }
INLINE Ints whole_sums(Ints sums) { return sums; }
/* Levels -128..127 of numbers in whose lowest byte they stand with zero point 128. */
INLINE Ints to_levels(Ints values) {
  return _mm512_cvtepi8_epi32(_mm_xor_si128(_mm512_cvtepi32_epi8(values), _mm_set1_epi8((char)0x80)));
}
/* Levels of 16 inputs, `side` of them (always four here) in four bytes. */
INLINE void pack_levels(Ints levels, int side, int32_t packed[8]) {
  (void)side;
  _mm_storeu_si128((__m128i *)packed, _mm512_cvtepi32_epi8(levels));
}

#ifdef DOVETAIL_BF16
/* Sixteen pairs of bf16 numbers, whose products are added in as many parts as PAIR_PARTS. */
enum { PAIR_PARTS = 1 };
typedef Ints Pairs;
INLINE Pairs load_pairs_part(const void *from, int part) { return (void)part, load_ints(from); }
INLINE Pairs every_pair_part(const void *from, int part) {
  int32_t bits;
  memcpy(&bits, from, 4);
  return (void)part, every_int(bits);
}
/* The two products of each lane are added, that of the pair's first ones first. Assembly: as `add_products`. */
INLINE Floats add_pairs(Floats sums, Pairs weights, Pairs pairs) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(pairs));
  return sums;
}
#endif

/* 16 x 16 numbers of 32 bits. */
INLINE void transpose(Ints block[16]) {
  Ints other[16];
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_epi32(block[i], block[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(block[i], block[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    block[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
    block[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
    block[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
    block[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
  }
  for (int half = 0; half < 16; half += 8)
    for (int i = half; i < half + 4; i++) {
      other[i] = _mm512_shuffle_i32x4(block[i], block[i + 4], 0x88);
      other[i + 4] = _mm512_shuffle_i32x4(block[i], block[i + 4], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    block[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
    block[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
  }
}

#endif
