/* Attention of few rows over many keys, in an order that does not know trees.
 *
 * What a row gets depends, bit for bit, on the keys and values that it sees and on their order alone: not on how many
 * rows are computed with it, nor on the places of keys that it does not see. A node of a tree therefore gets what
 * plain decoding gets at its position. To that end
 * - a score is summed over the width, one product after the other, in a lane of its own;
 * - exponents are summed in 16 lanes, a visible key's by its number among the visible ones;
 * - values are summed key by key; a key that is not seen has the weight 0 and adds nothing.
 * A row that sees no key (padding, in a batch) gets zeros, as from torch's sdpa.
 * All sums are float32.
 */
#include <math.h>

#include "native.h"

enum {
  ALONE = 1 << 17, /* products below which waking other threads costs more than they save */
  KEYS = 32,  /* of a block: two vectors */
  FETCHED = 1 << 18, /* bytes of a head's values that stay in the cache until they are needed */
  TOGETHER = 32, /* rows that share the transposed keys */
  TILE = 8,   /* rows multiplied with a block of keys */
  SUMS = 12,  /* rows whose values are summed together; half as many where a value is wider than two vectors */
};

enum { NO_MASK, BOOL_MASK, ADDED_MASK };

typedef struct {
  const void *query, *key, *value, *mask;
  void *output;               /* (batch, rows, heads, value_width) */
  long batch, heads, groups, rows, keys, width, value_width;
  long query_steps[3];        /* numbers from one to the next: batch, head, row */
  long key_steps[3], value_steps[3]; /* batch, group, key */
  long mask_steps[2];         /* batch, row */
  float scale;
  int mask_kind, bf16, threads;
  float *scratch;             /* scratch_size of each thread */
} Attention;

static long padded(long count, long to) { return (count + to - 1) / to * to; }
static long score_stride(long keys) { return padded(keys, KEYS) + 16; }

static long scratch_size(long keys, long width) {
  return TOGETHER * (score_stride(keys) + padded(width, 32) + 1) + padded(width, 32) * KEYS;
}

INLINE void transpose(__m512i block[16]) {
  __m512i other[16];
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

/* Fetches rows of keys or values into the cache, up to KEYS of them. */
INLINE void fetch(const Attention *a, const void *from, long start, long step, long count, long width) {
  const long size = a->bf16 ? 2 : 4;
  const char *at = (const char *)from + start * size;
  for (long i = 0; i < count && i < KEYS; i++, at += step * size)
    for (long byte = 0; byte < width * size; byte += 64) _mm_prefetch(at + byte, _MM_HINT_T0);
}

/* (count <= KEYS, width) keys to (width, KEYS) float32; what is behind them is zero. */
TARGET static void turn_keys(const Attention *a, const void *keys, long start, long count, float *turned) {
  const __m512i high = _mm512_set1_epi32((int)0xffff0000);
  const long step = a->key_steps[2], across = a->bf16 ? 32 : 16;
  for (long column = 0; column < KEYS; column += 16)
    for (long at = 0; at < a->width; at += across) {
      __m512i block[16];
      for (long i = 0; i < 16; i++) {
        const long from = start + (column + i) * step + at, left = column + i < count ? a->width - at : 0;
        const __mmask32 mask = left >= 32 ? 0xffffffffu : (__mmask32)((1ull << (left > 0 ? left : 0)) - 1);
        const char *at_key = (const char *)keys + from * (a->bf16 ? 2 : 4);
        _mm_prefetch(at_key + KEYS * step * (a->bf16 ? 2 : 4), _MM_HINT_T0);
        block[i] = a->bf16 ? _mm512_maskz_loadu_epi16(mask, at_key)
                           : _mm512_castps_si512(_mm512_maskz_loadu_ps(first(left), at_key));
      }
      transpose(block);
      for (long i = 0; i < 16; i++) {
        if (a->bf16) {
          float *to = turned + (at + 2 * i) * KEYS + column;
          _mm512_storeu_ps(to, _mm512_castsi512_ps(_mm512_slli_epi32(block[i], 16)));
          _mm512_storeu_ps(to + KEYS, _mm512_castsi512_ps(_mm512_and_si512(block[i], high)));
        } else {
          _mm512_storeu_ps(turned + (at + i) * KEYS + column, _mm512_castsi512_ps(block[i]));
        }
      }
    }
}

/* Scores of a few rows with a block of keys. */
INLINE void score_tile(const Attention *a, const float *turned, const float *query, long query_step, float *scores,
                       long stride, const int rows) {
  __m512 sums[TILE][2];
  for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (long d = 0; d < a->width; d++) {
    const __m512 left = _mm512_loadu_ps(turned + d * KEYS), right = _mm512_loadu_ps(turned + d * KEYS + 16);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const __m512 factor = _mm512_set1_ps(query[r * query_step + d]);
      sums[r][0] = _mm512_fmadd_ps(factor, left, sums[r][0]);
      sums[r][1] = _mm512_fmadd_ps(factor, right, sums[r][1]);
    }
  }
  const __m512 scale = _mm512_set1_ps(a->scale);
  for (int r = 0; r < rows; r++) {
    _mm512_storeu_ps(scores + r * stride, _mm512_mul_ps(sums[r][0], scale));
    _mm512_storeu_ps(scores + r * stride + 16, _mm512_mul_ps(sums[r][1], scale));
  }
}

#define SCORES(rows) case rows: score_tile(a, turned, query, query_step, scores, stride, rows); break;

TARGET static void score_rows(const Attention *a, const float *turned, const float *query, long query_step,
                              float *scores, long stride, long rows) {
  for (; rows > 0; rows -= TILE, query += TILE * query_step, scores += TILE * stride)
    switch (rows < TILE ? rows : TILE) { SCORES(1) SCORES(2) SCORES(3) SCORES(4) SCORES(5) SCORES(6) SCORES(7) SCORES(8) }
}

/* What is added to the scores of up to 16 keys. */
INLINE __m512 bias(const Attention *a, const void *mask, long at, long count) {
  if (a->mask_kind == ADDED_MASK) return load(mask, at, count, a->bf16);
  const __m128i seen = _mm_maskz_loadu_epi8(first(count), (const uint8_t *)mask + at);
  return _mm512_mask_mov_ps(_mm512_set1_ps(-3.38e38f), _mm_test_epi8_mask(seen, seen), _mm512_setzero_ps());
}

/* Which of up to 16 keys are seen. */
INLINE __mmask16 sees(const Attention *a, const void *mask, long at, long count) {
  if (a->mask_kind == NO_MASK) return first(count);
  if (a->mask_kind == ADDED_MASK)
    return _mm512_mask_cmp_ps_mask(first(count), load(mask, at, count, a->bf16), _mm512_set1_ps(-1e30f), _CMP_GT_OQ);
  const __m128i seen = _mm_maskz_loadu_epi8(first(count), (const uint8_t *)mask + at);
  return _mm_test_epi8_mask(seen, seen);
}

/* Adds what the mask says to the scores from `begin` to `end`, and finds the largest of each lane. */
INLINE __m512 add_bias(const Attention *a, const void *mask, float *scores, long begin, long end, __m512 most) {
  for (long at = begin; at < end; at += 16) {
    const __mmask16 there = first(end - at);
    __m512 score = _mm512_maskz_loadu_ps(there, scores + at);
    if (a->mask_kind != NO_MASK) score = _mm512_add_ps(score, bias(a, mask, at, end - at));
    _mm512_mask_storeu_ps(scores + at, there, score);
    most = _mm512_mask_max_ps(most, there, most, score);
  }
  return most;
}

/* Scores to weights that are not yet divided by their sum, which is returned. */
TARGET static float soften(const Attention *a, const void *mask, float *scores) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const long keys = a->keys, old = keys - a->rows;
  long begin = 0;
  while (begin < keys && !sees(a, mask, begin, keys - begin)) begin += 16;
  if (begin >= keys) {
    for (long at = 0; at < keys; at++) scores[at] = 0.0f;
    return 1.0f;
  }
  begin += __builtin_ctz(sees(a, mask, begin, keys - begin));
  long plain = begin; /* up to here, all keys are seen */
  if (a->mask_kind != ADDED_MASK)
    while (plain + 16 <= old && sees(a, mask, plain, 16) == 0xffff) plain += 16;
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (long at = begin; at < plain; at += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + at));
  most = add_bias(a, mask, scores, plain, keys, most);
  const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  __m512 sums = _mm512_setzero_ps();
  long at = begin;
  for (; at + 16 <= old; at += 16) {
    const __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + at), largest));
    _mm512_storeu_ps(scores + at, weight);
    sums = _mm512_add_ps(sums, weight);
  }
  if (at < old) {
    const __mmask16 there = first(old - at);
    const __m512 weight = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(there, scores + at), largest));
    _mm512_mask_storeu_ps(scores + at, there, weight);
    sums = _mm512_mask_add_ps(sums, there, sums, weight);
  }
  /* each visible one of the rows' own keys goes to the lane of its number */
  long number = begin < old ? old - begin : 0;
  for (at = old > 0 ? old : 0; at < keys; at += 16) {
    const __mmask16 there = first(keys - at), seen = sees(a, mask, at, keys - at);
    const __m512 weight = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(there, scores + at), largest));
    _mm512_mask_storeu_ps(scores + at, there, weight);
    const __m512i from = _mm512_sub_epi32(lanes, _mm512_set1_epi32((int)(number & 15)));
    sums = _mm512_add_ps(sums, _mm512_permutexvar_ps(from, _mm512_maskz_compress_ps(seen, weight)));
    number += __builtin_popcount(seen);
  }
  for (at = 0; at < begin; at++) scores[at] = 0.0f;
  return _mm512_reduce_add_ps(sums);
}

/* Weighted sums of values, for a few rows and vectors of the width. */
INLINE void value_tile(const Attention *a, const void *values, const long left, const float *weights, long stride,
                       const float *sums, const long *outputs, long at, const int rows, const int vectors, const int bf16) {
  __m512 total[SUMS][4];
  __mmask16 there[4];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; v++) {
    there[v] = first(left - 16 * v);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) total[r][v] = _mm512_setzero_ps();
  }
  const char *value_at = values;
  for (long key = 0; key < a->keys; key++, value_at += a->value_steps[2] * (bf16 ? 2 : 4)) {
    __m512 value[4];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++)
      value[v] = bf16 ? widen(_mm256_maskz_loadu_epi16(there[v], value_at + 32 * v))
                      : _mm512_maskz_loadu_ps(there[v], value_at + 64 * v);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      const __m512 weight = _mm512_set1_ps(weights[r * stride + key]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) total[r][v] = _mm512_fmadd_ps(weight, value[v], total[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++)
      store(a->output, outputs[r] + at + 16 * v, left - 16 * v, bf16,
            _mm512_div_ps(total[r][v], _mm512_set1_ps(sums[r])));
}

#define SUM(rows, vectors)                                                                              \
  case rows:                                                                                            \
    if (a->bf16) value_tile(a, values, left, weights, stride, sums, outputs, at, rows, vectors, 1);     \
    else value_tile(a, values, left, weights, stride, sums, outputs, at, rows, vectors, 0);             \
    break;
#define SIX_SUMS(vectors) SUM(1, vectors) SUM(2, vectors) SUM(3, vectors) SUM(4, vectors) SUM(5, vectors) SUM(6, vectors)
#define TWELVE_SUMS(vectors) \
  SIX_SUMS(vectors) SUM(7, vectors) SUM(8, vectors) SUM(9, vectors) SUM(10, vectors) SUM(11, vectors) SUM(12, vectors)
#define ARGUMENTS                                                                                                     \
  const Attention *a, const void *values, long left, const float *weights, long stride, const float *sums,            \
      const long *outputs, long at, long rows
TARGET static void sum_one(ARGUMENTS) { switch (rows) { TWELVE_SUMS(1) } }
TARGET static void sum_two(ARGUMENTS) { switch (rows) { TWELVE_SUMS(2) } }
TARGET static void sum_three(ARGUMENTS) { switch (rows) { SIX_SUMS(3) } }
TARGET static void sum_four(ARGUMENTS) { switch (rows) { SIX_SUMS(4) } }

TARGET static void sum_values(const Attention *a, long start, const float *weights, long stride, const float *sums,
                              const long *outputs, long rows) {
  const long most = a->value_width > 32 ? SUMS / 2 : SUMS;
  for (; rows > 0; rows -= most, weights += most * stride, sums += most, outputs += most)
    for (long at = 0; at < a->value_width; at += 64) {
      const long left = a->value_width - at, now = rows < most ? rows : most;
      const void *values = (const char *)a->value + (start + at) * (a->bf16 ? 2 : 4);
      if (left > 48) sum_four(a, values, left, weights, stride, sums, outputs, at, now);
      else if (left > 32) sum_three(a, values, left, weights, stride, sums, outputs, at, now);
      else if (left > 16) sum_two(a, values, left, weights, stride, sums, outputs, at, now);
      else sum_one(a, values, left, weights, stride, sums, outputs, at, now);
    }
}

/* Some of the rows that read one head of keys: `count` of them from `row` on, counted head by head. */
TARGET static void attend(const Attention *a, long item, long group, long row, long count, float *scratch) {
  const long stride = score_stride(a->keys), width = padded(a->width, 32), share = a->heads / a->groups;
  float *scores = scratch, *query = scores + TOGETHER * stride, *sums = query + TOGETHER * width;
  float *turned = sums + TOGETHER;
  long outputs[TOGETHER];
  for (long r = 0; r < count; r++) {
    const long head = group * share + (row + r) / a->rows, t = (row + r) % a->rows;
    const long from = item * a->query_steps[0] + head * a->query_steps[1] + t * a->query_steps[2];
    for (long at = 0; at < a->width; at += 16)
      _mm512_storeu_ps(query + r * width + at, load(a->query, from + at, a->width - at, a->bf16));
    outputs[r] = ((item * a->rows + t) * a->heads + head) * a->value_width;
  }
  const long keys = item * a->key_steps[0] + group * a->key_steps[1];
  const long values = item * a->value_steps[0] + group * a->value_steps[1];
  const int fetches = a->keys * a->value_width * (a->bf16 ? 2 : 4) <= FETCHED;
  for (long key = 0; key < a->keys; key += KEYS) {
    const long start = keys + key * a->key_steps[2], left = a->keys - key;
    turn_keys(a, a->key, start, left, turned);
    if (fetches) fetch(a, a->value, values + key * a->value_steps[2], a->value_steps[2], left, a->value_width);
    score_rows(a, turned, query, width, scores + key, stride, count);
  }
  for (long r = 0; r < count; r++) {
    const long at = item * a->mask_steps[0] + (row + r) % a->rows * a->mask_steps[1];
    const long size = a->mask_kind == BOOL_MASK ? 1 : a->bf16 ? 2 : 4;
    sums[r] = soften(a, (const char *)a->mask + at * size, scores + r * stride);
  }
  sum_values(a, values, scores, stride, sums, outputs, count);
}

TARGET static void work(void *argument) {
  const Attention *a = argument;
  const long number = a->threads > 1 ? dovetail_thread_number() : 0;
  const long threads = a->threads > 1 ? dovetail_team_size() : 1;
  const long all = a->heads / a->groups * a->rows, parts = (all + TOGETHER - 1) / TOGETHER;
  float *scratch = a->scratch + number * scratch_size(a->keys, a->width);
  for (long i = number; i < a->batch * a->groups * parts; i += threads) {
    const long part = i % parts, begin = all * part / parts, end = all * (part + 1) / parts;
    attend(a, i / parts / a->groups, i / parts % a->groups, begin, end - begin, scratch);
  }
}

long dovetail_attention_scratch(long keys, long width) { return scratch_size(keys, width); }

/* sizes: batch, heads, groups, rows, keys, width, value_width. steps: of query (3), key (3), value (3), mask (2). scratch:
 * dovetail_attention_scratch numbers for each thread. */
void dovetail_attention(const void *query, const void *key, const void *value, const void *mask, void *output,
                        float *scratch, const long *sizes, const long *steps, float scale, int mask_kind, int bf16,
                        int threads) {
  const long shares = sizes[0] * sizes[1], products = shares * sizes[3] * sizes[4] * sizes[5];
  if (products < ALONE) threads = 1;
  else if (shares < threads) threads = (int)shares;
  const Attention task = {
      .query = query, .key = key, .value = value, .mask = mask, .output = output,
      .batch = sizes[0], .heads = sizes[1], .groups = sizes[2], .rows = sizes[3], .keys = sizes[4],
      .width = sizes[5], .value_width = sizes[6],
      .query_steps = {steps[0], steps[1], steps[2]}, .key_steps = {steps[3], steps[4], steps[5]},
      .value_steps = {steps[6], steps[7], steps[8]}, .mask_steps = {steps[9], steps[10]},
      .scale = scale, .mask_kind = mask_kind, .bf16 = bf16, .threads = threads, .scratch = scratch,
  };
  if (threads > 1) dovetail_parallel(work, (void *)&task, (unsigned)threads, 0);
  else work((void *)&task);
}
