/* What the kernels share: torch's threads, and numbers in bf16. For CPUs with AVX512. */
#ifndef DOVETAIL_NATIVE_H
#define DOVETAIL_NATIVE_H

#include <immintrin.h>
#include <stdint.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define INLINE static inline __attribute__((always_inline)) TARGET

/* Functions of torch's own OpenMP library, handed over by dovetail_use_threads: no second library, no second pool. */
extern void (*dovetail_parallel)(void (*)(void *), void *, unsigned, unsigned);
extern int (*dovetail_thread_number)(void), (*dovetail_team_size)(void);
extern void (*dovetail_barrier)(void);

INLINE __m512 widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

/* To bf16, to nearest even; not vcvtneps2bf16, which loses denormal numbers and is not on every CPU. NaN stays NaN if
 * it comes from a bf16 number, or is the default one: it has no lower bits then that a carry could start from. */
INLINE __m256i narrow(__m512 values) {
  __m512i bits = _mm512_castps_si512(values);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

/* The lanes of a vector that `count` numbers fill. */
INLINE __mmask16 first(long count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1); }

/* Up to 16 numbers in float32, zeros behind them. */
INLINE __m512 load(const void *from, long at, long count, int bf16) {
  if (bf16) return widen(_mm256_maskz_loadu_epi16(first(count), (const uint16_t *)from + at));
  return _mm512_maskz_loadu_ps(first(count), (const float *)from + at);
}

INLINE void store(void *to, long at, long count, int bf16, __m512 values) {
  if (bf16) _mm256_mask_storeu_epi16((uint16_t *)to + at, first(count), narrow(values));
  else _mm512_mask_storeu_ps((float *)to + at, first(count), values);
}

/* exp(x) for x <= 0, to about one unit in the last place; 0 where it would be denormal; NaN stays NaN. */
INLINE __m512 exponential(__m512 x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.9875691500e-4f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
  y = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(y, r), r, r), _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(normal, y, n);
}

/* The kernels that a layer consists of; each says in its own file what it takes. threads: the most that it may use. */
void dovetail_product(const void *rows, void *output, const void *weights, const float *scales, void *scratch,
                      long count, long width, long inputs, long outputs, int bf16, int four, int threads);
long dovetail_scratch(long inputs, int four); /* bytes that dovetail_product needs of `scratch` */
void dovetail_bf16_product(const void *rows, void *output, const void *weights, const void *bias, long count,
                           long inputs, long outputs, int threads) __attribute__((weak));
void dovetail_norm(const void *input, void *output, const void *weight, long rows, long width, long step, float epsilon,
                   int bf16, int threads);
void dovetail_rotary(const void *queries, void *turned_queries, long query_heads, long query_step, const void *keys,
                     void *turned_keys, long key_heads, long key_step, const void *cosines, const void *sines, long rows,
                     long positions, long width, int bf16, int threads);
void dovetail_attention(const void *query, const void *key, const void *value, const void *mask, void *output,
                        float *scratch, const long *sizes, const long *steps, float scale, int mask_kind, int bf16,
                        int threads);
long dovetail_attention_scratch(long keys, long width);
void dovetail_activation(const void *input, const void *factor, void *output, long rows, long width, long step,
                         long factor_step, float linear, float cubic, int bf16, int threads);

#endif
