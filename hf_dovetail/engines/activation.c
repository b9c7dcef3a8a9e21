/* x times sigmoid(x (linear + cubic x^2)): SiLU, GELU by tanh and their kin. One sequence of operations for every number,
 * wherever it stands. Where there is a factor (a gated MLP's), the result is rounded and then multiplied by it. */
#include "native.h"

enum { ALONE = 1 << 15 }; /* numbers below which waking other threads costs more than they save */

typedef struct {
  const void *input, *factor; /* the factor may be missing */
  void *output; /* (rows, width) */
  long rows, width, step, factor_step; /* from one row of the input, and of the factor, to the next */
  float linear, cubic;
  int bf16, threads;
} Activation;

TARGET static void work(void *argument) {
  const Activation *a = argument;
  const long number = a->threads > 1 ? dovetail_thread_number() : 0;
  const long threads = a->threads > 1 ? dovetail_team_size() : 1;
  const long vectors = (a->width + 15) / 16, count = a->rows * vectors;
  const Floats one = every(1.0f);
  const Ints sign = every_int((int)0x80000000);
  const Floats linear = every(a->linear), cubic = every(a->cubic);
  for (long i = count * number / threads; i < count * (number + 1) / threads; i++) {
    const long row = i / vectors, at = i % vectors * 16;
    const Floats x = load(a->input, row * a->step + at, a->width - at, a->bf16);
    const Floats y = times(x, times_plus(cubic, times(x, x), linear));
    /* exp(-|y|) */
    const Floats small = exponential(floats_of(either(bits_of(y), sign)));
    const Floats gate = over(choose(at_least(y, zeros()), one, small), plus(one, small));
    Floats result = times(x, gate);
    if (a->factor) {
      if (a->bf16) result = widen(narrow(result));
      result = times(result, load(a->factor, row * a->factor_step + at, a->width - at, a->bf16));
    }
    store(a->output, row * a->width + at, a->width - at, a->bf16, result);
  }
}

void dovetail_activation(const void *input, const void *factor, void *output, long rows, long width, long step,
                         long factor_step, float linear, float cubic, int bf16, int threads) {
  if (rows * width < ALONE) threads = 1;
  const Activation task = {input, factor, output, rows, width, step, factor_step, linear, cubic, bf16, threads};
  if (threads > 1) dovetail_parallel(work, (void *)&task, (unsigned)threads, 0);
  else work((void *)&task);
}
