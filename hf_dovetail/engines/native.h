/* What the kernels share: torch's threads, and numbers in bf16. */
#ifndef DOVETAIL_NATIVE_H
#define DOVETAIL_NATIVE_H

#include <stdint.h>

#ifdef DOVETAIL_AVX2
#include "avx2.h"
#else
#include "avx512.h"
#endif

/* Functions of torch's own OpenMP library, handed over by dovetail_use_threads: no second library, no second pool. */
extern void (*dovetail_parallel)(void (*)(void *), void *, unsigned, unsigned);
extern int (*dovetail_thread_number)(void), (*dovetail_team_size)(void);
extern void (*dovetail_barrier)(void);

INLINE Floats widen(Halves bits) { return floats_of(up_16(from_halves(bits))); }

/* To bf16, to nearest even; not vcvtneps2bf16, which loses denormal numbers and is not on every CPU. NaN stays NaN if
 * it comes from a bf16 number, or is the default one: it has no lower bits then that a carry could start from. */
INLINE Halves narrow(Floats values) {
  const Ints bits = bits_of(values), odd = both(down_16(bits), every_int(1));
  return to_halves(down_16(plus_ints(bits, plus_ints(odd, every_int(0x7fff)))));
}

/* The lanes of a vector that `count` numbers fill. */
INLINE Lanes first(long count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (Lanes)((1u << count) - 1); }

/* Up to 16 numbers in float32, zeros behind them. */
INLINE Floats load(const void *from, long at, long count, int bf16) {
  if (bf16) return widen(load_halves((const uint16_t *)from + at, first(count)));
  return load_lanes((const float *)from + at, first(count));
}

INLINE void store(void *to, long at, long count, int bf16, Floats values) {
  if (bf16) store_halves((uint16_t *)to + at, first(count), narrow(values));
  else store_lanes((float *)to + at, first(count), values);
}

/* The four bytes at an address, in every lane. */
INLINE Ints four_bytes(const void *from) {
  int32_t bits;
  memcpy(&bits, from, 4);
  return every_int(bits);
}

/* exp(x) for x <= 0, to about one unit in the last place; 0 where it would be denormal; NaN stays NaN. */
INLINE Floats exponential(Floats x) {
  const Lanes normal = not_below(x, every(-87.0f));
  const Floats n = nearest(times(x, every(1.44269504f)));
  Floats r = minus_times(n, every(0.693359375f), x);
  r = minus_times(n, every(-2.12194440e-4f), r);
  Floats y = every(1.9875691500e-4f);
  y = times_plus(y, r, every(1.3981999507e-3f));
  y = times_plus(y, r, every(8.3334519073e-3f));
  y = times_plus(y, r, every(4.1665795894e-2f));
  y = times_plus(y, r, every(1.6666665459e-1f));
  y = times_plus(y, r, every(5.0000001201e-1f));
  y = plus(times_plus(times(y, r), r, r), every(1.0f));
  return scale_by_power(normal, y, n);
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
