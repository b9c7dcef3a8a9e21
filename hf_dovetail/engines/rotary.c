/* Rotary position embedding of queries and keys: each number times its cosine, plus its partner in the other half of its
 * head times the sine. Rounded as transformers rounds: both products, then their sum. */
#include "native.h"

enum { ALONE = 1 << 16 }; /* numbers of queries below which waking other threads costs more than they save */

typedef struct {
  const void *input; /* (rows, heads, width) */
  void *output;      /* the same, without gaps */
  long heads, step;  /* numbers from one row of the input to the next */
} States;

typedef struct {
  States states[2];
  const void *cosines, *sines; /* (positions, width); row r stands at position r % positions */
  long rows, positions, width;
  int bf16, threads;
} Rotary;

INLINE Floats product(Floats left, Floats right, int bf16) {
  const Floats exact = times(left, right);
  return bf16 ? widen(narrow(exact)) : exact;
}

INLINE Floats minus(Floats values) { return floats_of(differing(bits_of(values), every_int((int)0x80000000))); }

TARGET static void work(void *argument) {
  const Rotary *t = argument;
  const long number = t->threads > 1 ? dovetail_thread_number() : 0;
  const long threads = t->threads > 1 ? dovetail_team_size() : 1, half = t->width / 2;
  const int bf16 = t->bf16;
  for (long row = t->rows * number / threads; row < t->rows * (number + 1) / threads; row++)
    for (long at = 0; at < half; at += 16) {
      const long count = half - at, angle = row % t->positions * t->width + at;
      const Floats cosine = load(t->cosines, angle, count, bf16), other_cosine = load(t->cosines, angle + half, count, bf16);
      const Floats sine = load(t->sines, angle, count, bf16), other_sine = load(t->sines, angle + half, count, bf16);
      for (int i = 0; i < 2; i++) {
        const States *s = &t->states[i];
        for (long head = 0; head < s->heads; head++) {
          const long from = row * s->step + head * t->width + at, to = (row * s->heads + head) * t->width + at;
          const Floats x = load(s->input, from, count, bf16), other = load(s->input, from + half, count, bf16);
          store(s->output, to, count, bf16, plus(product(x, cosine, bf16), product(minus(other), sine, bf16)));
          store(s->output, to + half, count, bf16,
                plus(product(other, other_cosine, bf16), product(x, other_sine, bf16)));
        }
      }
    }
}

void dovetail_rotary(const void *queries, void *turned_queries, long query_heads, long query_step, const void *keys,
                     void *turned_keys, long key_heads, long key_step, const void *cosines, const void *sines, long rows,
                     long positions, long width, int bf16, int threads) {
  if (rows * query_heads * width < ALONE) threads = 1;
  const Rotary task = {
      .states = {{queries, turned_queries, query_heads, query_step}, {keys, turned_keys, key_heads, key_step}},
      .cosines = cosines, .sines = sines, .rows = rows, .positions = positions, .width = width,
      .bf16 = bf16, .threads = threads,
  };
  if (threads > 1) dovetail_parallel(work, (void *)&task, (unsigned)threads, 0);
  else work((void *)&task);
}
