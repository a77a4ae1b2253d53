// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
//
// A few blocks of windows of one row at a time: what a direction makes of them stays in the second-level cache. From one
// piece to the next it keeps the last inputs of the convolution and the state of the scan.
#include "mamba.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "causal_conv.h"
#include "selective_scan.h"
#include "unfolded_product.h"
#include "vec.h"
#include "window_product.h"

namespace edgesep {
namespace EDGESEP_ISA {

namespace {

// Floats that begin with a cache line.
template <class T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  Aligned() = default;
  template <class Other>
  Aligned(const Aligned<Other>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
using Floats = std::vector<float, Aligned<float>>;

Floats floats(int64_t count) { return Floats(static_cast<size_t>(count)); }

int64_t rounded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

class Block {
 public:
  explicit Block(const EdgesepMamba& s)
      : s_(s),
        windows_(s.length - s.taps + 1),
        piece_(at_a_time(windows_, s.taps)),
        history_((s.conv_taps - 1) * s.inner),
        parts_size_(unfolded_size(s.channels, s.taps)),
        x_(floats(s.length * s.channels)),
        squares_(floats(s.length)),
        scale_(floats(windows_)),
        parts_(floats((windows_ + piece_ - 1) / piece_ * parts_size_)),
        u_(floats(piece_ * s.inner + 2 * history_)),
        v_(floats(piece_ * s.inner + 2 * history_)),
        z_(floats(piece_ * s.inner)),
        mixed_(floats(piece_ * (s.rank + 2 * s.state))),
        steps_(floats(piece_ * s.rank)),
        B_(floats(piece_ * s.state)),
        C_(floats(piece_ * s.state)),
        state_(floats(rounded(s.inner, kRowChannels) * s.state)),
        made_(floats(piece_ * s.taps * s.channels)),
        pairs_(floats(s.pairs && kPairProducts ? piece_ * s.inner / 2 : 0)),
        zeros_(floats(std::max({s.inner, s.taps * s.channels, s.rank + 2 * s.state}))),
        rough_(s.pairs || s.in_scale),
        direct_(s.in_scale && edgesep_sums_bytes()),
        in_(s.in) {
    const int64_t outputs = s.taps * s.channels, mixed = s.rank + 2 * s.state;
    for (int way = 0; way < 2; ++way) {
      states_[way] = matrix(s.states, s.states_scale, way, s.inner, mixed);
      out_[way] = matrix(s.out, s.out_scale, way, s.inner, outputs);
    }
    if (!s.in_scale) return;
    room_ = floats(piece_ * std::max(s.inner, outputs));
    row_steps_ = floats(piece_);
    for (int half = 0; half < 4; ++half) halves_[half] = matrix(s.in, s.in_scale, half, outputs, s.inner, direct_);
    if (direct_) return;
    in_unfolded_ = floats(4 * unfolded_matrix());
    for (int half = 0; half < 4; ++half)
      unfold_bytes(bytes_of(halves_[half]), halves_[half].scale, s.channels, s.taps, s.inner,
                   in_unfolded_.data() + half * unfolded_matrix());
    in_ = in_unfolded_.data();
  }

  void row(int64_t row) {
    read(s_.x + row * s_.channels * s_.length);
    float* const y = s_.y + row * s_.length * s_.channels;
    for (int64_t n = 0; n < s_.length; ++n) std::copy(s_.bias, s_.bias + s_.channels, y + n * s_.channels);
    const int64_t pieces = (windows_ + piece_ - 1) / piece_;
    for (int way = 0; way < 2; ++way) {
      std::fill(u_.begin(), u_.end(), 0.0f);
      std::fill(state_.begin(), state_.end(), 0.0f);
      for (int64_t i = 0; i < pieces; ++i) piece(way, way ? pieces - 1 - i : i, y);
    }
  }

 private:
  // Windows of a piece: whole blocks, and as many in each piece.
  static int64_t at_a_time(int64_t windows, int64_t taps) {
    const int64_t blocks = (windows + taps - 1) / taps, pieces = (blocks + kUnfoldedBlocks - 1) / kUnfoldedBlocks;
    return (blocks + pieces - 1) / pieces * taps;
  }

  // A matrix as window_product.h has it; in bytes if it has a scale, and then with what its sums begin with.
  struct Matrix {
    const float *weight, *scale;
    int64_t inputs, outputs;
    std::vector<int32_t> begin;
  };

  static const int8_t* bytes_of(const Matrix& m) { return reinterpret_cast<const int8_t*>(m.weight); }

  // One of some matrices that lie one behind the other.
  Matrix matrix(const float* weight, const float* scale, int which, int64_t inputs, int64_t outputs, bool met = true) {
    const int64_t in_a_float = scale ? 4 : s_.pairs ? 2 : 1, wide = rounded(outputs, EDGESEP_WINDOW_GROUP);
    Matrix made{weight + which * (inputs / in_a_float) * wide, scale ? scale + which * outputs : nullptr, inputs,
                outputs, {}};
    if (!scale || !met) return made;
    made.begin.resize(static_cast<size_t>(wide));
    const int8_t* unit = bytes_of(made);
    for (size_t group = 0; group < made.begin.size(); group += EDGESEP_WINDOW_GROUP)
      for (int64_t i = 0; i < inputs / 4; ++i)
        for (size_t n = 0; n < EDGESEP_WINDOW_GROUP; ++n, unit += 4)
          made.begin[group + n] -= 128 * (unit[0] + unit[1] + unit[2] + unit[3]);
    return made;
  }

  // Numbers of a matrix for the fast algorithm of `inner` outputs.
  int64_t unfolded_matrix() const {
    return rounded(s_.inner, kUnfoldedGroup) * edgesep_unfolded_parts(s_.taps) * s_.channels;
  }

  // The row as (length, channels), the factor of each window and the parts of every piece.
  void read(const float* x) {
    for (int64_t n = 0; n < s_.length; ++n) {
      float sum = 0;
      for (int64_t c = 0; c < s_.channels; ++c) {
        const float value = x[c * s_.length + n];
        x_[static_cast<size_t>(n * s_.channels + c)] = value;
        sum += value * value;
      }
      squares_[static_cast<size_t>(n)] = sum;
    }
    for (int64_t m = 0; m < windows_; ++m) {
      float sum = 0;
      for (int64_t k = 0; k < s_.taps; ++k) sum += squares_[static_cast<size_t>(m + k)];
      sum = sum / static_cast<float>(s_.taps * s_.channels) + s_.epsilon;
      scale_[static_cast<size_t>(m)] = 1 / std::sqrt(sum);
    }
    const int64_t steps = 2 * s_.taps - 1, blocks = piece_ / s_.taps;
    const float* rows[(2 * kUnfoldedTaps - 1) * kUnfoldedBlocks];
    for (int64_t begin = 0, i = 0; begin < windows_; begin += piece_, ++i) {
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t step = 0; step < steps; ++step) {
          const int64_t at = begin + b * s_.taps + step;
          rows[b * steps + step] = at < s_.length ? x_.data() + at * s_.channels : zeros_.data();
        }
      unfold(rows, s_.channels, s_.taps, blocks, s_.pairs, parts_.data() + i * parts_size_);
    }
  }

  // Rows of x, one behind the other, times a matrix. In pairs, x is made so where they meet as such.
  void product(const float* x, int64_t rows, const Matrix& by, float* y, const float* residual = nullptr) {
    if (by.scale) return product_of_bytes(rounded_to_bytes(x, rows, by.inputs, by.inputs), by, y, residual);
    const bool both = s_.pairs && kPairProducts;
    if (both) to_pairs(x, rows * by.inputs, pairs_.data());
    EdgesepWindows w{};
    w.x = both ? pairs_.data() : x, w.weight = by.weight, w.bias = zeros_.data(), w.residual = residual, w.y = y;
    w.rows = w.windows = rows, w.inputs = s_.pairs ? by.inputs / 2 : by.inputs, w.taps = 1;
    w.outputs = by.outputs, w.pairs = s_.pairs;
    edgesep_window_product(&w, 0, edgesep_window_rows(&w));
  }

  // `rows` of x, `apart` from one to the next, rounded; what is made of them is multiplied by `scale` (rows), if that is
  // there.
  EdgesepWindows rounded_to_bytes(const float* x, int64_t rows, int64_t inputs, int64_t apart,
                                  const float* scale = nullptr) {
    EdgesepWindows w{};
    w.x = x, w.rows = w.windows = rows, w.inputs = inputs, w.apart = apart, w.taps = 1;
    w.bias = zeros_.data(), w.room = room_.data(), w.steps = row_steps_.data();
    edgesep_rounded_rows(&w, 0, rows);
    for (int64_t m = 0; scale && m < rows; ++m) w.steps[m] *= scale[m];
    return w;
  }

  static void product_of_bytes(EdgesepWindows w, const Matrix& by, float* y, const float* residual = nullptr) {
    w.bytes = bytes_of(by), w.scale = by.scale, w.begin = by.begin.data(), w.outputs = by.outputs;
    w.residual = residual, w.y = y;
    edgesep_rounded_product(&w, 0, edgesep_window_rows(&w));
  }

  void piece(int way, int64_t index, float* y) {
    const int64_t begin = index * piece_, count = std::min(piece_, windows_ - begin), inner = s_.inner;
    const int64_t rank = s_.rank, state = s_.state, mixed = rank + 2 * state, outputs = s_.taps * s_.channels;
    const auto unfolded = [&](const float* weight, int64_t made, const float* factor, float* to) {
      unfolded_product(parts_.data() + index * parts_size_, piece_ / s_.taps, s_.channels, s_.taps, weight, made, factor,
                       count, s_.pairs, to);
    };
    const float* const scale = scale_.data() + begin;
    // Rows of u and v: what came before, the piece, what comes after (and was before for the way back).
    if (direct_) {
      const EdgesepWindows w = rounded_to_bytes(x_.data() + begin * s_.channels, count, outputs, s_.channels, scale);
      product_of_bytes(w, halves_[2 * way], u_.data() + history_);
      product_of_bytes(w, halves_[2 * way + 1], z_.data());
    } else {
      const int64_t half = unfolded_matrix() / (s_.pairs ? 2 : 1);
      unfolded(in_ + 2 * way * half, inner, scale, u_.data() + history_);
      unfolded(in_ + (2 * way + 1) * half, inner, scale, z_.data());
    }
    EdgesepConv c{};
    c.x = u_.data() + (way ? history_ : 0), c.y = v_.data() + (way ? history_ : 0);
    c.w = s_.conv_weight + way * inner * s_.conv_taps, c.bias = s_.conv_bias + way * inner;
    c.batch = 1, c.length = count + s_.conv_taps - 1, c.channels = inner, c.taps = s_.conv_taps;
    c.reverse = way, c.rough = rough_;
    edgesep_conv(&c, 0, edgesep_conv_rows(&c));
    const float* const kept = u_.data() + (way ? history_ : count * inner);
    std::memmove(u_.data() + (way ? history_ + piece_ * inner : 0), kept, static_cast<size_t>(history_) * sizeof(float));

    product(v_.data() + history_, count, states_[way], mixed_.data());
    for (int64_t m = 0; m < count; ++m) {
      const float* const from = mixed_.data() + m * mixed;
      std::copy(from, from + rank, steps_.data() + m * rank);
      std::copy(from + rank, from + rank + state, B_.data() + m * state);
      std::copy(from + rank + state, from + mixed, C_.data() + m * state);
    }
    EdgesepScan r{};
    r.u = v_.data() + history_, r.low = steps_.data(), r.rank = rank;
    r.steps = s_.steps + way * rank * rounded(inner, EDGESEP_WINDOW_GROUP);
    r.A = s_.A + way * inner * state, r.B = B_.data(), r.C = C_.data();
    r.D = s_.D + way * inner, r.z = z_.data(), r.delta_bias = s_.step_bias + way * inner;
    r.initial_state = r.last_state = state_.data();
    r.y = u_.data() + history_;  // no longer needed: what the next piece needs of it was kept
    r.batch = 1, r.length = count, r.channels = inner, r.state = state;
    r.delta_softplus = 1, r.reverse = way, r.rough = rough_, r.grouped = 1;
    edgesep_scan(&r, 0, edgesep_scan_rows(&r));

    if (!way) unfolded(s_.through, outputs, nullptr, made_.data());
    product(u_.data() + history_, count, out_[way], made_.data(), way ? nullptr : made_.data());
    for (int64_t m = 0; m < count; ++m) {  // the taps of a window are rows of y that lie side by side
      float* const to = y + (begin + m) * s_.channels;
      for (int64_t i = 0; i < outputs; ++i) to[i] += made_[static_cast<size_t>(m * outputs + i)];
    }
  }

  const EdgesepMamba& s_;
  const int64_t windows_, piece_, history_, parts_size_;
  Floats x_, squares_, scale_, parts_, u_, v_, z_, mixed_, steps_, B_, C_, state_, made_, pairs_, zeros_;
  Floats room_, row_steps_;
  Matrix states_[2], out_[2], halves_[4];
  const bool rough_, direct_;  // direct: windows meet bytes
  const float* in_;
  Floats in_unfolded_;
};

}  // namespace

void mamba(const EdgesepMamba* s, int64_t first, int64_t end) {
  Block block(*s);
  for (int64_t row = first; row < end; ++row) block.row(row);
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
