/* Products of few rows with 8-bit and 4-bit weights, on CPUs with AVX512-VNNI.
 *
 * One call quantises the rows, multiplies and rescales. A row's result does not depend, bit for bit, on the rows
 * computed with it: integer sums are exact, and what follows them is the same sequence of operations for every row. So
 * the compiler must not contract a product and a sum by itself (-ffp-contract=off). As in bf16.c, weights are read in
 * pieces that fit the first cache, and the next piece is fetched while the rows are multiplied with one.
 *
 * Threads are those of torch's own OpenMP library, whose functions are handed over (dovetail_use_threads): no second
 * library, no second pool.
 */
#include <string.h>

#include "native.h"

enum {
  COLUMNS = 32, /* output channels side by side: two vectors */
  MOST = 12,    /* rows of a tile */
  CHUNK = 60,   /* rows whose levels are kept at a time */
  UNIT = 64,    /* 8-bit: input channels whose levels are summed together */
  PIECE = 512,  /* input channels of a piece for each tile that reads it */
  AHEAD = 8192, /* bytes between what a single tile reads and what it fetches */
};

void (*dovetail_parallel)(void (*)(void *), void *, unsigned, unsigned);
int (*dovetail_thread_number)(void), (*dovetail_team_size)(void);
void (*dovetail_barrier)(void);

typedef struct {
  const void *rows;        /* (count, width), bf16 or fp32 */
  void *output;            /* (count, outputs), same precision */
  const uint8_t *weights;  /* blocks of COLUMNS channels, see int8_tile and int4_tile */
  const float *scales;     /* int8: (outputs padded to COLUMNS,) */
  int8_t *levels;          /* scratch: per tile (inputs / 4, rows of the tile, 4) */
  int32_t *sums;           /* scratch: per tile (units, rows of the tile) */
  long count, width;       /* of the rows */
  long inputs, outputs;    /* of the matrix: width padded to the group, and unpadded channels */
  long unit, units;        /* input channels with one sum of levels: a 4-bit group, or UNIT; and how many there are */
  long block;              /* bytes of a block of weights */
  int bf16, four, threads;
} Task;

typedef struct { /* a few rows, to be multiplied with a piece of a block of columns */
  long row, column;        /* the first ones */
  long begin, end;         /* input channels of the piece */
  const uint8_t *weights;  /* of the piece */
  const uint8_t *next;     /* where this tile's share of what is fetched meanwhile begins */
  long pace;               /* bytes of it for each step: four input channels, or a group of 4-bit ones */
  const int8_t *levels;    /* (inputs / 4, rows, 4) */
  const int32_t *sums;     /* 8-bit: (rows,) of all levels; 4-bit: (groups, rows) */
  const float *magnitudes; /* (rows,) */
  int32_t (*totals)[16];   /* (MOST, 2) of this tile, between two pieces */
} Tile;

/* The tiles of `count` rows are as even as possible. */
static long tiles(long count) { return (count + MOST - 1) / MOST; }
static long tile_begin(long count, long tile) { return count * tile / tiles(count); }

INLINE __m512 round_bf16(__m512 values) { return widen(narrow(values)); }

INLINE __m512 load_row(const Task *t, long row, long at) { return load(t->rows, row * t->width + at, t->width - at, t->bf16); }

/* A row's largest magnitude. */
INLINE float largest(const Task *t, long row) {
  const __m512i unsign = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512(); /* as integers, NaN is larger than infinity */
  for (long at = 0; at < t->width; at += 16)
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(load_row(t, row, at)), unsign));
  const int32_t bits = _mm512_reduce_max_epi32(most);
  float found;
  memcpy(&found, &bits, 4);
  return found < 1e-30f ? 1e-30f : found;
}

/* Levels -127..127 of some units of one row, and their sums. Every operation rounds once. */
TARGET static void quantise(const Task *t, long row, long first_unit, long last_unit, float magnitude, long stride,
                            int8_t *levels, int32_t *sums) {
  const __m512 factor = _mm512_set1_ps(127.0f / magnitude), shift = _mm512_set1_ps(12582912.0f + 128.0f);
  for (long unit = first_unit; unit < last_unit; unit++) {
    const long begin = unit * t->unit, end = begin + t->unit < t->inputs ? begin + t->unit : t->inputs;
    __m512i sum = _mm512_setzero_si512();
    for (long at = begin; at < end; at += 16) {
      __m512 shifted = _mm512_add_ps(_mm512_mul_ps(load_row(t, row, at), factor), shift);
      __m128i level = _mm_xor_si128(_mm512_cvtepi32_epi8(_mm512_castps_si512(shifted)), _mm_set1_epi8((char)0x80));
      int32_t four[4];
      _mm_storeu_si128((__m128i *)four, level);
      for (int i = 0; i < 4; i++) memcpy(levels + (at / 4 + i) * stride * 4, &four[i], 4);
      sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(level));
    }
    sums[unit * stride] = _mm512_reduce_add_epi32(sum);
  }
}

INLINE void store_row(const Task *t, long row, long column, __m512 values) {
  store(t->output, row * t->outputs + column, t->outputs - column, t->bf16, values);
}

/* Four products per lane are added to `sums`. In assembly, since compilers move the sums from register to register. */
INLINE __m512i add_products(__m512i sums, __m512i weights, __m512i levels) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(levels));
  return sums;
}

INLINE __m512i four_levels(const int8_t *levels) {
  int32_t bits;
  memcpy(&bits, levels, 4);
  return _mm512_set1_epi32(bits);
}

INLINE void fetch(const uint8_t *from, long bytes) {
  for (long at = 0; at < bytes; at += 64) _mm_prefetch((const char *)from + at, _MM_HINT_T0);
}

/* Weights of a block: (inputs / 4, COLUMNS, 4) uint8 with zero point 128. */
INLINE void int8_tile(const Task *t, const Tile *tile, const int rows) {
  const uint8_t *weights = tile->weights, *next = tile->next;
  const int8_t *levels = tile->levels + tile->begin * rows;
  __m512i total[MOST][2];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < 2; v++)
      total[r][v] = tile->begin ? _mm512_loadu_si512(tile->totals[2 * r + v]) : _mm512_set1_epi32(-128 * tile->sums[r]);
  for (long k = tile->begin; k < tile->end; k += 4, weights += 128, levels += 4 * rows, next += tile->pace) {
    __m512i left = _mm512_loadu_si512(weights), right = _mm512_loadu_si512(weights + 64);
    fetch(next, tile->pace);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      __m512i level = four_levels(levels + 4 * r);
      total[r][0] = add_products(total[r][0], left, level);
      total[r][1] = add_products(total[r][1], right, level);
    }
  }
  if (tile->end < t->inputs) {
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < 2; v++) _mm512_storeu_si512(tile->totals[2 * r + v], total[r][v]);
    return;
  }
  for (int v = 0; v < 2; v++) {
    const __m512 scale = _mm512_loadu_ps(t->scales + tile->column + 16 * v);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(total[r][v]), scale);
      __m512 magnitude = _mm512_set1_ps(tile->magnitudes[r]);
      if (t->bf16) value = round_bf16(value), magnitude = round_bf16(magnitude);
      store_row(t, tile->row + r, tile->column + 16 * v, _mm512_mul_ps(value, magnitude));
    }
  }
}

/* Weights of a block, for each group: (GROUP / 8, COLUMNS, 4) bytes, the low halves of which are the levels 0..15 of
 * four input channels and the high ones those of the next four; then (COLUMNS,) pairs of bf16, the lowest weight and,
 * in the high bytes, the step. */
INLINE void int4_tile(const Task *t, const Tile *tile, const int rows) {
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi32((int)0xffff0000);
  const uint8_t *weights = tile->weights, *next = tile->next;
  const int8_t *levels = tile->levels + tile->begin * rows;
  const int32_t *sums = tile->sums + tile->begin / GROUP * rows;
  __m512 value[MOST][2];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < 2; v++)
      value[r][v] = tile->begin ? _mm512_loadu_ps(tile->totals[2 * r + v]) : _mm512_setzero_ps();
  for (long k = tile->begin; k < tile->end; k += GROUP, sums += rows, weights += 128, next += tile->pace) {
    __m512i total[MOST][2];
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm512_setzero_si512();
    __asm__ volatile("" : : "r"(value) : "memory"); /* the registers are for the totals */
    for (int i = 0; i < GROUP; i += 8, weights += 128, levels += 8 * rows) {
      const __m512i left = _mm512_loadu_si512(weights), right = _mm512_loadu_si512(weights + 64);
      const __m512i left_low = _mm512_and_si512(left, low), right_low = _mm512_and_si512(right, low);
      const __m512i left_high = _mm512_and_si512(_mm512_srli_epi16(left, 4), low);
      const __m512i right_high = _mm512_and_si512(_mm512_srli_epi16(right, 4), low);
      const long fetched = tile->pace / 64 * i / GROUP * 64;
      fetch(next + fetched, tile->pace / 64 * (i + 8) / GROUP * 64 - fetched);
#pragma GCC unroll 12
      for (int r = 0; r < rows; r++) {
        __m512i level = four_levels(levels + 4 * r);
        total[r][0] = add_products(total[r][0], left_low, level);
        total[r][1] = add_products(total[r][1], right_low, level);
      }
#pragma GCC unroll 12
      for (int r = 0; r < rows; r++) {
        __m512i level = four_levels(levels + 4 * (rows + r));
        total[r][0] = add_products(total[r][0], left_high, level);
        total[r][1] = add_products(total[r][1], right_high, level);
      }
    }
    for (int v = 0; v < 2; v++) {
      const __m512i both = _mm512_loadu_si512(weights + 64 * v);
      const __m512 step = _mm512_castsi512_ps(_mm512_and_si512(both, high));
      const __m512 least = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
#pragma GCC unroll 12
      for (int r = 0; r < rows; r++) {
        value[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[r][v]), step, value[r][v]);
        value[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_set1_epi32(sums[r])), least, value[r][v]);
      }
    }
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < 2; v++)
      if (tile->end < t->inputs) _mm512_storeu_ps(tile->totals[2 * r + v], value[r][v]);
      else
        store_row(t, tile->row + r, tile->column + 16 * v,
              _mm512_mul_ps(value[r][v], _mm512_set1_ps(tile->magnitudes[r] * (1.0f / 127.0f))));
}

#define TILE(rows)                                                  \
  case rows:                                                        \
    if (t->four) int4_tile(t, tile, rows);                          \
    else int8_tile(t, tile, rows);                                  \
    break;

TARGET static void run_tile(const Task *t, const Tile *tile, long rows) {
  switch (rows) {
    TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
  }
}

/* One thread's share: columns of rows to quantise, then blocks of columns of weights. */
TARGET static void work(void *argument) {
  const Task *t = argument;
  const long number = t->threads > 1 ? dovetail_thread_number() : 0, threads = t->threads > 1 ? dovetail_team_size() : 1;
  const long blocks = (t->outputs + COLUMNS - 1) / COLUMNS, step = t->four ? GROUP : 4;
  const long bytes = t->block / (t->inputs / step), lines = bytes / 64; /* of a step */
  const long first_unit = t->units * number / threads, last_unit = t->units * (number + 1) / threads;
  for (long done = 0; done < t->count; done += CHUNK) {
    const long count = t->count - done < CHUNK ? t->count - done : CHUNK, parts = tiles(count);
    const long piece = parts == 1 ? t->inputs : parts * PIECE, ahead = parts == 1 ? AHEAD : piece / step * bytes;
    float magnitudes[CHUNK];
    int32_t sums[CHUNK], totals[(CHUNK + MOST - 1) / MOST][MOST * 2][16];
    if (done && threads > 1) dovetail_barrier();
    for (long i = 0; i < parts; i++) {
      const long begin = tile_begin(count, i), rows = tile_begin(count, i + 1) - begin;
      for (long r = 0; r < rows; r++) {
        magnitudes[begin + r] = largest(t, done + begin + r);
        quantise(t, done + begin + r, first_unit, last_unit, magnitudes[begin + r], rows,
                 t->levels + begin * t->inputs + 4 * r, t->sums + begin * t->units + r);
      }
    }
    if (threads > 1) dovetail_barrier();
    for (long i = 0; i < parts; i++) {
      const long begin = tile_begin(count, i), rows = tile_begin(count, i + 1) - begin;
      for (long r = 0; r < rows; r++) sums[begin + r] = 0;
      for (long unit = 0; unit < t->units; unit++)
        for (long r = 0; r < rows; r++) sums[begin + r] += t->sums[begin * t->units + unit * rows + r];
    }
    for (long block = blocks * number / threads; block < blocks * (number + 1) / threads; block++)
      for (long from = 0; from < t->inputs; from += piece) {
        const long end = from + piece < t->inputs ? from + piece : t->inputs;
        const uint8_t *weights = t->weights + block * t->block + from / step * bytes;
        for (long i = 0; i < parts; i++) {
          const long begin = tile_begin(count, i), rows = tile_begin(count, i + 1) - begin;
          const long line = lines * i / parts, share = lines * (i + 1) / parts - line;
          const Tile tile = {
              .row = done + begin,
              .column = block * COLUMNS,
              .begin = from,
              .end = end,
              .weights = weights,
              .next = weights + ahead + 64 * line * ((end - from) / step),
              .pace = 64 * share,
              .levels = t->levels + begin * t->inputs,
              .sums = t->four ? t->sums + begin * t->units : sums + begin,
              .magnitudes = magnitudes + begin,
              .totals = totals[i],
          };
          run_tile(t, &tile, rows);
        }
      }
  }
}

void dovetail_use_threads(void *run, void *number, void *size, void *wait) {
  dovetail_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))run;
  dovetail_thread_number = (int (*)(void))number, dovetail_team_size = (int (*)(void))size;
  dovetail_barrier = (void (*)(void))wait;
}

long dovetail_scratch(long inputs, int four) {
  const long unit = four ? GROUP : UNIT;
  return CHUNK * (inputs + (inputs + unit - 1) / unit * 4);
}

void dovetail_product(const void *rows, void *output, const void *weights, const float *scales, void *scratch,
                      long count, long width, long inputs, long outputs, int bf16, int four, int threads) {
  const long unit = four ? GROUP : UNIT;
  const Task task = {
      .rows = rows, .output = output, .weights = weights, .scales = scales,
      .levels = scratch, .sums = (int32_t *)((int8_t *)scratch + CHUNK * inputs),
      .count = count, .width = width, .inputs = inputs, .outputs = outputs,
      .unit = unit, .units = (inputs + unit - 1) / unit,
      .block = four ? inputs / GROUP * (GROUP * COLUMNS / 2 + 4 * COLUMNS) : inputs * COLUMNS,
      .bf16 = bf16, .four = four, .threads = threads,
  };
  if (threads > 1) dovetail_parallel(work, (void *)&task, (unsigned)threads, 0);
  else work((void *)&task);
}
