// The unit of which U-Conv blocks are made: depthwise convolution over frames, global layer norm, activation, and the
// gated sum that joins two rates. Each step is optional.
//
//   u_i   = act(x_gamma (x_i + x_bias - mean) rstd + x_beta) + x_shift_{j(i)}     what is read; mean, rstd in x_stats
//   y_t   = bias + sum_k w_k u_{t stride - taps/2 + k}             or u + bias where w is null
//   n     = gamma (y - mean) rstd + beta                           or n = y where gamma is null
//   out_t = act(n_t) gate_{i(t)} + shift_{i(t)}                    act(n) = n if n > 0 else slope n, or sigmoid(n)
//
// mean, rstd over channels and frames of an item; i(t) = index[t], or t where index is null, j likewise. Where gamma is
// null and stats is not, the norm is left to the readers: out is y, and stats are those of y. That saves writing a map
// and reading it again, which is what these nets spend their time on. The gated sum alone, for training:
//
//   gated = local_t sigmoid(gate_{i(t)}) + shift_{i(t)}
//
// And the sum of a map and of windows of a finer one, weighed (adaptive average pooling):
//
//   pooled_j = total_j + sum_k weight_jk u_{index[j span + k]}     u as above, without shift
//
// x (batch, frames_in, channels); x_shift (batch, x_coarse, channels); y, out, local (batch, frames, channels);
// gate, shift (batch, coarse, channels); w (taps, channels), taps odd; total, pooled (batch, coarse, channels);
// weight (coarse, span). frames = (frames_in - 1) / stride + 1. All float, contiguous.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { EDGESEP_NORM_MAX_TAPS = 7, EDGESEP_NORM_MAX_PARTS = 16 };

typedef struct {
  const float *x, *x_stats, *x_bias, *x_gamma, *x_beta, *x_slope, *x_shift;  // slopes: one value, or null
  const int64_t* x_index;
  const float *w, *bias, *gamma, *beta, *slope, *gate, *shift;
  const int64_t* index;
  // y (may be out) is written before a norm, or made twice where it is null; stats (batch, 2): mean, rstd
  float *y, *stats, *out;
  double* sums;            // workspace, (batch, edgesep_conv_norm_parts, 2)
  int64_t batch, frames_in, frames, channels, taps, stride, coarse, x_coarse;
  float eps;
  int32_t sigmoid;
} EdgesepConvNorm;

// y is the forward's (x where w is null). dx is written; dw, dbias, dgamma, dbeta, dslope are added to.
typedef struct {
  const float *x, *w, *gamma, *beta, *slope, *y, *stats, *dout;
  float *dx, *dw, *dbias, *dgamma, *dbeta, *dslope;
  float* workspace;  // frames * channels floats
  int64_t batch, frames_in, frames, channels, taps, stride;
} EdgesepConvNormBackward;

typedef struct {
  const float *local, *gate, *shift;
  const int64_t* index;
  float* out;
  int64_t batch, frames, coarse, channels;
} EdgesepGated;

// dlocal, dgate and dshift are written.
typedef struct {
  const float *local, *gate, *dout;
  const int64_t* index;
  float *dlocal, *dgate, *dshift;
  int64_t batch, frames, coarse, channels;
} EdgesepGatedBackward;

typedef struct {
  const float *total, *x, *x_stats, *x_bias, *x_gamma, *x_beta, *x_slope, *weight;
  const int64_t* index;  // (coarse, span)
  float* out;
  int64_t batch, frames, coarse, span, channels;
} EdgesepPooled;

// Two passes: all rows of the first (not needed without gamma and stats), then all of the second. A row is one of the
// parts of an item, edgesep_conv_norm_rows together; into how many an item is cut depends on its size alone, so that
// the sums do too.
static inline int64_t edgesep_conv_norm_parts(const EdgesepConvNorm* s) {
  const int64_t most = EDGESEP_NORM_MAX_PARTS, parts = s->frames * s->channels / 16384;
  return parts < 1 ? 1 : parts < most ? parts : most;
}
int64_t edgesep_conv_norm_rows(const EdgesepConvNorm*);
// Whether it is cheaper to make y twice: the convolution is, while what changes on the way to it is not.
static inline int edgesep_conv_norm_twice(const EdgesepConvNorm* s) { return s->gamma && !s->x_stats && !s->x_shift; }
void edgesep_conv_norm_sums(const EdgesepConvNorm*, int64_t first, int64_t end);
void edgesep_conv_norm_apply(const EdgesepConvNorm*, int64_t first, int64_t end);

// Rows are batch x coarse.
void edgesep_pooled(const EdgesepPooled*, int64_t first, int64_t end);

// Batch items [first, end) each; backward calls that run at the same time need sums of their own.
void edgesep_conv_norm_backward(const EdgesepConvNormBackward*, int64_t first, int64_t end);
void edgesep_gated(const EdgesepGated*, int64_t first, int64_t end);
void edgesep_gated_backward(const EdgesepGatedBackward*, int64_t first, int64_t end);

#ifdef __cplusplus
}
#endif
