// Depthwise convolution over frames, global layer norm, PReLU: the unit of which U-Conv blocks are made. And the gated
// sum of two rates that joins their levels.
//
//   y_t   = bias + sum_k w_k x_{t stride - taps/2 + k}             or y = x where w is null
//   out   = prelu(gamma (y - mean) rstd + beta)                    mean, rstd over channels and frames of an item
//   gated = local_t sigmoid(gate_{i(t)}) + shift_{i(t)}            i(t) = index[t]
//
// x (batch, frames_in, channels); y, out, local (batch, frames, channels); gate, shift (batch, coarse, channels);
// w (taps, channels), taps odd. frames = (frames_in - 1) / stride + 1. All float, contiguous.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { EDGESEP_NORM_MAX_TAPS = 7 };

typedef struct {
  const float *x, *w, *bias, *gamma, *beta, *slope;  // slope: one value, or null without PReLU
  float *y, *stats, *out;                            // y is written where w is given; stats (batch, 2): mean, rstd
  int64_t batch, frames_in, frames, channels, taps, stride;
  float eps;
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

// Batch items [first, end) each; backward calls that run at the same time need sums of their own.
void edgesep_conv_norm(const EdgesepConvNorm*, int64_t first, int64_t end);
void edgesep_conv_norm_backward(const EdgesepConvNormBackward*, int64_t first, int64_t end);
void edgesep_gated(const EdgesepGated*, int64_t first, int64_t end);
void edgesep_gated_backward(const EdgesepGatedBackward*, int64_t first, int64_t end);

#ifdef __cplusplus
}
#endif
