/* A decoder layer of Llama's kind in two calls, with the cache of keys and values between them: the kernels of the other
 * files in transformers' order, each as if it were called alone. */
#include <string.h>

#include "native.h"

enum { PARTS = 3 };
enum { INT8, INT4, BF16 };

typedef struct {
  const void *weights, *scales;
  long width, inputs, outputs; /* numbers of a row; the same with the kernel's padding; columns */
  int kind, threads;           /* the most that it is worth */
} Matrix;

/* Products of one input: of one matrix each, or parts of one matrix. */
typedef struct {
  Matrix matrices[PARTS];
  const void *biases[PARTS]; /* NULL: none */
  long sizes[PARTS];         /* columns of each product */
  long parts, stacked;
} Linears;

typedef struct {
  const void *weight; /* NULL: no norm */
  float epsilon;
} Norm;

typedef struct {
  Linears qkv, out, gate_up, down;
  Norm norms[2], head_norms[2]; /* of the layer's and the MLP's input; of queries and keys */
  long hidden, heads, kv_heads, head_dim, bf16;
  float linear, cubic; /* of the activation */
} Layer;

typedef struct {
  const Layer *layer;
  long rows;
  int threads;
  void *scratch; /* of the products */
} Call;

typedef struct {
  void *numbers;
  long step; /* from one row to the next */
} Part;

static long bytes(const Layer *l, long numbers) { return numbers * (l->bf16 ? 2 : 4); }
static long aligned(long size) { return (size + 63) / 64 * 64; }

static long columns(const Linears *l) {
  long all = 0;
  for (long p = 0; p < l->parts; p++) all += l->sizes[p];
  return all;
}

/* output = left + right, all (rows, width) with steps of their own; with a step of 0, one row for all. */
TARGET static void add(Part output, Part left, Part right, long rows, long width, int bf16) {
  for (long row = 0; row < rows; row++)
    for (long at = 0; at < width; at += 16) {
      const Floats a = load(left.numbers, row * left.step + at, width - at, bf16);
      const Floats b = load(right.numbers, row * right.step + at, width - at, bf16);
      store(output.numbers, row * output.step + at, width - at, bf16, plus(a, b));
    }
}

static void multiply(const Call *c, const Matrix *m, const void *rows, const void *bias, void *output) {
  const int threads = c->threads < m->threads ? c->threads : m->threads, bf16 = (int)c->layer->bf16;
  if (m->kind == BF16)
    dovetail_bf16_product(rows, output, m->weights, bias, c->rows, m->width, m->outputs, threads);
  else
    dovetail_product(rows, output, m->weights, m->scales, c->scratch, c->rows, m->width, m->inputs, m->outputs, bf16,
                     m->kind == INT4, threads);
}

/* The products, one after the other in memory where they are not parts of one; what was quantised gets its bias rounded. */
static void products(const Call *c, const Linears *l, const void *rows, char *output, Part parts[PARTS]) {
  const long all = columns(l);
  for (long p = 0, before = 0; p < l->parts; before += l->sizes[p++]) {
    parts[p].numbers = output + bytes(c->layer, l->stacked ? before : before * c->rows);
    parts[p].step = l->stacked ? all : l->sizes[p];
    const Matrix *m = &l->matrices[l->stacked ? 0 : p];
    if (!l->stacked || p == 0) multiply(c, m, rows, l->biases[p], parts[p].numbers);
  }
  for (long p = 0; p < l->parts; p++) {
    const Part bias = {(void *)l->biases[p], 0};
    if (bias.numbers && l->matrices[l->stacked ? 0 : p].kind != BF16)
      add(parts[p], parts[p], bias, c->rows, l->sizes[p], (int)c->layer->bf16);
  }
}

/* The norm of rows, in `room`, or the rows where there is none. */
static const void *normalised(const Call *c, const Norm *n, const void *rows, void *room) {
  const Layer *l = c->layer;
  if (!n->weight) return rows;
  dovetail_norm(rows, room, n->weight, c->rows, l->hidden, l->hidden, n->epsilon, (int)l->bf16, c->threads);
  return room;
}

/* Norms of heads, row by row: between two rows there are other parts. */
static void normalise_heads(const Call *c, const Norm *n, Part *states, long heads, char *output) {
  const Layer *l = c->layer;
  const long size = heads * l->head_dim;
  if (!n->weight) return;
  for (long row = 0; row < c->rows; row++)
    dovetail_norm((char *)states->numbers + bytes(l, row * states->step), output + bytes(l, row * size), n->weight, heads,
                  l->head_dim, l->head_dim, n->epsilon, (int)l->bf16, c->threads);
  *states = (Part){output, size};
}

static long most(long a, long b) { return a > b ? a : b; }

/* Bytes of scratch memory that the products of a layer need. */
static long product_scratch(const Layer *l) {
  const Linears *all[] = {&l->qkv, &l->out, &l->gate_up, &l->down};
  long size = 0;
  for (int i = 0; i < 4; i++)
    for (long p = 0; p < (all[i]->stacked ? 1 : all[i]->parts); p++) {
      const Matrix *m = &all[i]->matrices[p];
      if (m->kind != BF16) size = most(size, dovetail_scratch(m->inputs, m->kind == INT4));
    }
  return aligned(size);
}

/* Bytes of memory that the calls need for so many rows and keys. */
long dovetail_layer_room(const Layer *l, long rows, long keys, int threads) {
  const long normed = aligned(bytes(l, rows * l->hidden)), states = aligned(bytes(l, rows * columns(&l->qkv)));
  const long attended = aligned(bytes(l, rows * l->heads * l->head_dim)), gates = aligned(bytes(l, rows * columns(&l->gate_up)));
  const long before = normed + 2 * states, after = attended + 2 * normed + 2 * gates;
  return product_scratch(l) + most(before, after) + 4 * threads * dovetail_attention_scratch(keys, l->head_dim) + 64;
}

/* hidden: (rows, hidden). cosines, sines: (positions, head_dim). query, key, value: (rows, heads or kv_heads, head_dim), turned. */
void dovetail_layer_qkv(const Layer *l, const void *hidden, const void *cosines, const void *sines, long rows,
                           long positions, void *query, void *key, void *value, void *room, int threads) {
  const Call call = {l, rows, threads, room};
  char *normed = (char *)room + product_scratch(l), *states = normed + aligned(bytes(l, rows * l->hidden));
  char *heads = states + aligned(bytes(l, rows * columns(&l->qkv)));
  Part parts[PARTS];
  products(&call, &l->qkv, normalised(&call, &l->norms[0], hidden, normed), states, parts);
  normalise_heads(&call, &l->head_norms[0], &parts[0], l->heads, heads);
  normalise_heads(&call, &l->head_norms[1], &parts[1], l->kv_heads, heads + bytes(l, rows * l->heads * l->head_dim));
  dovetail_rotary(parts[0].numbers, query, l->heads, parts[0].step, parts[1].numbers, key, l->kv_heads, parts[1].step, cosines,
                  sines, rows, positions, l->head_dim, (int)l->bf16, threads);
  const long size = bytes(l, l->kv_heads * l->head_dim);
  for (long row = 0; row < rows; row++)
    memcpy((char *)value + row * size, (char *)parts[2].numbers + bytes(l, row * parts[2].step), (size_t)size);
}

/* query: (batch, rows, heads, head_dim). keys, values: (batch, kv_heads, keys, head_dim), with strides of their own. output:
 * (batch * rows, hidden). The other arguments are attention's. */
void dovetail_layer_finish(const Layer *l, const void *hidden, const void *query, const void *keys, const void *values,
                         const void *mask, void *output, long batch, long rows, long count, const long *strides, float scale,
                         int mask_kind, void *room, int threads) {
  const long own = l->heads * l->head_dim, sizes[] = {batch, l->heads, l->kv_heads, rows, count, l->head_dim, l->head_dim};
  const long all[] = {rows * own, l->head_dim, own, strides[0], strides[1], strides[2], strides[3], strides[4], strides[5], strides[6], strides[7]};
  const Call call = {l, batch * rows, threads, room};
  const long wide = aligned(bytes(l, call.rows * columns(&l->gate_up))), size = aligned(bytes(l, call.rows * l->hidden));
  char *gates = (char *)room + product_scratch(l), *inner = gates + wide, *product = inner + wide, *normed = product + size;
  char *attended = normed + size;
  float *scratch = (float *)(attended + aligned(bytes(l, call.rows * own)));
  const Part before = {(void *)hidden, l->hidden}, after = {output, l->hidden};
  Part parts[PARTS];
  dovetail_attention(query, keys, values, mask, attended, scratch, sizes, all, scale, mask_kind, (int)l->bf16, threads);
  products(&call, &l->out, attended, product, parts);
  add(after, before, parts[0], call.rows, l->hidden, (int)l->bf16);
  products(&call, &l->gate_up, normalised(&call, &l->norms[1], output, normed), gates, parts);
  dovetail_activation(parts[0].numbers, parts[1].numbers, inner, call.rows, l->gate_up.sizes[0], parts[0].step, parts[1].step,
                      l->linear, l->cubic, (int)l->bf16, threads);
  products(&call, &l->down, inner, product, parts);
  add(after, after, parts[0], call.rows, l->hidden, (int)l->bf16);
}
