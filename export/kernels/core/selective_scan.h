// edgesep::SelectiveScan version 1: sizes and raw pointers, no framework, no allocation.
//
//   dt  = softplus(delta + delta_bias)              softplus if delta_softplus
//   h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t        from the end if reverse
//   y_t = (h_t . C_t + D u_t) silu(z_t)
//
// u, delta, z, y (batch, length, channels); A (channels, state); B, C (batch, length, state); D, delta_bias (channels);
// initial_state, last_state (batch, channels, state). All float, contiguous; optional pointers may be null. y must not
// overlap an input, because a row may be done twice; last_state may be initial_state.
//
// Where delta is null it is low (batch, length, rank) times steps (groups, rank, 64), a matrix as window_product.h has it.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { EDGESEP_SCAN_MAX_STATE = 64 };

typedef struct {
  const float *u, *delta, *A, *B, *C, *D, *z, *delta_bias, *initial_state, *low, *steps;
  float *y, *last_state;
  int64_t batch, length, channels, state, rank;
  int32_t delta_softplus, reverse;
  int32_t rough;    // exponentials and softplus may be wrong by 1e-4: as bfloat16 beside them is
  int32_t grouped;  // initial_state, last_state are (batch, groups, state, 16): 16 channels side by side
} EdgesepScan;

// Gradients of the same scan from a zero state. du, ddelta and (if given) dz are written; dA, dB, dC,
// dD and ddelta_bias are added to. D, z and delta_bias may be null, and then so are their gradients.
typedef struct {
  const float *u, *delta, *A, *B, *C, *D, *z, *delta_bias, *dy;
  float *du, *ddelta, *dA, *dB, *dC, *dD, *dz, *ddelta_bias;
  float* workspace;  // edgesep_scan_backward_workspace floats, aligned to 64 bytes
  int64_t batch, length, channels, state;
  int32_t delta_softplus, reverse;
} EdgesepScanBackward;

// Rows (16 channels of a batch item) are independent of one another; split them over threads as the host likes.
int64_t edgesep_scan_rows(const EdgesepScan*);
void edgesep_scan(const EdgesepScan*, int64_t first_row, int64_t end_row);

int64_t edgesep_scan_backward_workspace(const EdgesepScanBackward*);
// Batch items [first, end): calls that run at the same time need sums (dA, dD, ddelta_bias) of their own.
void edgesep_scan_backward(const EdgesepScanBackward*, int64_t first, int64_t end);

#ifdef __cplusplus
}
#endif
