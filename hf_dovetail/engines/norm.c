/* Root-mean-square norms: one sequence of operations for every row, whatever rows are beside it. Rounded as transformers
 * rounds: the normalised number to its own precision, then its product with the weight. */
#include "native.h"

enum { ALONE = 1 << 16 }; /* numbers below which waking other threads costs more than they save */

typedef struct {
  const void *input;
  void *output; /* (rows, width) */
  const void *weight; /* (width,) */
  long rows, width, step; /* from one row of the input to the next */
  float epsilon;
  int bf16, threads;
} Norm;

TARGET static void work(void *argument) {
  const Norm *n = argument;
  const long number = n->threads > 1 ? dovetail_thread_number() : 0;
  const long threads = n->threads > 1 ? dovetail_team_size() : 1, width = n->width;
  for (long row = n->rows * number / threads; row < n->rows * (number + 1) / threads; row++) {
    Floats squares = zeros();
    for (long at = 0; at < width; at += 16) {
      const Floats x = load(n->input, row * n->step + at, width - at, n->bf16);
      squares = times_plus(x, x, squares);
    }
    const Floats mean = every(sum_of(squares) / (float)width + n->epsilon);
    const Floats scale = over(every(1.0f), root(mean));
    for (long at = 0; at < width; at += 16) {
      const Floats weight = load(n->weight, at, width - at, n->bf16);
      Floats x = times(load(n->input, row * n->step + at, width - at, n->bf16), scale);
      if (n->bf16) x = widen(narrow(x));
      store(n->output, row * width + at, width - at, n->bf16, times(x, weight));
    }
  }
}

void dovetail_norm(const void *input, void *output, const void *weight, long rows, long width, long step, float epsilon,
                   int bf16, int threads) {
  if (rows * width < ALONE) threads = 1;
  const Norm task = {input, output, weight, rows, width, step, epsilon, bf16, threads};
  if (threads > 1) dovetail_parallel(work, (void *)&task, (unsigned)threads, 0);
  else work((void *)&task);
}
