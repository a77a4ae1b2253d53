// What a caller hands over, checked once for every adapter: shapes by the contract's order of inputs.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "causal_conv.h"
#include "conv_norm.h"
#include "head_norm.h"
#include "lstm_steps.h"
#include "mamba.h"
#include "past_attention.h"
#include "selective_scan.h"
#include "window_product.h"

namespace edgesep {

// A shape, which needs no memory of its own: an operator checks half a dozen of them in every call, and a stream's
// calls take little longer than that.
class Dims {
 public:
  Dims() = default;
  Dims(std::initializer_list<int64_t> given) { assign(given.begin(), given.end()); }
  template <class From>
  void assign(From first, From end) {
    resize(static_cast<size_t>(end - first));
    std::copy(first, end, dims_.begin());
  }
  void resize(size_t rank) {
    if (rank > dims_.size()) throw std::length_error("an input has " + std::to_string(rank) + " axes, at most 8 fit");
    rank_ = rank;
  }
  size_t size() const { return rank_; }
  bool empty() const { return !rank_; }
  int64_t* data() { return dims_.data(); }
  const int64_t* data() const { return dims_.data(); }
  const int64_t* begin() const { return data(); }
  const int64_t* end() const { return data() + rank_; }
  int64_t& operator[](size_t i) { return dims_[i]; }
  int64_t operator[](size_t i) const { return dims_[i]; }
  int64_t back() const { return dims_[rank_ - 1]; }
  bool operator==(const Dims& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }
  bool operator!=(const Dims& other) const { return !(*this == other); }

 private:
  std::array<int64_t, 8> dims_{};
  size_t rank_ = 0;
};

// One input: its dimensions, or `given` false where an optional input is left out.
struct Input {
  bool given = false;
  Dims dims;
};

// u, delta, A, B, C, D, z, delta_bias, initial_state
constexpr int kScanInputs = 9, kScanRequired = 5;
extern const char* const kScanNames[kScanInputs];

// x, weight, bias
constexpr int kConvInputs = 3;
extern const char* const kConvNames[kConvInputs];

// x, weight, bias, gamma, beta, gate, shift, index, x_stats, x_bias, x_gamma, x_beta, x_shift, x_index
constexpr int kNormInputs = 14, kNormRequired = 1, kNormIndex = 7, kNormReadIndex = 13;
extern const char* const kNormNames[kNormInputs];

// x, bias
constexpr int kStatsInputs = 2, kStatsRequired = 1;

// total, x, index, weight, x_stats, x_bias, x_gamma, x_beta
constexpr int kPooledInputs = 8, kPooledRequired = 4, kPooledIndex = 2;
extern const char* const kPooledNames[kPooledInputs];

// x, gain, bias, slope
constexpr int kHeadNormInputs = 4, kHeadNormRequired = 3, kHeadNormSlope = 3;
extern const char* const kHeadNormNames[kHeadNormInputs];

// q, k, v, past_k, past_v, hidden
constexpr int kAttentionInputs = 6;
extern const char* const kAttentionNames[kAttentionInputs];

// gates, recurrent, initial_h, initial_c, order
constexpr int kLstmInputs = 6, kLstmRequired = 4, kLstmRecurrent = 1, kLstmOrder = 4, kLstmScale = 5;
extern const char* const kLstmNames[kLstmInputs];

// x, weight, bias, index, slope, residual, scale
constexpr int kWindowInputs = 7, kWindowRequired = 3, kWindowWeight = 1, kWindowIndex = 3, kWindowScale = 6;
constexpr int64_t kNoRow = -1;  // in an index: zeros
extern const char* const kWindowNames[kWindowInputs];

// x, in, conv_weight, conv_bias, states, steps, step_bias, A, D, out, through, bias, in_scale, states_scale, out_scale
constexpr int kMambaInputs = 15, kMambaRequired = 12, kMambaScale = 12;
extern const char* const kMambaNames[kMambaInputs];
constexpr bool mamba_bytes(size_t i) { return i == 1 || i == 4 || i == 9; }  // in, states, out: where they have scales
constexpr bool mamba_pairs(size_t i) { return mamba_bytes(i) || i == 10; }   // through, too; where they have none
inline std::array<const float**, kMambaInputs> mamba_inputs(EdgesepMamba* s) {
  return {&s->x,         &s->in, &s->conv_weight, &s->conv_bias, &s->states,  &s->steps,
          &s->step_bias, &s->A,  &s->D,           &s->out,       &s->through, &s->bias,
          &s->in_scale,  &s->states_scale, &s->out_scale};
}

// Empty and the sizes filled in, or a sentence that names the input, what came and what was expected.
std::string check_scan(const std::vector<Input>& inputs, EdgesepScan* sizes);
std::string check_conv(const std::vector<Input>& inputs, EdgesepConv* sizes);
std::string check_norm(const std::vector<Input>& inputs, int64_t stride, EdgesepConvNorm* sizes);
std::string check_pooled(const std::vector<Input>& inputs, EdgesepPooled* sizes);
std::string check_stats(const std::vector<Input>& inputs, EdgesepConvNorm* sizes);
// Of a projection, `first` is given.
std::string check_head_norm(const std::vector<Input>& inputs, EdgesepHeadNorm* sizes);
std::string check_attention(const std::vector<Input>& inputs, EdgesepAttention* sizes);
std::string check_lstm(const std::vector<Input>& inputs, EdgesepLstm* sizes);
std::string check_windows(const std::vector<Input>& inputs, EdgesepWindows* sizes);
// Of a Mamba block, `pairs` is given.
std::string check_mamba(const std::vector<Input>& inputs, EdgesepMamba* sizes);

// Empty, or a sentence where an index lies outside [low, size).
std::string check_index(const int64_t* index, int64_t count, int64_t size, int64_t low = 0);

}  // namespace edgesep
