// Mamba blocks over windows of rows against their contract in float64 (core/mamba.h).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "../core/check.h"
#include "testing.h"

namespace {

// The sums of taps that unfolded_product.h names, of one entry of W.
void append_parts(const Doubles& taps, Doubles* to) {
  if (taps.size() == 1) return to->push_back(taps[0]);
  const auto middle = taps.begin() + static_cast<std::ptrdiff_t>(taps.size() / 2);
  const Doubles low(taps.begin(), middle), high(middle, taps.end());
  Doubles both = low;
  for (size_t i = 0; i < both.size(); ++i) both[i] += high[i];
  for (const Doubles& half : {both, low, high}) append_parts(half, to);
}

}  // namespace

void append_unfolded(const Floats& matrix, int64_t taps, int64_t channels, int64_t outputs, Floats* to) {
  const int64_t group = EDGESEP_UNFOLDED_GROUP, parts = edgesep_unfolded_parts(taps);
  for (int64_t from = 0; from < outputs; from += group) {
    const size_t begin = to->size();
    to->resize(begin + at(parts * channels * group));
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t n = from; n < std::min(from + group, outputs); ++n) {
        Doubles entry, sums;
        for (int64_t k = 0; k < taps; ++k) entry.push_back(matrix[at((k * channels + c) * outputs + n)]);
        append_parts(entry, &sums);
        for (int64_t p = 0; p < parts; ++p)
          (*to)[begin + at((p * channels + c) * group + n - from)] = static_cast<float>(sums[at(p)]);
      }
  }
}

namespace {

constexpr double kPairsDb = 39;  // 8 bits of each factor
constexpr double kBytesDb = 34;  // 8 bits of the largest of a window's

struct Sizes {
  int64_t rows, channels, length, taps, inner, rank, state, conv_taps;
};

class Drawn {
 public:
  // With a variance that keeps a sum of `terms` of them near one.
  Floats fill(int64_t count, int64_t terms = 1) {
    Floats out(at(count));
    for (float& v : out) v = normal_(random_) / std::sqrt(static_cast<float>(terms));
    return out;
  }

 private:
  std::mt19937 random_{11};
  std::normal_distribution<float> normal_;
};

// (inputs, outputs) as window_product.h reads one tap of it, appended.
void append_grouped(const Floats& matrix, int64_t inputs, int64_t outputs, Floats* to) {
  const int64_t group = EDGESEP_WINDOW_GROUP;
  for (int64_t from = 0; from < outputs; from += group)
    for (int64_t k = 0; k < inputs; ++k)
      for (int64_t n = from; n < from + group; ++n) to->push_back(n < outputs ? matrix[at(k * outputs + n)] : 0);
}

// Rows of `width` floats as pairs of bfloat16, two rows in one.
Floats in_pairs(const Floats& rows, int64_t width) {
  const auto half = [](float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return (bits >> 16) + (bits >> 15 & 1);  // ties away from zero: one of them in 65536
  };
  Floats out;
  for (size_t i = 0; i < rows.size(); i += 2 * at(width))
    for (size_t n = i; n < i + at(width); ++n) {
      const uint32_t both = half(rows[n]) | half(rows[n + at(width)]) << 16;
      out.emplace_back();
      std::memcpy(&out.back(), &both, sizeof both);
    }
  return out;
}

double silu(double x) { return x / (1 + std::exp(-x)); }

// (rows, inputs) x (inputs, outputs)
Doubles times(const Doubles& x, const Floats& matrix, int64_t inputs, int64_t outputs) {
  const int64_t rows = static_cast<int64_t>(x.size()) / inputs;
  Doubles y(at(rows * outputs));
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < inputs; ++k)
      for (int64_t n = 0; n < outputs; ++n) y[at(m * outputs + n)] += x[at(m * inputs + k)] * matrix[at(k * outputs + n)];
  return y;
}

// Bytes in place of such a matrix, appended, and their scales; the matrix becomes what they stand for.
void append_bytes(Floats* matrix, int64_t inputs, int64_t outputs, std::vector<int8_t>* to, Floats* scales) {
  const int64_t group = EDGESEP_WINDOW_GROUP;
  for (int64_t n = 0; n < outputs; ++n) {
    float most = 0;
    for (int64_t k = 0; k < inputs; ++k) most = std::max(most, std::fabs((*matrix)[at(k * outputs + n)]));
    scales->push_back(most / 127);
  }
  const float* const scale = scales->data() + scales->size() - at(outputs);
  for (int64_t from = 0; from < outputs; from += group)
    for (int64_t k = 0; k < inputs; k += 4)
      for (int64_t n = from; n < from + group; ++n)
        for (int64_t i = k; i < k + 4; ++i) {
          to->push_back(0);
          if (n >= outputs) continue;
          float& value = (*matrix)[at(i * outputs + n)];
          to->back() = static_cast<int8_t>(std::lround(value / scale[n]));
          value = static_cast<float>(to->back()) * scale[n];
        }
}

const float* as_floats(const std::vector<int8_t>& bytes) { return reinterpret_cast<const float*>(bytes.data()); }

void a_block_equals_the_reference(const Sizes& z, bool pairs = false, bool bytes = false) {
  Drawn drawn;
  const int64_t outputs = z.taps * z.channels, windows = z.length - z.taps + 1, mixed = z.rank + 2 * z.state;
  const Floats x = drawn.fill(z.rows * z.channels * z.length), bias = drawn.fill(z.channels);
  const Floats through = drawn.fill(outputs * outputs, outputs);
  Floats in[2][2], states[2], steps[2], out[2], packed_in, packed_states, packed_steps, packed_out, packed_through;
  Floats in_scale, states_scale, out_scale;
  std::vector<int8_t> in_bytes, states_bytes, out_bytes;
  for (int way = 0; way < 2; ++way) {
    for (Floats& half : in[way]) {
      half = drawn.fill(outputs * z.inner, outputs);
      if (bytes) append_bytes(&half, outputs, z.inner, &in_bytes, &in_scale);
      append_unfolded(half, z.taps, z.channels, z.inner, &packed_in);
    }
    states[way] = drawn.fill(z.inner * mixed, z.inner);
    if (bytes) append_bytes(&states[way], z.inner, mixed, &states_bytes, &states_scale);
    append_grouped(states[way], z.inner, mixed, &packed_states);
    append_grouped(steps[way] = drawn.fill(z.rank * z.inner, z.rank), z.rank, z.inner, &packed_steps);
    out[way] = drawn.fill(z.inner * outputs, z.inner);
    if (bytes) append_bytes(&out[way], z.inner, outputs, &out_bytes, &out_scale);
    append_grouped(out[way], z.inner, outputs, &packed_out);
  }
  append_unfolded(through, z.taps, z.channels, outputs, &packed_through);
  const Floats conv_weight = drawn.fill(2 * z.inner * z.conv_taps, z.conv_taps), conv_bias = drawn.fill(2 * z.inner);
  const Floats step_bias = drawn.fill(2 * z.inner), D = drawn.fill(2 * z.inner);
  Floats A = drawn.fill(2 * z.inner * z.state), y(at(z.rows * z.length * z.channels));
  for (float& v : A) v = -std::fabs(v);
  if (pairs) {
    for (Floats* packed : {&packed_in, &packed_through}) *packed = in_pairs(*packed, EDGESEP_UNFOLDED_GROUP);
    for (Floats* packed : {&packed_states, &packed_out}) *packed = in_pairs(*packed, EDGESEP_WINDOW_GROUP);
  }
  EdgesepMamba s{};
  const float* const given[] = {x.data(), bytes ? as_floats(in_bytes) : packed_in.data(),
                                conv_weight.data(), conv_bias.data(),
                                bytes ? as_floats(states_bytes) : packed_states.data(),
                                packed_steps.data(), step_bias.data(), A.data(), D.data(),
                                bytes ? as_floats(out_bytes) : packed_out.data(), packed_through.data(), bias.data(),
                                bytes ? in_scale.data() : nullptr, bytes ? states_scale.data() : nullptr,
                                bytes ? out_scale.data() : nullptr};
  size_t i = 0;
  for (const float** to : edgesep::mamba_inputs(&s)) *to = given[i++];
  s.y = y.data(), s.epsilon = 1e-3f, s.pairs = pairs;
  s.rows = z.rows, s.channels = z.channels, s.length = z.length, s.taps = z.taps;
  s.inner = z.inner, s.rank = z.rank, s.state = z.state, s.conv_taps = z.conv_taps;
  for (int64_t row = 0; row < z.rows; ++row) edgesep_mamba(&s, row, row + 1);

  Doubles wanted;
  for (int64_t row = 0; row < z.rows; ++row) {
    Doubles w, normed;
    for (int64_t m = 0; m < windows; ++m) {
      double squares = 0;
      for (int64_t k = 0; k < outputs; ++k) {
        w.push_back(x[at((row * z.channels + k % z.channels) * z.length + m + k / z.channels)]);
        squares += w.back() * w.back();
      }
      for (int64_t k = 0; k < outputs; ++k)
        normed.push_back(w[at(m * outputs + k)] / std::sqrt(squares / double(outputs) + 1e-3));
    }
    Doubles made = times(w, through, outputs, outputs);
    for (int way = 0; way < 2; ++way) {
      const auto place = [&](int64_t step) { return way ? windows - 1 - step : step; };
      const Doubles u = times(normed, in[way][0], outputs, z.inner), gate = times(normed, in[way][1], outputs, z.inner);
      Doubles v(u.size()), scanned(u.size());
      for (int64_t t = 0; t < windows; ++t)
        for (int64_t e = 0; e < z.inner; ++e) {
          double sum = conv_bias[at(way * z.inner + e)];
          for (int64_t k = 0; k < z.conv_taps; ++k)
            if (const int64_t from = t - z.conv_taps + 1 + k; from >= 0)
              sum += double(conv_weight[at((way * z.inner + e) * z.conv_taps + k)]) * u[at(place(from) * z.inner + e)];
          v[at(place(t) * z.inner + e)] = silu(sum);
        }
      const Doubles mixing = times(v, states[way], z.inner, mixed);
      Doubles t_(at(windows * z.rank));
      for (int64_t m = 0; m < windows; ++m)
        for (int64_t r = 0; r < z.rank; ++r) t_[at(m * z.rank + r)] = mixing[at(m * mixed + r)];
      const Doubles delta = times(t_, steps[way], z.rank, z.inner);
      Doubles h(at(z.inner * z.state));
      for (int64_t t = 0; t < windows; ++t)
        for (int64_t e = 0; e < z.inner; ++e) {
          const int64_t here = place(t) * z.inner + e, of = way * z.inner + e;
          const double dt = std::log1p(std::exp(delta[at(here)] + step_bias[at(of)]));
          double sum = D[at(of)] * v[at(here)];
          for (int64_t n = 0; n < z.state; ++n) {
            double& state = h[at(e * z.state + n)];
            const int64_t b = place(t) * mixed + z.rank + n;
            state = std::exp(dt * A[at(of * z.state + n)]) * state + dt * v[at(here)] * mixing[at(b)];
            sum += state * mixing[at(b + z.state)];
          }
          scanned[at(here)] = sum * silu(gate[at(here)]);
        }
      const Doubles part = times(scanned, out[way], z.inner, outputs);
      for (size_t k = 0; k < made.size(); ++k) made[k] += part[k];
    }
    for (int64_t n = 0; n < z.length; ++n)
      for (int64_t c = 0; c < z.channels; ++c) {
        double sum = bias[at(c)];
        for (int64_t k = 0; k < z.taps; ++k)
          if (n - k >= 0 && n - k < windows) sum += made[at((n - k) * outputs + k * z.channels + c)];
        wanted.push_back(sum);
      }
  }
  const double found = snr_db(y, wanted);
  const char* const kind = bytes ? "eight bits, " : pairs ? "bfloat16, " : "";
  expect(found >= (bytes ? kBytesDb : pairs ? kPairsDb : kLimitDb),
         kind + std::string("Mamba block, ") + std::to_string(z.taps) + " taps, " + std::to_string(z.length) +
             " steps, " + std::to_string(z.inner) + " inner channels: " + std::to_string(found) + " dB");
}

void misfits_of_blocks_are_named() {
  using edgesep::Input;
  const auto in = [](edgesep::Dims dims) { return Input{true, dims}; };
  const std::vector<Input> good = {in({3, 5, 20}),       in({2, 2, 2, 9, 5, 32}), in({2, 40, 4}), in({2, 40}),
                                   in({2, 1, 1, 40, 64}), in({2, 1, 1, 3, 64}),    in({2, 40}),    in({2, 40, 6}),
                                   in({2, 40}),          in({2, 1, 1, 40, 64}),   in({1, 9, 5, 32}), in({5}),
                                   Input{},              Input{},                Input{}};
  EdgesepMamba s{};
  expect(edgesep::check_mamba(good, &s).empty() && s.taps == 4 && s.inner == 40 && s.rank == 3, "a block that fits passes");
  const auto named = [&](size_t i, edgesep::Dims dims, const char* start) {
    std::vector<Input> wrong = good;
    wrong[i] = in(dims);
    expect(edgesep::check_mamba(wrong, &s).find(start) == 0, start);
  };
  named(0, {3, 5, 3}, "x has shape (3, 5, 3), expected 4 steps or more");
  named(0, {3, 20}, "x has shape (3, 20), expected (rows, channels, length)");
  named(1, {2, 2, 2, 8, 5, 32}, "in has shape (2, 2, 2, 8, 5, 32)");
  named(1, {2, 2, 1, 9, 5, 32}, "in has shape (2, 2, 1, 9, 5, 32), expected (2, 2, 2, 9, 5, 32)");
  named(2, {2, 40, 9}, "conv_weight has shape (2, 40, 9)");
  named(4, {2, 1, 1, 39, 64}, "states has shape (2, 1, 1, 39, 64)");
  named(5, {2, 1, 3, 64}, "steps has shape (2, 1, 3, 64)");
  named(7, {2, 40, 65}, "A has shape (2, 40, 65)");
  named(10, {2, 9, 5, 32}, "through has shape (2, 9, 5, 32), expected (1, 9, 5, 32)");
  s.pairs = 1;
  expect(edgesep::check_mamba(good, &s).find("bfloat16 takes an even number of channels, got 5") == 0, "odd channels");
  s.pairs = 0;
  named(11, {6}, "bias has shape (6), expected (5)");
  std::vector<Input> rounded = good;
  rounded[1] = in({2, 2, 1, 1, 5, 256}), rounded[4] = rounded[9] = in({2, 1, 1, 10, 256});
  rounded[12] = in({2, 2, 40}), rounded[13] = in({2, 15});
  expect(edgesep::check_mamba(rounded, &s) == "out_scale is missing", "a scale too few");
  rounded[14] = in({2, 20});
  expect(edgesep::check_mamba(rounded, &s).empty(), "a block in eight bits passes");
  s.pairs = 1;
  expect(edgesep::check_mamba(rounded, &s).find("either bfloat16 or eight bits") == 0, "both");
  s.pairs = 0;
  rounded[14] = in({2, 21});
  expect(edgesep::check_mamba(rounded, &s).find("out_scale has shape (2, 21), expected (2, 20)") == 0, "another scale");
  rounded[12] = Input{};
  expect(edgesep::check_mamba(rounded, &s) == "states_scale is there without in_scale", "a scale too many");
}

}  // namespace

void blocks_equal_the_reference() {
  a_block_equals_the_reference({2, 16, 257, 8, 40, 8, 16, 4});
  a_block_equals_the_reference({1, 3, 30, 8, 16, 1, 16, 4});
  a_block_equals_the_reference({3, 5, 70, 4, 37, 3, 6, 4});
  a_block_equals_the_reference({2, 4, 4, 4, 16, 1, 16, 1});
  a_block_equals_the_reference({2, 3, 9, 8, 20, 2, 4, 8});
  a_block_equals_the_reference({2, 16, 257, 8, 40, 8, 16, 4}, true);
  a_block_equals_the_reference({2, 6, 50, 4, 22, 3, 5, 4}, true);
  a_block_equals_the_reference({2, 16, 257, 8, 40, 8, 16, 4}, false, true);
  a_block_equals_the_reference({2, 5, 70, 4, 36, 3, 6, 4}, false, true);
  misfits_of_blocks_are_named();
}
