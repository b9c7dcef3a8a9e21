/* Products of few rows with bf16 weights as oneDNN packs them, on CPUs with AVX512-BF16, or with AVX2.
 *
 * A row's sums are a sequence of operations of its own, whatever rows are computed beside it, so its result does not
 * depend on them, bit for bit. Weights are read from memory once, in pieces that fit the first cache: while the rows are
 * multiplied with one, a few at a time, the next one is fetched at such a pace that the memory never rests.
 */
#define DOVETAIL_BF16 /* the instructions of AVX512-BF16 */
#include "native.h"

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

INLINE void multiply(const Product *p, const Tile *tile, const int rows, const int vectors) {
  const uint16_t *from = p->rows + tile->row * p->inputs;
  const uint8_t *weights = tile->weights, *next = tile->next;
  Floats sums[MOST][VECTORS];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++)
      sums[r][v] = tile->begin ? load_floats(tile->sums[r * VECTORS + v]) : zeros();
  for (long k = tile->begin; k < tile->end; k += 2, weights += 4 * COLUMNS, next += tile->pace) {
    for (long line = 0; line < tile->pace; line += 64) _mm_prefetch((const char *)next + line, _MM_HINT_T0);
    for (int part = 0; part < PAIR_PARTS; part++) {
      Pairs columns[VECTORS];
      for (int v = 0; v < vectors; v++) columns[v] = load_pairs_part(weights + 64 * v, part);
#pragma GCC unroll 6
      for (int r = 0; r < rows; r++) {
        const Pairs pair = every_pair_part(from + r * p->inputs + k, part);
        for (int v = 0; v < vectors; v++) sums[r][v] = add_pairs(sums[r][v], columns[v], pair);
      }
    }
  }
  if (tile->end < p->inputs) {
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < vectors; v++) store_floats(tile->sums[r * VECTORS + v], sums[r][v]);
    return;
  }
  for (int v = 0; v < vectors; v++) {
    const long at = tile->column + 16 * v, left = p->outputs - at;
    const Floats bias = p->bias ? load(p->bias, at, left, 1) : zeros();
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      const Floats sum = p->bias ? plus(sums[r][v], bias) : sums[r][v];
      store(p->output, (tile->row + r) * p->outputs + at, left, 1, sum);
    }
  }
}

/* The part of a tile that some of the block's vectors are, with its share of what is fetched. */
INLINE Tile part_of(const Tile *tile, long vector, long vectors) {
  const long lines = tile->pace / 64, line = lines * vector / VECTORS, steps = (tile->end - tile->begin) / 2;
  Tile part = *tile;
  part.column += 16 * vector, part.weights += 64 * vector, part.sums += vector;
  part.next += 64 * line * steps, part.pace = 64 * (lines * (vector + vectors) / VECTORS - line);
  return part;
}

/* One function for each number of rows, so that each gets registers of its own; `vectors` at once where they are few. */
#define KERNEL(rows, vectors)                                                                      \
  TARGET static void multiply_##rows(const Product *p, const Tile *tile) {                         \
    if (WIDE || vectors == VECTORS) {                                                              \
      multiply(p, tile, rows, VECTORS);                                                            \
      return;                                                                                      \
    }                                                                                              \
    for (long vector = 0; vector < VECTORS; vector += vectors) {                                   \
      const Tile part = part_of(tile, vector, vectors);                                            \
      multiply(p, &part, rows, vectors);                                                           \
    }                                                                                              \
  }
KERNEL(1, 4) KERNEL(2, 2) KERNEL(3, 1) KERNEL(4, 1) KERNEL(5, 1) KERNEL(6, 1)
static void (*const kernels[])(const Product *, const Tile *) = {multiply_1, multiply_2, multiply_3,
                                                                 multiply_4, multiply_5, multiply_6};

/* One thread's share of the blocks. */
static void work(void *argument) {
  const Product *p = argument;
  const long number = p->threads > 1 ? dovetail_thread_number() : 0, threads = p->threads > 1 ? dovetail_team_size() : 1;
  const long blocks = (p->outputs + COLUMNS - 1) / COLUMNS, parts = tiles(p->count), column_bytes = 2 * COLUMNS;
  const int alone = WIDE ? parts == 1 : p->count == 1; /* each weight is read once */
  const long piece = alone ? p->inputs : parts * PIECE, ahead = alone ? AHEAD : piece;
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
