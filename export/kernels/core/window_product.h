// Products of windows of rows with a matrix, and what follows them: a convolution over rows, or the gathering of windows
// in front of a product, without a copy of what windows share.
//
//   y_m = act(bias + sum_k x_{index[m, k]} W_k) + residual_m     x_i is zero for a negative i; act(v) = max(v, slope v)
//
// x (rows, inputs); index (windows, taps), or null: one tap, row m; weight (groups, taps, inputs, 64): W_k for 64 outputs
// at a time, zeros behind the last one; bias, slope (outputs); y, residual (windows, outputs). slope and residual may be
// null. All contiguous.
//
// With a scale (outputs), the product is in eight bits: inputs are rounded to q = x / x_scale + x_zero within 0 and 255, and
// bytes (groups, taps, inputs / 4, 64, 4) hold the matrix as integers, four inputs side by side; inputs are a multiple of
// 4. Then v = bias + scale sum q W; bias makes up for x_zero. First rows are rounded, all of them, into `room`,
// edgesep_window_room floats, then they are multiplied.
//
// With `steps` (rows), each row is rounded for itself: q = x / step + 128, its step max |x| / 127, which is written there.
// Then v = bias + scale step (sum q W - 128 sum W), and `begin` (outputs) holds -128 sum W. A window is one row; a row of x
// begins `apart` floats behind the one before, so that they may overlap.
//
// With `unfolded`, weight is (groups, 3^log2(taps), inputs, 32) for the fast algorithm of unfolded_product.h, and taps
// are 4 or 8: it takes as many windows at a time as there are taps if each is one row behind the one before, fewer if
// not.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { EDGESEP_WINDOW_GROUP = 64, EDGESEP_WINDOW_BLOCK = 12, EDGESEP_UNFOLDED_GROUP = 32, EDGESEP_UNFOLDED_SHARES = 2 };

typedef struct {
  const float *x, *weight, *bias, *slope, *residual, *scale;
  const int8_t* bytes;
  const int64_t* index;
  const int32_t* begin;
  float *room, *steps;
  float* y;
  int64_t rows, inputs, windows, taps, outputs, apart;
  int32_t unfolded;
  // The weight is in pairs of bfloat16, of inputs that lie side by side: `inputs` of them. So is x in an instruction set
  // that sums products of pairs; elsewhere it holds floats, twice as many.
  int32_t pairs;
  float x_scale;
  int32_t x_zero;
} EdgesepWindows;

static inline int64_t edgesep_unfolded_parts(int64_t taps) {
  return taps > 1 ? 3 * edgesep_unfolded_parts(taps / 2) : 1;
}
static inline int64_t edgesep_window_blocks(const EdgesepWindows* s) {
  return (s->windows + EDGESEP_WINDOW_BLOCK - 1) / EDGESEP_WINDOW_BLOCK;
}
// Rows of work: blocks of windows, or of `unfolded` shares of them, of one group of outputs after another.
static inline int64_t edgesep_window_rows(const EdgesepWindows* s) {
  if (s->unfolded)
    return (s->outputs + EDGESEP_UNFOLDED_GROUP - 1) / EDGESEP_UNFOLDED_GROUP * EDGESEP_UNFOLDED_SHARES;
  return (s->outputs + EDGESEP_WINDOW_GROUP - 1) / EDGESEP_WINDOW_GROUP * edgesep_window_blocks(s);
}
static inline int64_t edgesep_window_room(const EdgesepWindows* s) { return s->scale ? s->rows * s->inputs : 0; }
void edgesep_window_product(const EdgesepWindows*, int64_t first, int64_t end);
void edgesep_rounded_rows(const EdgesepWindows*, int64_t first, int64_t end);  // rows of work: rows of x
void edgesep_rounded_product(const EdgesepWindows*, int64_t first, int64_t end);
int edgesep_sums_bytes(void);  // whether such a product takes a quarter of the instructions of one in float

#ifdef __cplusplus
}
#endif
