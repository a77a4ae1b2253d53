// Depthwise convolution over frames, global layer norm, PReLU: the unit of which U-Conv blocks are made. And the gated
// sum of two rates that joins their levels.
//
//   y_t   = bias + sum_k w_k x_{t stride - taps/2 + k}             or y = x + bias where w is null
//   n     = gamma (y - mean) rstd + beta                           or n = y where gamma is null
//   out_t = act(n_t) gate_{i(t)} + shift_{i(t)}                    act(n) = n if n > 0 else slope n, or sigmoid(n)
//
// mean, rstd over channels and frames of an item; i(t) = index[t], or t where index is null; w, bias, gate, shift may be
// null. The gated sum alone, for training:
//
//   gated = local_t sigmoid(gate_{i(t)}) + shift_{i(t)}
//
// And the sum of a map and of windows of a finer one, weighed (adaptive average pooling):
//
//   pooled_j = total_j + sum_k weight_jk x_{index[j span + k]}
//
// x (batch, frames_in, channels); y, out, local (batch, frames, channels); gate, shift (batch, coarse, channels);
// w (taps, channels), taps odd; total, pooled (batch, coarse, channels), weight (coarse, span). frames = (frames_in - 1) / stride + 1. All float, contiguous.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { EDGESEP_NORM_MAX_TAPS = 7, EDGESEP_NORM_MAX_PARTS = 16 };

typedef struct {
  const float *x, *w, *bias, *gamma, *beta, *slope;  // slope: one value, or null without PReLU
  const float *gate, *shift;
  const int64_t* index;
  float *y, *stats, *out;  // y (may be out) is written where there are w or bias and gamma; stats (batch, 2) or null
  double* sums;            // workspace, (batch, edgesep_conv_norm_parts, 2)
  int64_t batch, frames_in, frames, channels, taps, stride, coarse;
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
  const float *total, *x, *weight;
  const int64_t* index;  // (coarse, span)
  float* out;
  int64_t batch, frames, coarse, span, channels;
} EdgesepPooled;

// Two passes: all rows of the first (none is needed without gamma), then all of the second. A row is one of the parts
// of an item, edgesep_conv_norm_rows together; into how many an item is cut depends on its size alone, so that the sums
// do too.
static inline int64_t edgesep_conv_norm_parts(const EdgesepConvNorm* s) {
  const int64_t most = EDGESEP_NORM_MAX_PARTS, parts = s->frames * s->channels / 16384;
  return parts < 1 ? 1 : parts < most ? parts : most;
}
int64_t edgesep_conv_norm_rows(const EdgesepConvNorm*);
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
