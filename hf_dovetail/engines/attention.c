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
  KEY_VECTORS = WIDE ? 2 : 1,
  KEYS = 16 * KEY_VECTORS, /* of a block */
  FETCHED = 1 << 18, /* bytes of a head's values that stay in the cache until they are needed */
  TOGETHER = 32, /* rows that share the transposed keys */
  TILE = WIDE ? 8 : 6, /* rows multiplied with a block of keys */
  SUMS = WIDE ? 12 : 6, /* rows whose values are summed together; half as many where more than two vectors are */
  VALUE_VECTORS = WIDE ? 4 : 1, /* most of a value that are summed together */
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

/* Fetches rows of keys or values into the cache, up to KEYS of them. */
INLINE void fetch(const Attention *a, const void *from, long start, long step, long count, long width) {
  const long size = a->bf16 ? 2 : 4;
  const char *at = (const char *)from + start * size;
  for (long i = 0; i < count && i < KEYS; i++, at += step * size)
    for (long byte = 0; byte < width * size; byte += 64) _mm_prefetch(at + byte, _MM_HINT_T0);
}

/* (count <= KEYS, width) keys to (width, KEYS) float32; what is behind them is zero. */
TARGET static void turn_keys(const Attention *a, const void *keys, long start, long count, float *turned) {
  const Ints high = every_int((int)0xffff0000);
  const long step = a->key_steps[2], across = a->bf16 ? 32 : 16;
  for (long column = 0; column < KEYS; column += 16)
    for (long at = 0; at < a->width; at += across) {
      Ints block[16];
      for (long i = 0; i < 16; i++) {
        const long from = start + (column + i) * step + at, left = column + i < count ? a->width - at : 0;
        const char *at_key = (const char *)keys + from * (a->bf16 ? 2 : 4);
        _mm_prefetch(at_key + KEYS * step * (a->bf16 ? 2 : 4), _MM_HINT_T0);
        block[i] = a->bf16 ? load_all_halves(at_key, left) : bits_of(load_lanes((const float *)at_key, first(left)));
      }
      transpose(block);
      for (long i = 0; i < 16; i++) {
        if (a->bf16) {
          float *to = turned + (at + 2 * i) * KEYS + column;
          store_floats(to, floats_of(up_16(block[i])));
          store_floats(to + KEYS, floats_of(both(block[i], high)));
        } else {
          store_floats(turned + (at + i) * KEYS + column, floats_of(block[i]));
        }
      }
    }
}

/* Scores of a few rows with a block of keys. */
INLINE void score_tile(const Attention *a, const float *turned, const float *query, long query_step, float *scores,
                       long stride, const int rows) {
  Floats sums[TILE][KEY_VECTORS];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < KEY_VECTORS; v++) sums[r][v] = zeros();
  for (long d = 0; d < a->width; d++) {
    Floats keys[KEY_VECTORS];
    for (int v = 0; v < KEY_VECTORS; v++) keys[v] = load_floats(turned + d * KEYS + 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const Floats factor = every(query[r * query_step + d]);
      for (int v = 0; v < KEY_VECTORS; v++) sums[r][v] = times_plus(factor, keys[v], sums[r][v]);
    }
  }
  const Floats scale = every(a->scale);
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < KEY_VECTORS; v++) store_floats(scores + r * stride + 16 * v, times(sums[r][v], scale));
}

#define SCORES(rows) case rows: score_tile(a, turned, query, query_step, scores, stride, rows); break;

TARGET static void score_rows(const Attention *a, const float *turned, const float *query, long query_step,
                              float *scores, long stride, long rows) {
  for (; rows > 0; rows -= TILE, query += TILE * query_step, scores += TILE * stride)
    switch (rows < TILE ? rows : TILE) {
      SCORES(1) SCORES(2) SCORES(3) SCORES(4) SCORES(5) SCORES(6)
#ifndef DOVETAIL_AVX2
      SCORES(7) SCORES(8)
#endif
    }
}

/* What is added to the scores of up to 16 keys. */
INLINE Floats bias(const Attention *a, const void *mask, long at, long count) {
  if (a->mask_kind == ADDED_MASK) return load(mask, at, count, a->bf16);
  return choose(not_zero((const uint8_t *)mask + at, first(count)), zeros(), every(-3.38e38f));
}

/* Which of up to 16 keys are seen. */
INLINE Lanes sees(const Attention *a, const void *mask, long at, long count) {
  if (a->mask_kind == NO_MASK) return first(count);
  if (a->mask_kind == ADDED_MASK)
    return above(first(count), load(mask, at, count, a->bf16), every(-1e30f));
  return not_zero((const uint8_t *)mask + at, first(count));
}

/* Adds what the mask says to the scores from `begin` to `end`, and finds the largest of each lane. */
INLINE Floats add_bias(const Attention *a, const void *mask, float *scores, long begin, long end, Floats most) {
  for (long at = begin; at < end; at += 16) {
    const Lanes there = first(end - at);
    Floats score = load_lanes(scores + at, there);
    if (a->mask_kind != NO_MASK) score = plus(score, bias(a, mask, at, end - at));
    store_lanes(scores + at, there, score);
    most = larger_lanes(there, most, score);
  }
  return most;
}

/* Scores to weights that are not yet divided by their sum, which is returned. */
TARGET static float soften(const Attention *a, const void *mask, float *scores) {
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
  Floats most = every(-INFINITY);
  for (long at = begin; at < plain; at += 16) most = larger(most, load_floats(scores + at));
  most = add_bias(a, mask, scores, plain, keys, most);
  const Floats largest = every(most_of(most));
  Floats sums = zeros();
  long at = begin;
  for (; at + 16 <= old; at += 16) {
    const Floats weight = exponential(less(load_floats(scores + at), largest));
    store_floats(scores + at, weight);
    sums = plus(sums, weight);
  }
  if (at < old) {
    const Lanes there = first(old - at);
    const Floats weight = exponential(less(load_lanes(scores + at, there), largest));
    store_lanes(scores + at, there, weight);
    sums = plus_lanes(there, sums, weight);
  }
  /* each visible one of the rows' own keys goes to the lane of its number */
  long number = begin < old ? old - begin : 0;
  for (at = old > 0 ? old : 0; at < keys; at += 16) {
    const Lanes there = first(keys - at), seen = sees(a, mask, at, keys - at);
    const Floats weight = exponential(less(load_lanes(scores + at, there), largest));
    store_lanes(scores + at, there, weight);
    sums = plus(sums, gather_from(weight, seen, (int)(number & 15)));
    number += __builtin_popcount(seen);
  }
  for (at = 0; at < begin; at++) scores[at] = 0.0f;
  return sum_of(sums);
}

/* Weighted sums of values, for a few rows and vectors of the width. */
INLINE void value_tile(const Attention *a, const void *values, const long left, const float *weights, long stride,
                       const float *sums, const long *outputs, long at, const int rows, const int vectors, const int bf16) {
  Floats total[SUMS][VALUE_VECTORS];
  Lanes there[VALUE_VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; v++) {
    there[v] = first(left - 16 * v);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) total[r][v] = zeros();
  }
  const char *value_at = values;
  for (long key = 0; key < a->keys; key++, value_at += a->value_steps[2] * (bf16 ? 2 : 4)) {
    Floats value[VALUE_VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++)
      value[v] = bf16 ? widen(load_halves(value_at + 32 * v, there[v]))
                      : load_lanes((const float *)(value_at + 64 * v), there[v]);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      const Floats weight = every(weights[r * stride + key]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) total[r][v] = times_plus(weight, value[v], total[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++)
      store(a->output, outputs[r] + at + 16 * v, left - 16 * v, bf16,
            over(total[r][v], every(sums[r])));
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
#ifdef DOVETAIL_AVX2
TARGET static void sum_few(ARGUMENTS) { switch (rows) { SIX_SUMS(1) } }
#else
TARGET static void sum_one(ARGUMENTS) { switch (rows) { TWELVE_SUMS(1) } }
TARGET static void sum_two(ARGUMENTS) { switch (rows) { TWELVE_SUMS(2) } }
TARGET static void sum_three(ARGUMENTS) { switch (rows) { SIX_SUMS(3) } }
TARGET static void sum_four(ARGUMENTS) { switch (rows) { SIX_SUMS(4) } }

INLINE void sum_few(ARGUMENTS) {
  if (left > 48) sum_four(a, values, left, weights, stride, sums, outputs, at, rows);
  else if (left > 32) sum_three(a, values, left, weights, stride, sums, outputs, at, rows);
  else if (left > 16) sum_two(a, values, left, weights, stride, sums, outputs, at, rows);
  else sum_one(a, values, left, weights, stride, sums, outputs, at, rows);
}
#endif

TARGET static void sum_values(const Attention *a, long start, const float *weights, long stride, const float *sums,
                              const long *outputs, long rows) {
  const long most = WIDE && a->value_width > 32 ? SUMS / 2 : SUMS;
  for (; rows > 0; rows -= most, weights += most * stride, sums += most, outputs += most)
    for (long at = 0; at < a->value_width; at += 16 * VALUE_VECTORS) {
      const void *values = (const char *)a->value + (start + at) * (a->bf16 ? 2 : 4);
      sum_few(a, values, a->value_width - at, weights, stride, sums, outputs, at, rows < most ? rows : most);
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
      store_floats(query + r * width + at, load(a->query, from + at, a->width - at, a->bf16));
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
