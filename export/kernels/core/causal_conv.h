// edgesep::CausalConv1dSilu version 1: depthwise convolution over the past, then silu.
//
//   y_t = silu(bias + sum_k w_k x_{t - taps + 1 + k})        zeros before the start; from the end if reverse
//
// x, y (batch, length, channels); w (channels, taps); bias (channels). All float, contiguous.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { EDGESEP_CONV_MAX_TAPS = 8 };

typedef struct {
  const float *x, *w, *bias;
  float* y;
  int64_t batch, length, channels, taps;
  int32_t reverse;
  int32_t rough;  // silu may be wrong by 2e-4: as bfloat16 beside it is
} EdgesepConv;

// dx is written; dw (channels, taps) and dbias (channels) are added to.
typedef struct {
  const float *x, *w, *bias, *dy;
  float *dx, *dw, *dbias;
  int64_t batch, length, channels, taps;
  int32_t reverse;
} EdgesepConvBackward;

int64_t edgesep_conv_rows(const EdgesepConv*);
void edgesep_conv(const EdgesepConv*, int64_t first_row, int64_t end_row);
// Batch items [first, end); calls that run at the same time need dw and dbias of their own.
void edgesep_conv_backward(const EdgesepConvBackward*, int64_t first, int64_t end);

#ifdef __cplusplus
}
#endif
