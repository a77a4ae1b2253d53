// edgesep::BidirectionalMamba version 1: windows of rows through a Mamba block forwards and another one backwards, and
// back to rows. A row's maps stay in the caches, and nothing of them is moved on the way.
//
//   w_m = (x_m, ..., x_{m + taps - 1})                        a window starts at every step of a row
//   u, z = In_d w_m / sqrt(mean(w_m^2) + epsilon)             for d forwards and backwards
//   v = silu(conv(u)); t, B, C = States_d v; s = scan(v, Steps_d t, A_d, B, C, D_d, z)      the operators of that name
//   p_m = sum_d Out_d s + Through w_m                         of taps x channels
//   y_n = bias + sum_k p_{n - k, k}
//
// x (rows, channels, length); y (rows, length, channels); taps 4 or 8. in (2, 2, groups, parts, channels, 32), u before
// z, and through (groups, parts, channels, 32) as unfolded_product.h says; conv_weight (2, inner, conv_taps); conv_bias,
// step_bias, D (2, inner); A (2, inner, state); states, steps, out (2, ...): matrices of rank + 2 state, inner and
// taps x channels outputs as window_product.h has them; bias (channels). All float, contiguous.
//
// With `pairs`, in, states, out and through hold two bfloat16 in the bits of each float: rows that lie side by side, of
// which there are half as many then. What they meet is rounded, too, where the processor gains by it. channels and inner
// must be even, and the scan is a rough one.
//
// With in_scale (2, 2, inner), states_scale (2, rank + 2 state) and out_scale (2, taps x channels), in, states and out hold
// signed bytes as window_product.h has them, of which those are the scales; what they meet is rounded to eight bits, each
// window for itself, in (2, 2, groups, 1, taps x channels / 4, 256) only where the processor sums products of bytes. Then
// inner must be a multiple of 4, and the scan is a rough one.
#pragma once
#include "window_product.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const float *x, *in, *conv_weight, *conv_bias, *states, *steps, *step_bias, *A, *D, *out, *through, *bias;
  const float *in_scale, *states_scale, *out_scale;
  float* y;
  int64_t rows, channels, length, taps, inner, rank, state, conv_taps;
  float epsilon;
  int32_t pairs;
} EdgesepMamba;

void edgesep_mamba(const EdgesepMamba*, int64_t first_row, int64_t end_row);

#ifdef __cplusplus
}
#endif
