// A matrix meets all windows of a sequence, each a step behind the one before: a convolution, of which a fast algorithm
// needs three products where the plain one takes four, and so again for each half of the taps (Winograd's F(2, 2), or
// the fast FIR algorithm): for 8 taps 27 instead of 64.
//
//   y_i = sum_k x_{i+k} W_k for `taps` windows i; A, B, C the x_{i+k} of the lower and upper half of taps and windows:
//   [y_lo]   [A B] [W_lo]                  B (W_lo + W_hi) + (A - B) W_lo
//   [y_hi] = [B C] [W_hi]                  B (W_lo + W_hi) + (C - B) W_hi
//
// What is shared comes first, and the rest is summed on top of it. All sums of W are made beforehand, in this order:
// weight (groups, parts, channels, 32), parts = 3^log2(taps): 32 outputs at a time, zeros behind the last one. 4 or 8
// taps: what separators have.
#pragma once
#include <cstdint>

#include "window_product.h"
#include "vec.h"

namespace edgesep {
constexpr int64_t kUnfoldedGroup = EDGESEP_UNFOLDED_GROUP;


namespace EDGESEP_ISA {

constexpr int64_t kUnfoldedBlocks = kRegisters == 32 ? 12 : 6;  // blocks of `taps` windows at a time
constexpr int64_t kUnfoldedTaps = 8;

// What the sums of W meet, for `blocks` blocks of windows that may lie anywhere: rows (blocks, 2 taps - 1), each of
// `channels`. `pairs`: the weight is in pairs of bfloat16, of channels that lie side by side, and so are the parts where
// they meet as such (kPairProducts).
void unfold(const float* const* rows, int64_t channels, int64_t taps, int64_t blocks, bool pairs, float* parts);
int64_t unfolded_size(int64_t channels, int64_t taps);  // of parts, whatever the blocks

// weight (groups, parts, channels, 32) of a matrix in bytes, (taps x channels, outputs) as window_product.h has them, of
// which `scale` (outputs) are the scales.
void unfold_bytes(const int8_t* bytes, const float* scale, int64_t channels, int64_t taps, int64_t outputs, float* weight);

// The first `windows` of the blocks: y (windows, outputs), times scale (windows) unless that is null.
void unfolded_product(const float* parts, int64_t blocks, int64_t channels, int64_t taps, const float* weight,
                      int64_t outputs, const float* scale, int64_t windows, bool pairs, float* y);

}  // namespace EDGESEP_ISA
}  // namespace edgesep
