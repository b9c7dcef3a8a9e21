/* Products of few rows with 8-bit and 4-bit weights.
 *
 * One call quantises the rows, multiplies and rescales. A row's result does not depend, bit for bit, on the rows
 * computed with it: integer sums are exact, and what follows them is the same sequence of operations for every row. So
 * the compiler must not contract a product and a sum by itself (-ffp-contract=off). As in bf16.c, weights are read in
 * pieces that fit the first cache, and the next piece is fetched while the rows are multiplied with one.
 *
 * Threads are those of torch's own OpenMP library, whose functions are handed over (dovetail_use_threads): no second
 * library, no second pool.
 */
#include "native.h"

enum {
  VECTORS = 2,  /* output channels side by side, in vectors */
  COLUMNS = 16 * VECTORS,
  MOST = WIDE ? 12 : 6, /* rows of a tile */
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
  int8_t *levels;          /* scratch: per tile (inputs / side, rows of the tile), four bytes each */
  int32_t *sums;           /* scratch: per tile (units, rows of the tile) */
  long count, width;       /* of the rows */
  long inputs, outputs;    /* of the matrix: width padded to the group, and unpadded channels */
  long side;               /* input channels whose levels fill four bytes */
  long unit, units;        /* input channels with one sum of levels: a 4-bit group, or UNIT; and how many there are */
  long block;              /* bytes of a block of weights */
  int bf16, four, threads;
} Task;

typedef struct { /* a few rows, to be multiplied with a piece of a block of columns */
  long row, column;        /* the first ones */
  long begin, end;         /* input channels of the piece */
  const uint8_t *weights;  /* of the piece */
  const uint8_t *next;     /* where this tile's share of what is fetched meanwhile begins */
  long pace;               /* bytes of it for each step: SIDE_BY_SIDE input channels, or a group of 4-bit ones */
  const int8_t *levels;    /* (inputs / side, rows), four bytes each */
  const int32_t *sums;     /* 8-bit: (rows,) of all levels; 4-bit: (groups, rows) */
  const float *magnitudes; /* (rows,) */
  int32_t (*totals)[16];   /* (MOST, VECTORS) of this tile, between two pieces */
} Tile;

/* The tiles of `count` rows are as even as possible. */
static long tiles(long count) { return (count + MOST - 1) / MOST; }
static long tile_begin(long count, long tile) { return count * tile / tiles(count); }

INLINE Floats round_bf16(Floats values) { return widen(narrow(values)); }

INLINE Floats load_row(const Task *t, long row, long at) { return load(t->rows, row * t->width + at, t->width - at, t->bf16); }

/* A row's largest magnitude. */
INLINE float largest(const Task *t, long row) {
  const Ints unsign = every_int(0x7fffffff);
  Ints most = zero_ints(); /* as integers, NaN is larger than infinity */
  for (long at = 0; at < t->width; at += 16)
    most = larger_ints(most, both(bits_of(load_row(t, row, at)), unsign));
  const int32_t bits = most_of_ints(most);
  float found;
  memcpy(&found, &bits, 4);
  return found < 1e-30f ? 1e-30f : found;
}

/* Levels -127..127 of some units of one row, and their sums. Every operation rounds once. */
TARGET static void quantise(const Task *t, long row, long first_unit, long last_unit, float magnitude, long stride,
                            int8_t *levels, int32_t *sums) {
  const Floats factor = every(127.0f / magnitude), shift = every(12582912.0f + 128.0f);
  for (long unit = first_unit; unit < last_unit; unit++) {
    const long begin = unit * t->unit, end = begin + t->unit < t->inputs ? begin + t->unit : t->inputs;
    Ints sum = zero_ints();
    for (long at = begin; at < end; at += 16) {
      Floats shifted = plus(times(load_row(t, row, at), factor), shift);
      const Ints level = to_levels(bits_of(shifted));
      int32_t packed[8] = {0};
      pack_levels(level, (int)t->side, packed);
      for (int i = 0; i < 16 / t->side; i++) memcpy(levels + (at / t->side + i) * stride * 4, &packed[i], 4);
      sum = plus_ints(sum, level);
    }
    sums[unit * stride] = sum_of_ints(sum);
  }
}

INLINE void store_row(const Task *t, long row, long column, Floats values) {
  store(t->output, row * t->outputs + column, t->outputs - column, t->bf16, values);
}

INLINE void fetch(const uint8_t *from, long bytes) {
  for (long at = 0; at < bytes; at += 64) _mm_prefetch((const char *)from + at, _MM_HINT_T0);
}

/* Weights of a block: (inputs / SIDE_BY_SIDE, COLUMNS, SIDE_BY_SIDE) bytes, levels plus ZERO_POINT. */
INLINE void int8_tile(const Task *t, const Tile *tile, const int rows, const int vectors) {
  const uint8_t *weights = tile->weights, *next = tile->next;
  const int8_t *levels = tile->levels + tile->begin / SIDE_BY_SIDE * 4 * rows;
  Ints total[MOST][VECTORS];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++)
      total[r][v] = tile->begin ? load_ints(tile->totals[VECTORS * r + v]) : every_int(-ZERO_POINT * tile->sums[r]);
  for (long k = tile->begin; k < tile->end; k += SIDE_BY_SIDE, levels += 4 * rows, next += tile->pace) {
    Ints columns[VECTORS];
    for (int v = 0; v < vectors; v++) columns[v] = load_columns(weights + 16 * SIDE_BY_SIDE * v);
    weights += COLUMNS * SIDE_BY_SIDE;
    fetch(next, tile->pace);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      const Ints level = four_bytes(levels + 4 * r);
      for (int v = 0; v < vectors; v++) total[r][v] = add_products(total[r][v], columns[v], level);
    }
  }
  if (tile->end < t->inputs) {
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < vectors; v++) store_ints(tile->totals[VECTORS * r + v], total[r][v]);
    return;
  }
  for (int v = 0; v < vectors; v++) {
    const long column = tile->column + 16 * v;
    const Floats scale = load_floats(t->scales + column);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      Floats value = times(to_floats(total[r][v]), scale);
      Floats magnitude = every(tile->magnitudes[r]);
      if (t->bf16) value = round_bf16(value), magnitude = round_bf16(magnitude);
      store_row(t, tile->row + r, column, times(value, magnitude));
    }
  }
}

/* Weights of a block, for each group: (GROUP / 8, COLUMNS, 4) bytes, the low halves of which are the levels 0..15 of
 * four input channels and the high ones those of the next four; then (COLUMNS,) pairs of bf16, the lowest weight and,
 * in the high bytes, the step. */
INLINE void int4_tile(const Task *t, const Tile *tile, const int rows, const int vectors) {
  const Ints low = every_byte(15), high = every_int((int)0xffff0000);
  const uint8_t *weights = tile->weights, *next = tile->next;
  const int8_t *levels = tile->levels + tile->begin * rows;
  const int32_t *sums = tile->sums + tile->begin / GROUP * rows;
  Floats value[MOST][VECTORS];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++)
      value[r][v] = tile->begin ? load_floats((float *)tile->totals[VECTORS * r + v]) : zeros();
  for (long k = tile->begin; k < tile->end; k += GROUP, sums += rows, weights += 4 * COLUMNS, next += tile->pace) {
    Ints total[MOST][VECTORS];
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < vectors; v++) total[r][v] = zero_ints();
    __asm__ volatile("" : : "r"(value) : "memory"); /* the registers are for the totals */
    for (int i = 0; i < GROUP; i += 8, weights += 4 * COLUMNS, levels += 8 * rows) {
      const long fetched = tile->pace / 64 * i / GROUP * 64;
      fetch(next + fetched, tile->pace / 64 * (i + 8) / GROUP * 64 - fetched);
      for (int half = 0; half < 2; half++) {
        Ints columns[VECTORS];
        for (int v = 0; v < vectors; v++) {
          const Ints packed = load_ints(weights + 64 * v);
          columns[v] = both(half ? down_4(packed) : packed, low);
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
          const Ints level = four_bytes(levels + 4 * (rows * half + r));
          for (int v = 0; v < vectors; v++) total[r][v] = add_small_products(total[r][v], columns[v], level);
        }
      }
    }
    for (int v = 0; v < vectors; v++) {
      const Ints pair = load_ints(weights + 64 * v);
      const Floats step = floats_of(both(pair, high)), least = floats_of(up_16(pair));
#pragma GCC unroll 12
      for (int r = 0; r < rows; r++) {
        value[r][v] = times_plus(to_floats(whole_sums(total[r][v])), step, value[r][v]);
        value[r][v] = times_plus(to_floats(every_int(sums[r])), least, value[r][v]);
      }
    }
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++)
      if (tile->end < t->inputs) store_floats((float *)tile->totals[VECTORS * r + v], value[r][v]);
      else
        store_row(t, tile->row + r, tile->column + 16 * v,
              times(value[r][v], every(tile->magnitudes[r] * (1.0f / 127.0f))));
}

/* The part of a tile that one of the block's vectors is, with its share of what is fetched. */
INLINE Tile part_of(const Task *t, const Tile *tile, long vector) {
  const long step = t->four ? GROUP : SIDE_BY_SIDE, steps = (tile->end - tile->begin) / step;
  const long lines = tile->pace / 64, line = lines * vector / VECTORS;
  Tile part = *tile;
  part.column += 16 * vector, part.weights += (t->four ? 64 : 16 * SIDE_BY_SIDE) * vector, part.totals += vector;
  part.next += 64 * line * steps, part.pace = 64 * (lines * (vector + 1) / VECTORS - line);
  return part;
}

#define VECTOR_BY_VECTOR(multiply, rows)            \
  if (WIDE || rows <= 2) {                          \
    multiply(t, tile, rows, VECTORS);               \
  } else {                                          \
    for (long v = 0; v < VECTORS; v++) {            \
      const Tile part = part_of(t, tile, v);        \
      multiply(t, &part, rows, 1);                  \
    }                                               \
  }
#define TILE(rows)                                                    \
  case rows:                                                          \
    if (t->four) { VECTOR_BY_VECTOR(int4_tile, rows) } else { VECTOR_BY_VECTOR(int8_tile, rows) } \
    break;

TARGET static void run_tile(const Task *t, const Tile *tile, long rows) {
  switch (rows) {
    TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#ifndef DOVETAIL_AVX2
    TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif
  }
}

/* One thread's share: columns of rows to quantise, then blocks of columns of weights. */
TARGET static void work(void *argument) {
  const Task *t = argument;
  const long number = t->threads > 1 ? dovetail_thread_number() : 0, threads = t->threads > 1 ? dovetail_team_size() : 1;
  const long blocks = (t->outputs + COLUMNS - 1) / COLUMNS, step = t->four ? GROUP : SIDE_BY_SIDE;
  const long bytes = t->block / (t->inputs / step), lines = bytes / 64; /* of a step */
  const long first_unit = t->units * number / threads, last_unit = t->units * (number + 1) / threads;
  for (long done = 0; done < t->count; done += CHUNK) {
    const long count = t->count - done < CHUNK ? t->count - done : CHUNK, parts = tiles(count);
    const int alone = WIDE ? parts == 1 : count <= 2; /* each weight is read once */
    const long piece = alone ? t->inputs : parts * PIECE, ahead = alone ? AHEAD : piece / step * bytes;
    float magnitudes[CHUNK];
    int32_t sums[CHUNK], totals[(CHUNK + MOST - 1) / MOST][MOST * VECTORS][16];
    if (done && threads > 1) dovetail_barrier();
    for (long i = 0; i < parts; i++) {
      const long begin = tile_begin(count, i), rows = tile_begin(count, i + 1) - begin;
      for (long r = 0; r < rows; r++) {
        magnitudes[begin + r] = largest(t, done + begin + r);
        quantise(t, done + begin + r, first_unit, last_unit, magnitudes[begin + r], rows,
                 t->levels + begin * t->inputs / t->side * 4 + 4 * r, t->sums + begin * t->units + r);
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
              .levels = t->levels + begin * t->inputs / t->side * 4,
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
  const long unit = four ? GROUP : UNIT, side = four ? 4 : SIDE_BY_SIDE;
  return CHUNK * (inputs / side * 4 + (inputs + unit - 1) / unit * 4);
}

void dovetail_product(const void *rows, void *output, const void *weights, const float *scales, void *scratch,
                      long count, long width, long inputs, long outputs, int bf16, int four, int threads) {
  const long unit = four ? GROUP : UNIT, side = four ? 4 : SIDE_BY_SIDE;
  const Task task = {
      .rows = rows, .output = output, .weights = weights, .scales = scales,
      .levels = scratch, .sums = (int32_t *)((int8_t *)scratch + CHUNK * inputs / side * 4),
      .count = count, .width = width, .inputs = inputs, .outputs = outputs,
      .side = side, .unit = unit, .units = (inputs + unit - 1) / unit,
      .block = four ? inputs / GROUP * (GROUP * COLUMNS / 2 + 4 * COLUMNS) : inputs * COLUMNS,
      .bf16 = bf16, .four = four, .threads = threads,
  };
  if (threads > 1) dovetail_parallel(work, (void *)&task, (unsigned)threads, 0);
  else work((void *)&task);
}
