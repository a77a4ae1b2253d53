// The steps of an LSTM whose inputs were projected before, for sets of rows that may read the same frames.
//
//   g_l   = gates_{order_ls} + h_{l-1} recurrent                       set s, each row on its own
//   c_l   = sigmoid(g_f) c_{l-1} + sigmoid(g_i) tanh(g_c)
//   h_l   = sigmoid(g_o) tanh(c_l)
//
// gates (frames, rows, 4, hidden) hold both biases, and like recurrent the gates in ONNX's order: input, output, forget,
// cell. recurrent (groups, hidden, 4, 16) has 16 channels of what is made at a time, the last group filled up with zeros,
// so that what a register needs lies side by side. order (steps, sets): the frame that a set reads at a step, below 0
// where it stays as it is; null for one frame after another. initial_h, initial_c (sets, rows, hidden). y (steps, sets,
// rows, hidden): h after each step; last_h, last_c (sets, rows, hidden), may be null. All float, contiguous.
//
// The matrix may be in eight bits instead, with a scale for each channel of each gate: bytes (groups, hidden / 4 rounded
// up, 4, 16, 4) hold four hidden inputs side by side, zeros behind the last one; scale (groups, 4, 16). Then, where a
// processor sums products of integers, h, which lies within -1 and 1, is rounded to steps of 1/127 in that product alone
// (an initial_h beyond is cut off in it): a quarter to read, and four products at a time where there are those of bytes.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { EDGESEP_LSTM_GROUP = 16 };

typedef struct {
  const float *gates, *recurrent, *initial_h, *initial_c;
  const int8_t* bytes;  // instead of recurrent
  const float* scale;   // of bytes
  const int64_t* order;
  float *y, *last_h, *last_c;
  int64_t frames, steps, sets, rows, hidden;
} EdgesepLstm;

// A block is a few rows of every set, through all steps: sets that are held in turn cost every thread the same.
static inline int64_t edgesep_lstm_blocks(const EdgesepLstm* s) {
  const int64_t made = (s->rows + 5) / 6;
  return made > 1 || s->rows < 2 ? made : 2;
}
void edgesep_lstm(const EdgesepLstm*, int64_t first, int64_t end);

#ifdef __cplusplus
}
#endif
