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
  const long vectors = (a->width + 15) / 16, all = a->rows * vectors;
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512i sign = _mm512_set1_epi32((int)0x80000000);
  const __m512 linear = _mm512_set1_ps(a->linear), cubic = _mm512_set1_ps(a->cubic);
  for (long i = all * number / threads; i < all * (number + 1) / threads; i++) {
    const long row = i / vectors, at = i % vectors * 16;
    const __m512 x = load(a->input, row * a->step + at, a->width - at, a->bf16);
    const __m512 y = _mm512_mul_ps(x, _mm512_fmadd_ps(cubic, _mm512_mul_ps(x, x), linear));
    /* exp(-|y|) */
    const __m512 small = exponential(_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(y), sign)));
    const __m512 above = _mm512_mask_mov_ps(small, _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_GE_OQ), one);
    const __m512 gate = _mm512_div_ps(above, _mm512_add_ps(one, small));
    __m512 result = _mm512_mul_ps(x, gate);
    if (a->factor) {
      if (a->bf16) result = widen(narrow(result));
      result = _mm512_mul_ps(result, load(a->factor, row * a->factor_step + at, a->width - at, a->bf16));
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
