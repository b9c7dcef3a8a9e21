/* Products of few rows with bf16 weights as oneDNN packs them, on CPUs with AVX512-BF16.
 *
 * A row's sums are a sequence of operations of its own, whatever rows are computed beside it, so its result does not
 * depend on them, bit for bit. Weights are read from memory once, in pieces that fit the first cache: while the rows are
 * multiplied with one, a few at a time, the next one is fetched at such a pace that the memory never rests.
 */
#include <string.h>

#include "native.h"

#define WITH_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16")))
#define INLINE_BF16 static inline __attribute__((always_inline)) WITH_BF16

enum {
  COLUMNS = 64, /* output channels of a block: four vectors */
  VECTORS = COLUMNS / 16,
  MOST = 6, /* rows of a tile: 24 sums, 4 vectors of weights and one of a row's fit the registers */
  MOST_TILES = 8, /* of one product */
  PIECE = 64,  /* inputs of a piece for each tile that reads it */
  AHEAD = 32,  /* inputs between what a single tile reads and what it fetches */
};

typedef struct {
  const uint16_t *rows;   /* (count, inputs) bf16 */
  uint16_t *output;       /* (count, outputs) bf16 */
  const uint8_t *weights; /* (blocks, inputs / 2, COLUMNS, 2) bf16 */
  const uint16_t *bias;   /* (outputs,) bf16, or null */
  long count, inputs, outputs;
  int threads;
} Product;

typedef struct { /* a few rows, to be multiplied with a piece of a block of columns */
  long row, column;       /* the first ones */
  long begin, end;        /* inputs of the piece */
  const uint8_t *weights; /* of the piece */
  const uint8_t *next;    /* where this tile's share of what is fetched meanwhile begins */
  long pace;              /* bytes of it for each pair of inputs */
  float (*sums)[16];      /* (MOST, VECTORS) of this tile, between two pieces */
} Tile;

/* The tiles of `count` rows are as even as possible. */
static long tiles(long count) { return (count + MOST - 1) / MOST; }
static long tile_begin(long count, long tile) { return count * tile / tiles(count); }

/* Two products per lane are added to `sums`. In assembly, since compilers move the sums from register to register. */
INLINE_BF16 __m512 add_products(__m512 sums, __m512i weights, __m512i pairs) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(pairs));
  return sums;
}

INLINE_BF16 void multiply(const Product *p, const Tile *tile, const int rows) {
  const uint16_t *from = p->rows + tile->row * p->inputs;
  const uint8_t *weights = tile->weights, *next = tile->next;
  __m512 sums[MOST][VECTORS];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < VECTORS; v++)
      sums[r][v] = tile->begin ? _mm512_loadu_ps(tile->sums[r * VECTORS + v]) : _mm512_setzero_ps();
  for (long k = tile->begin; k < tile->end; k += 2, weights += 4 * COLUMNS, next += tile->pace) {
    __m512i columns[VECTORS];
    for (int v = 0; v < VECTORS; v++) columns[v] = _mm512_loadu_si512(weights + 64 * v);
    for (long line = 0; line < tile->pace; line += 64) _mm_prefetch((const char *)next + line, _MM_HINT_T0);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      int32_t bits;
      memcpy(&bits, from + r * p->inputs + k, 4);
      const __m512i pair = _mm512_set1_epi32(bits);
      for (int v = 0; v < VECTORS; v++) sums[r][v] = add_products(sums[r][v], columns[v], pair);
    }
  }
  if (tile->end < p->inputs) {
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < VECTORS; v++) _mm512_storeu_ps(tile->sums[r * VECTORS + v], sums[r][v]);
    return;
  }
  for (int v = 0; v < VECTORS; v++) {
    const long at = tile->column + 16 * v, left = p->outputs - at;
    const __m512 bias = p->bias ? load(p->bias, at, left, 1) : _mm512_setzero_ps();
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      const __m512 sum = p->bias ? _mm512_add_ps(sums[r][v], bias) : sums[r][v];
      store(p->output, (tile->row + r) * p->outputs + at, left, 1, sum);
    }
  }
}

/* One function for each number of rows, so that each gets registers of its own. */
#define KERNEL(rows) \
  WITH_BF16 static void multiply_##rows(const Product *p, const Tile *tile) { multiply(p, tile, rows); }
KERNEL(1) KERNEL(2) KERNEL(3) KERNEL(4) KERNEL(5) KERNEL(6)
static void (*const kernels[])(const Product *, const Tile *) = {multiply_1, multiply_2, multiply_3,
                                                                 multiply_4, multiply_5, multiply_6};

/* One thread's share of the blocks. */
static void work(void *argument) {
  const Product *p = argument;
  const long number = p->threads > 1 ? dovetail_thread_number() : 0, threads = p->threads > 1 ? dovetail_team_size() : 1;
  const long blocks = (p->outputs + COLUMNS - 1) / COLUMNS, parts = tiles(p->count), column_bytes = 2 * COLUMNS;
  const long piece = parts == 1 ? p->inputs : parts * PIECE, ahead = parts == 1 ? AHEAD : piece;
  float sums[MOST_TILES][MOST * VECTORS][16];
  for (long block = blocks * number / threads; block < blocks * (number + 1) / threads; block++)
    for (long begin = 0; begin < p->inputs; begin += piece) {
      const long end = begin + piece < p->inputs ? begin + piece : p->inputs;
      const uint8_t *weights = p->weights + (block * p->inputs + begin) * column_bytes;
      for (long i = 0; i < parts; i++) {
        const long row = tile_begin(p->count, i), line = VECTORS * i / parts, lines = VECTORS * (i + 1) / parts - line;
        const Tile tile = {
            .row = row,
            .column = block * COLUMNS,
            .begin = begin,
            .end = end,
            .weights = weights,
            .next = weights + ahead * column_bytes + 64 * line * ((end - begin) / 2),
            .pace = 64 * lines,
            .sums = sums[i],
        };
        kernels[tile_begin(p->count, i + 1) - row - 1](p, &tile);
      }
    }
}

void dovetail_bf16_product(const void *rows, void *output, const void *weights, const void *bias, long count,
                           long inputs, long outputs, int threads) {
  for (long done = 0; done < count; done += MOST_TILES * MOST) {
    const long left = count - done, now = left < MOST_TILES * MOST ? left : MOST_TILES * MOST;
    const Product product = {
        .rows = (const uint16_t *)rows + done * inputs, .output = (uint16_t *)output + done * outputs,
        .weights = weights, .bias = bias, .count = now, .inputs = inputs, .outputs = outputs, .threads = threads,
    };
    if (threads > 1) dovetail_parallel(work, (void *)&product, (unsigned)threads, 0);
    else work((void *)&product);
  }
}
