/* The largest numbers of each row and their log-softmax: for a few of many, in two passes over the row. Of equal numbers
 * the earlier comes first. A NaN is never among them unless nothing else is left, and makes its row's results -inf, as
 * does +inf. */
#include <math.h>

#include "native.h"

enum { ALONE = 1 << 16 }; /* numbers below which waking other threads costs more than they save */

typedef struct {
  const float *input; /* (rows, width) */
  float *log_probs;   /* (rows, count) */
  int64_t *places;    /* (rows, count) */
  long rows, width, step, count; /* step: from one row of the input to the next */
  int threads;
} Best;

/* Puts a number that beats the last of `held` where it belongs. */
static void insert(float *values, int64_t *places, long held, float value, int64_t place) {
  long at = held - 1;
  for (; at > 0 && value > values[at - 1]; at--) values[at] = values[at - 1], places[at] = places[at - 1];
  values[at] = value, places[at] = place;
}

TARGET static void best_of_row(const Best *b, const float *row, float *values, int64_t *places) {
  for (long i = 0; i < b->count; i++) {
    const float value = isnan(row[i]) ? -INFINITY : row[i];
    values[i] = -INFINITY, places[i] = i;
    insert(values, places, i + 1, value, i);
  }
  for (long at = b->count; at < b->width; at += 16) {
    const Floats x = load(row, at, b->width - at, 0);
    const Lanes there = first(b->width - at);
    unsigned better = above(there, x, every(values[b->count - 1]));
    for (; better; better &= better - 1) {
      const long place = at + __builtin_ctz(better);
      if (row[place] > values[b->count - 1]) insert(values, places, b->count, row[place], place);
    }
  }
  const Floats largest = every(values[0]);
  Floats sums = zeros();
  for (long at = 0; at < b->width; at += 16) {
    const Floats x = load(row, at, b->width - at, 0);
    sums = plus_lanes(first(b->width - at), sums, exponential(less(x, largest)));
  }
  const float sum = values[0] + logf(sum_of(sums));
  for (long i = 0; i < b->count; i++) {
    const float log_prob = values[i] - sum;
    values[i] = isnan(log_prob) ? -INFINITY : log_prob;
  }
}

TARGET static void work(void *argument) {
  const Best *b = argument;
  const long number = b->threads > 1 ? dovetail_thread_number() : 0, threads = b->threads > 1 ? dovetail_team_size() : 1;
  for (long row = b->rows * number / threads; row < b->rows * (number + 1) / threads; row++)
    best_of_row(b, b->input + row * b->step, b->log_probs + row * b->count, b->places + row * b->count);
}

void dovetail_best(const float *input, float *log_probs, int64_t *places, long rows, long width, long step, long count,
                   int threads) {
  if (rows * width < ALONE) threads = 1;
  const Best task = {input, log_probs, places, rows, width, step, count, threads};
  if (threads > 1) dovetail_parallel(work, (void *)&task, (unsigned)threads, 0);
  else work((void *)&task);
}
