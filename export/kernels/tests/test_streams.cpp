// Attention over the past, norms of heads, an LSTM's steps and products of windows against their contracts in float64
// (core/past_attention.h, head_norm.h, lstm_steps.h, window_product.h).
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "../core/check.h"
#include "testing.h"

namespace {

class Drawn {
 public:
  Floats fill(int64_t count, float scale = 1) {
    Floats out(static_cast<size_t>(count));
    for (float& v : out) v = scale * normal_(random_);
    return out;
  }
  std::vector<uint8_t> bytes(int64_t count) {
    std::vector<uint8_t> out(static_cast<size_t>(count));
    for (uint8_t& v : out) v = static_cast<uint8_t>(random_() & 255);
    return out;
  }

 private:
  std::mt19937 random_{5};
  std::normal_distribution<float> normal_;
};

// hidden: how many of the oldest past frames nobody sees.
void attention_equals_the_reference(int64_t frames, int64_t past, int64_t keys, int64_t features, bool bytes,
                                    int64_t hidden) {
  Drawn drawn;
  const int64_t items = 3, all = past + frames;
  const Floats q = drawn.fill(items * frames * keys), k = drawn.fill(items * frames * keys);
  const Floats v = drawn.fill(items * frames * features), past_k = drawn.fill(items * past * keys);
  const Floats past_v = drawn.fill(items * past * features);
  const std::vector<uint8_t> byte_k = drawn.bytes(items * past * keys), byte_v = drawn.bytes(items * past * features);
  Floats mask(at(frames * all)), y(v.size());
  for (int64_t n = 0; n < frames; ++n)
    for (int64_t j = 0; j < all; ++j)
      mask[at(n * all + j)] = j < hidden || j > past + n ? -std::numeric_limits<float>::infinity()
                              : hidden                   ? 0.1f * float(j % 3)
                                                         : 0;
  EdgesepAttention s{};
  s.q = q.data(), s.k = k.data(), s.v = v.data(), s.hidden = mask.data(), s.y = y.data();
  s.past_k = past_k.data(), s.past_v = past_v.data();
  if (bytes) {
    s.past_k = byte_k.data(), s.past_v = byte_v.data();
    s.k_scale = 0.01f, s.k_zero = 120, s.v_scale = 0.02f, s.v_zero = 7;
  }
  s.items = items, s.frames = frames, s.past = past, s.keys = keys, s.features = features;
  Floats weights(at(edgesep_attention_workspace(&s)));
  s.weights = weights.data();
  const int64_t rows = items * edgesep_attention_chunks(&s);
  for (int i = 0; i < 2; ++i) edgesep_attention_weights(&s, items * i / 2, items * (i + 1) / 2);
  for (int i = 0; i < 2; ++i) edgesep_attention_values(&s, rows * i / 2, rows * (i + 1) / 2);

  const auto key = [&](int64_t item, int64_t j, int64_t d) {
    if (j >= past) return double(k[at((item * frames + j - past) * keys + d)]);
    const size_t i = at((item * past + j) * keys + d);
    return bytes ? double(s.k_scale) * (byte_k[i] - 120.0) : double(past_k[i]);
  };
  const auto value = [&](int64_t item, int64_t j, int64_t e) {
    if (j >= past) return double(v[at((item * frames + j - past) * features + e)]);
    const size_t i = at((item * past + j) * features + e);
    return bytes ? double(s.v_scale) * (byte_v[i] - 7.0) : double(past_v[i]);
  };
  // rounds: weights of the past have eight bits.
  const auto against = [&](bool rounds) {
    std::vector<double> wanted(y.size());
    for (int64_t item = 0; item < items; ++item)
      for (int64_t n = 0; n < frames; ++n) {
        std::vector<double> score(at(all));
        double most = -1e300, total = 0, largest = 0, shares = 0, integers = 0;
        for (int64_t j = 0; j < all; ++j) {
          for (int64_t d = 0; d < keys; ++d) score[at(j)] += q[at((item * frames + n) * keys + d)] * key(item, j, d);
          score[at(j)] += mask[at(n * all + j)];
          most = std::fmax(most, score[at(j)]);
        }
        for (double& x : score) total += x = std::exp(x - most);
        for (double& x : score) x /= total;
        for (int64_t j = 0; j < past; ++j) largest = std::fmax(largest, score[at(j)]), shares += score[at(j)];
        for (int64_t j = 0; rounds && largest && j < past; ++j)
          integers += score[at(j)] = std::nearbyint(score[at(j)] * std::fmin(255 / largest, 8.3e6));
        for (int64_t j = 0; integers && j < past; ++j) score[at(j)] *= shares / integers;
        for (int64_t j = 0; j < all; ++j)
          for (int64_t e = 0; e < features; ++e)
            wanted[at((item * frames + n) * features + e)] += score[at(j)] * value(item, j, e);
      }
    return snr_db(y, wanted);
  };
  // Where rounded values are summed as integers, queries have 15 bits, and weights as many or eight; then one that lies
  // between two integers may fall to either.
  const double exact = against(false), as_said = bytes ? against(true) : 0;
  expect(exact >= (bytes ? 85 : kLimitDb) || (exact >= 50 && as_said >= 70),
         "attention of " + std::to_string(frames) + " frames over " + std::to_string(past) + ", " + std::to_string(keys) +
             " and " + std::to_string(features) + " features" + (bytes ? ", bytes" : "") + ": " + std::to_string(exact) +
             " dB, " + std::to_string(as_said) + " dB");
}

void nan_stays_in_its_frame(bool bytes) {
  const int64_t frames = 4, past = 11, size = 10;
  Drawn drawn;
  Floats q = drawn.fill(frames * size);
  const Floats own = drawn.fill(frames * size), floats = drawn.fill(past * size), hidden(at(frames * (past + frames)));
  const std::vector<uint8_t> rounded = drawn.bytes(past * size);
  q[at(2 * size + 3)] = std::nanf("");
  Floats y(at(frames * size));
  EdgesepAttention s{};
  s.q = q.data(), s.k = s.v = own.data(), s.hidden = hidden.data(), s.y = y.data();
  s.past_k = s.past_v = floats.data();
  if (bytes) s.past_k = s.past_v = rounded.data(), s.k_scale = s.v_scale = 0.01f, s.k_zero = s.v_zero = 120;
  s.items = 1, s.frames = frames, s.past = past, s.keys = s.features = size;
  Floats weights(at(edgesep_attention_workspace(&s)));
  s.weights = weights.data();
  edgesep_attention_weights(&s, 0, 1);
  edgesep_attention_values(&s, 0, edgesep_attention_chunks(&s));
  for (int64_t n = 0; n < frames; ++n)
    for (int64_t i = 0; i < size; ++i)
      expect(std::isnan(y[at(n * size + i)]) == (n == 2), "NaN in a query stays in its frame");
}

// A recurrent matrix (hidden, 4, hidden) as kernels take it: in float or in eight bits. `meant`: what that says.
struct Recurrent {
  Floats meant, recurrent, scale;
  std::vector<int8_t> bytes;

  Recurrent(const Floats& matrix, int64_t hidden, bool in_bytes) : meant(matrix) {
    const int64_t group = EDGESEP_LSTM_GROUP, groups = (hidden + group - 1) / group, quads = (hidden + 3) / 4;
    if (!in_bytes) recurrent.resize(at(groups * hidden * 4 * group));
    if (in_bytes) bytes.resize(at(groups * quads * 4 * group * 4)), scale.resize(at(groups * 4 * group), 1);
    for (int64_t n = 0; n < 4 * hidden; ++n) {
      const int64_t gate = n / hidden, i = n % hidden, g = i / group;
      float most = 0;
      for (int64_t k = 0; k < hidden; ++k) most = std::fmax(most, std::fabs(matrix[at(k * 4 * hidden + n)]));
      if (in_bytes) scale[at((g * 4 + gate) * group + i % group)] = most / 127;
      for (int64_t k = 0; k < hidden; ++k) {
        float& w = meant[at(k * 4 * hidden + n)];
        if (!in_bytes) {
          recurrent[at(((g * hidden + k) * 4 + gate) * group + i % group)] = w;
          continue;
        }
        const float integer = std::nearbyint(w * (127 / most));
        bytes[at((((g * quads + k / 4) * 4 + gate) * group + i % group) * 4 + k % 4)] = static_cast<int8_t>(integer);
        w = integer * (most / 127);
      }
    }
  }

  void give(EdgesepLstm* s) const {
    if (bytes.empty())
      s->recurrent = recurrent.data();
    else
      s->bytes = bytes.data(), s->scale = scale.data();
  }
};

// order: empty for one frame after another. With a matrix in eight bits the kernel may round h, as said, or not at all.
void lstm_equals_the_reference(int64_t frames, int64_t sets, int64_t rows, int64_t hidden,
                               const std::vector<int64_t>& order, bool in_bytes) {
  Drawn drawn;
  const int64_t steps = order.empty() ? frames : static_cast<int64_t>(order.size()) / sets, all = sets * rows;
  const Floats gates = drawn.fill(frames * rows * 4 * hidden, 2);
  const Recurrent matrix(drawn.fill(hidden * 4 * hidden, 0.3f), hidden, in_bytes);
  const Floats h0 = drawn.fill(all * hidden, 0.5f), c0 = drawn.fill(all * hidden);
  Floats y(at(steps * all * hidden)), last_h(at(all * hidden)), last_c = last_h;
  EdgesepLstm s{};
  s.gates = gates.data(), s.initial_h = h0.data(), s.initial_c = c0.data();
  matrix.give(&s);
  s.order = order.empty() ? nullptr : order.data();
  s.y = y.data(), s.last_h = last_h.data(), s.last_c = last_c.data();
  s.frames = frames, s.steps = steps, s.sets = sets, s.rows = rows, s.hidden = hidden;
  const int64_t blocks = edgesep_lstm_blocks(&s);
  for (int64_t i = 0; i < blocks; ++i) edgesep_lstm(&s, i, i + 1);

  const auto worst = [&](bool rounds) {
    std::vector<double> h(h0.begin(), h0.end()), c(c0.begin(), c0.end()), wanted;
    const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
    for (int64_t l = 0; l < steps; ++l) {
      std::vector<double> before = h;
      if (rounds)
        for (double& v : before) v = std::nearbyint(std::fmax(-1, std::fmin(v, 1)) * 127) / 127;
      for (int64_t row = 0; row < all; ++row) {
        const int64_t frame = order.empty() ? l : order[at(l * sets + row / rows)];
        if (frame < 0) continue;
        for (int64_t i = 0; i < hidden; ++i) {
          double g[4];
          for (int64_t n = 0; n < 4; ++n) {
            g[n] = gates[at(((frame * rows + row % rows) * 4 + n) * hidden + i)];
            for (int64_t k = 0; k < hidden; ++k)
              g[n] += before[at(row * hidden + k)] * matrix.meant[at((k * 4 + n) * hidden + i)];
          }
          double& cell = c[at(row * hidden + i)];
          cell = sigmoid(g[2]) * cell + sigmoid(g[0]) * std::tanh(g[3]);
          h[at(row * hidden + i)] = sigmoid(g[1]) * std::tanh(cell);
        }
      }
      wanted.insert(wanted.end(), h.begin(), h.end());
    }
    return std::fmin(snr_db(y, wanted), std::fmin(snr_db(last_h, h), snr_db(last_c, c)));
  };
  // An h between two steps may fall to either, and rough exponentials move it there sooner.
  const double exact = worst(false), as_said = in_bytes ? worst(true) : 0;
  expect(exact >= kLimitDb || as_said >= 45,
         "LSTM of " + std::to_string(sets) + " x " + std::to_string(rows) + " rows, " + std::to_string(hidden) +
             " hidden, " + std::to_string(steps) + " steps" + (in_bytes ? ", in bytes" : "") + ": " +
             std::to_string(exact) + " dB, " + std::to_string(as_said) + " dB");
}

void gates_far_out_are_flat() {
  const int64_t hidden = 16;
  const Floats recurrent(at(hidden * 4 * hidden)), h0(at(hidden)), c0(at(hidden), 0.5f);
  for (float far : {-1e30f, -80.0f, 80.0f, 1e30f}) {
    const Floats gates(at(4 * hidden), far);
    Floats y(at(hidden)), c(at(hidden));
    EdgesepLstm s{};
    s.gates = gates.data(), s.recurrent = recurrent.data(), s.initial_h = h0.data(), s.initial_c = c0.data();
    s.y = y.data(), s.last_c = c.data(), s.frames = s.steps = s.sets = s.rows = 1, s.hidden = hidden;
    edgesep_lstm(&s, 0, edgesep_lstm_blocks(&s));
    const double cell = far > 0 ? 1.5 : 0;
    expect(std::fabs(c[3] - cell) < 1e-6 && std::fabs(y[3] - (far > 0 ? std::tanh(cell) : 0)) < 1e-6,
           "gates of " + std::to_string(far) + " give a cell of " + std::to_string(c[3]));
  }
}

void nan_stays_in_its_row(bool in_bytes) {
  const int64_t rows = 8, hidden = 20;
  Drawn drawn;
  Floats gates = drawn.fill(3 * rows * 4 * hidden);
  const Recurrent matrix(Floats(at(hidden * 4 * hidden), 0.1f), hidden, in_bytes);
  const Floats state(at(rows * hidden), 0.5f);
  gates[at((rows + 2) * 4 * hidden + 5)] = std::nanf("");  // second frame, third row
  Floats y(at(3 * rows * hidden));
  EdgesepLstm s{};
  s.gates = gates.data(), s.initial_h = state.data(), s.initial_c = state.data();
  matrix.give(&s);
  s.y = y.data(), s.frames = s.steps = 3, s.sets = 1, s.rows = rows, s.hidden = hidden;
  edgesep_lstm(&s, 0, edgesep_lstm_blocks(&s));
  for (int64_t l = 0; l < 3; ++l)
    for (int64_t row = 0; row < rows; ++row) {
      bool any = false;
      for (int64_t i = 0; i < hidden; ++i) any |= std::isnan(y[at((l * rows + row) * hidden + i)]);
      expect(any == (row == 2 && l > 0), "NaN in a row of gates stays in that row, from its step on");
    }
}

// In eight bits: of the same integers.
void rounded_windows_equal_the_reference(int64_t taps, int64_t inputs, int64_t outputs, int64_t windows, bool behind) {
  Drawn drawn;
  const int64_t group = EDGESEP_WINDOW_GROUP, rows = taps > 1 ? 29 : windows, quads = inputs / 4;
  Floats x = drawn.fill(rows * inputs, 80);
  for (float& v : x) v = 0.02f * (std::nearbyint(v) + 0.2f);  // far from where rounding turns
  const Floats bias = drawn.fill(outputs), slope = drawn.fill(outputs), residual = drawn.fill(windows * outputs);
  const Floats scale(at(outputs), 1e-4f);
  std::vector<int8_t> matrix(at(taps * inputs * outputs)), weight(at((outputs + group - 1) / group * taps * inputs * group));
  for (int8_t& w : matrix) w = static_cast<int8_t>(drawn.bytes(1)[0]);
  for (int64_t k = 0; k < taps * inputs; ++k)
    for (int64_t n = 0; n < outputs; ++n)
      weight[at(((n / group * taps * quads + k / 4) * group + n % group) * 4 + k % 4)] = matrix[at(k * outputs + n)];
  std::vector<int64_t> index;
  for (int64_t i = 0; taps > 1 && i < windows * taps; ++i) index.push_back(i * 7 % (rows + 1) - 1);
  Floats y(at(windows * outputs));
  EdgesepWindows s{};
  s.x = x.data(), s.bytes = weight.data(), s.bias = bias.data(), s.scale = scale.data(), s.y = y.data();
  s.index = index.empty() ? nullptr : index.data();
  if (behind) s.slope = slope.data(), s.residual = residual.data();
  s.rows = rows, s.inputs = inputs, s.windows = windows, s.taps = taps, s.outputs = outputs;
  s.x_scale = 0.02f, s.x_zero = 100;  // so that some are beyond both ends
  Floats room(at(edgesep_window_room(&s)));
  s.room = room.data();
  for (int64_t i = 0; i < rows; ++i) edgesep_rounded_rows(&s, i, i + 1);
  const int64_t work = edgesep_window_rows(&s);
  for (int64_t i = 0; i < 3; ++i) edgesep_rounded_product(&s, work * i / 3, work * (i + 1) / 3);
  const auto rounded = [&](int64_t i) {
    return std::fmin(255, std::fmax(0, std::nearbyint(x[at(i)] * (1 / s.x_scale) + 100)));
  };
  std::vector<double> wanted;
  for (int64_t m = 0; m < windows; ++m)
    for (int64_t n = 0; n < outputs; ++n) {
      double v = 0;
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t row = index.empty() ? m : index[at(m * taps + k)];
        for (int64_t c = 0; c < inputs; ++c)
          v += (row < 0 ? 100.0 : double(rounded(row * inputs + c))) * matrix[at((k * inputs + c) * outputs + n)];
      }
      v = v * scale[at(n)] + bias[at(n)];
      wanted.push_back(behind ? std::fmax(v, v * slope[at(n)]) + residual[at(m * outputs + n)] : v);
    }
  const double found = snr_db(y, wanted);
  expect(found >= kLimitDb, std::to_string(windows) + " windows of " + std::to_string(taps) + " x " +
                                std::to_string(inputs) + " in eight bits, " + std::to_string(outputs) +
                                " outputs: " + std::to_string(found) + " dB");
}

// unfolded: most windows are one row behind the one before.
void windows_equal_the_reference(int64_t taps, int64_t inputs, int64_t outputs, int64_t windows, bool behind,
                                 bool unfolded = false) {
  Drawn drawn;
  const int64_t groups = (outputs + EDGESEP_WINDOW_GROUP - 1) / EDGESEP_WINDOW_GROUP, rows = taps > 1 ? 29 : windows;
  const Floats x = drawn.fill(rows * inputs), matrix = drawn.fill(taps * inputs * outputs), bias = drawn.fill(outputs);
  const Floats slope = drawn.fill(outputs), residual = drawn.fill(windows * outputs);
  Floats weight(at(groups * taps * inputs * EDGESEP_WINDOW_GROUP)), y(at(windows * outputs)), sums;
  for (int64_t k = 0; k < taps * inputs; ++k)
    for (int64_t n = 0; n < outputs; ++n)
      weight[at((n / EDGESEP_WINDOW_GROUP * taps * inputs + k) * EDGESEP_WINDOW_GROUP + n % EDGESEP_WINDOW_GROUP)] =
          matrix[at(k * outputs + n)];
  std::vector<int64_t> index;
  for (int64_t i = 0; taps > 1 && i < windows * taps; ++i) {
    const int64_t m = i / taps, row = m / 11 * 5 + m % 11 + i % taps - taps + 1;
    index.push_back(unfolded ? (row < rows ? std::max<int64_t>(row, -1) : -1) : i * 7 % (rows + 1) - 1);
  }
  if (unfolded) append_unfolded(matrix, taps, inputs, outputs, &sums);
  EdgesepWindows s{};
  s.unfolded = unfolded;
  s.x = x.data(), s.weight = (unfolded ? sums : weight).data(), s.bias = bias.data(), s.y = y.data();
  s.index = index.empty() ? nullptr : index.data();
  if (behind) s.slope = slope.data(), s.residual = residual.data();
  s.rows = rows, s.inputs = inputs, s.windows = windows, s.taps = taps, s.outputs = outputs;
  const int64_t blocks = edgesep_window_rows(&s);
  for (int64_t i = 0; i < blocks; ++i) edgesep_window_product(&s, i, i + 1);
  std::vector<double> wanted;
  for (int64_t m = 0; m < windows; ++m)
    for (int64_t n = 0; n < outputs; ++n) {
      double v = bias[at(n)];
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t row = index.empty() ? m : index[at(m * taps + k)];
        for (int64_t c = 0; row >= 0 && c < inputs; ++c)
          v += double(x[at(row * inputs + c)]) * matrix[at((k * inputs + c) * outputs + n)];
      }
      wanted.push_back(behind ? std::fmax(v, v * slope[at(n)]) + residual[at(m * outputs + n)] : v);
    }
  const double found = snr_db(y, wanted);
  expect(found >= kLimitDb, std::to_string(windows) + " windows of " + std::to_string(taps) + " x " +
                                std::to_string(inputs) + ", " + std::to_string(outputs) + " outputs" +
                                (unfolded ? ", unfolded: " : ": ") + std::to_string(found) + " dB");
}

void heads_equal_the_reference(int64_t frames, int64_t bins, int64_t heads, int64_t features, bool bent) {
  Drawn drawn;
  const int64_t first = 3, channels = first + heads * features + 2, size = bins * features;
  Floats x = drawn.fill(frames * bins * channels);
  for (float& v : x) v += 2;  // a mean that is no rounding error
  const Floats gain = drawn.fill(heads * size), bias = drawn.fill(heads * size), slope = drawn.fill(heads * features);
  Floats y(at(heads * frames * size));
  EdgesepHeadNorm s{};
  s.x = x.data(), s.gain = gain.data(), s.bias = bias.data(), s.y = y.data();
  if (bent) s.slope = slope.data();
  s.frames = frames, s.bins = bins, s.channels = channels, s.first = first, s.heads = heads, s.features = features;
  s.epsilon = 1e-2f;
  const int64_t rows = edgesep_head_norm_rows(&s);
  for (int64_t i = 0; i < rows; ++i) edgesep_head_norm(&s, i, i + 1);
  std::vector<double> wanted;
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t n = 0; n < frames; ++n) {
      std::vector<double> v;
      double mean = 0, variance = 0;
      for (int64_t i = 0; i < size; ++i) {
        const int64_t channel = h * features + i % features;
        const double given = x[at((n * bins + i / features) * channels + first + channel)];
        v.push_back(bent ? std::fmax(given, given * slope[at(channel)]) : given);
        mean += v.back() / double(size);
      }
      for (double& one : v) variance += (one - mean) * (one - mean) / double(size);
      for (int64_t i = 0; i < size; ++i)
        wanted.push_back(gain[at(h * size + i)] * (v[at(i)] - mean) / std::sqrt(variance + double(s.epsilon)) +
                         bias[at(h * size + i)]);
    }
  const double found = snr_db(y, wanted);
  expect(found >= kLimitDb, "norm of " + std::to_string(heads) + " heads of " + std::to_string(features) + " over " +
                                std::to_string(bins) + " bins, " + std::to_string(frames) + " frames" +
                                (bent ? ", slope: " : ": ") + std::to_string(found) + " dB");
}

void nan_stays_in_its_head() {
  const int64_t frames = 3, bins = 7, heads = 2, features = 5, size = bins * features;
  Drawn drawn;
  Floats x = drawn.fill(frames * bins * heads * features);
  const Floats one(at(heads * size), 1), slope(at(heads * features), 0.5f);
  x[at((bins + 2) * heads * features + features + 1)] = std::nanf("");  // second frame, second head
  Floats y(at(heads * frames * size));
  EdgesepHeadNorm s{};
  s.x = x.data(), s.gain = s.bias = one.data(), s.slope = slope.data(), s.y = y.data();
  s.frames = frames, s.bins = bins, s.channels = heads * features, s.heads = heads, s.features = features;
  edgesep_head_norm(&s, 0, edgesep_head_norm_rows(&s));
  for (int64_t i = 0; i < heads * frames * size; ++i)
    expect(std::isnan(y[at(i)]) == (i / size == frames + 1), "NaN in a head stays in that head and frame");
}

void misfits_of_streams_are_named() {
  using edgesep::Input;
  const auto in = [](edgesep::Dims dims) { return Input{true, dims}; };
  const std::vector<Input> attention = {in({1, 2, 8, 5}), in({1, 2, 8, 5}),  in({1, 2, 8, 7}),
                                        in({1, 2, 9, 5}), in({1, 2, 9, 7}), in({8, 17})};
  EdgesepAttention a{};
  expect(edgesep::check_attention(attention, &a).empty() && a.items == 2 && a.past == 9, "attention that fits passes");
  auto wrong = attention;
  wrong[5] = in({8, 16});
  expect(edgesep::check_attention(wrong, &a).find("hidden has shape (8, 16), expected (8, 17)") == 0, "hidden is named");
  wrong[3] = in({2, 9, 5});
  expect(edgesep::check_attention(wrong, &a).find("past_k has shape (2, 9, 5)") == 0, "a past of three axes is named");
  const std::vector<Input> lstm = {in({24, 80}),   in({2, 20, 4, 16}), in({1, 9, 20}),
                                  in({1, 9, 20}), in({8, 3}),         Input{}};
  EdgesepLstm l{};
  expect(edgesep::check_lstm(lstm, &l).empty() && l.frames == 8 && l.rows == 3 && l.steps == 8, "an LSTM that fits");
  wrong = lstm;
  wrong[1] = in({1, 20, 4, 16});
  expect(edgesep::check_lstm(wrong, &l).find("recurrent has shape (1, 20, 4, 16)") == 0, "recurrent is named");
  wrong = lstm;
  wrong[0] = in({25, 80});
  expect(edgesep::check_lstm(wrong, &l).find("gates has shape (25, 80)") == 0, "gates are named");
  wrong = lstm;
  wrong[2] = in({1, 8, 20});
  expect(edgesep::check_lstm(wrong, &l).find("initial_h has shape (1, 8, 20)") == 0, "a state of other rows is named");
  wrong = lstm;
  wrong[1] = in({2, 5, 4, 64}), wrong[5] = in({2, 4, 16});
  expect(edgesep::check_lstm(wrong, &l).empty() && l.hidden == 20, "a matrix in eight bits fits");
  wrong[5] = in({2, 4, 20});
  expect(edgesep::check_lstm(wrong, &l).find("scale has shape (2, 4, 20)") == 0, "its scale is named");
  wrong[1] = lstm[1];
  expect(edgesep::check_lstm(wrong, &l).find("recurrent has shape (2, 20, 4, 16), expected (2, 5, 4, 64)") == 0,
         "a matrix in float with a scale is named");
  std::vector<Input> heads = {in({21, 12}), in({2, 7, 4}), in({2, 7, 4}), in({8})};
  EdgesepHeadNorm h{};
  h.first = 4;
  expect(edgesep::check_head_norm(heads, &h).empty() && h.frames == 3 && h.channels == 12, "heads that fit pass");
  h.first = 5;
  expect(edgesep::check_head_norm(heads, &h).find("x has shape (21, 12), expected rows of 13 channels or more") == 0,
         "channels that are not there are named");
  h.first = 0;
  const auto unfit = [&](size_t i, edgesep::Dims dims, const char* start) {
    wrong = heads;
    wrong[i] = in(dims);
    expect(edgesep::check_head_norm(wrong, &h).find(start) == 0, start);
  };
  unfit(0, {20, 12}, "x has shape (20, 12), expected frames of 7 rows");
  unfit(1, {2, 7}, "gain has shape (2, 7), expected (heads, bins, features)");
  unfit(2, {2, 7, 3}, "bias has shape (2, 7, 3), expected (2, 7, 4)");
  unfit(3, {7}, "slope has shape (7), expected (8)");
  const std::vector<Input> windows = {in({4, 5, 6}), in({2, 3, 6, 64}), in({80}), in({7, 3}), in({80}), in({7, 80}),
                                      Input{}};
  EdgesepWindows w{};
  expect(edgesep::check_windows(windows, &w).empty() && w.rows == 20 && w.windows == 7, "windows that fit pass");
  const auto named = [&](size_t i, edgesep::Dims dims, const char* start) {
    wrong = windows;
    wrong[i] = in(dims);
    expect(edgesep::check_windows(wrong, &w).find(start) == 0, start);
  };
  named(0, {4, 5, 7}, "x has shape (4, 5, 7), expected rows of 6");
  named(1, {1, 3, 6, 64}, "weight has shape (1, 3, 6, 64), expected (2 groups, taps, inputs, 64)");
  named(3, {7, 2}, "index has shape (7, 2), expected (windows, 3)");
  named(4, {79}, "slope has shape (79), expected (80)");
  named(5, {6, 80}, "residual has shape (6, 80), expected (7, 80)");
  wrong = windows;
  wrong[1] = in({3, 9, 6, 32}), wrong[3] = in({7, 4});
  expect(edgesep::check_windows(wrong, &w).empty() && w.unfolded && w.taps == 4, "sums of taps pass");
  wrong[3] = in({7, 8});
  expect(edgesep::check_windows(wrong, &w).find("weight has shape (3, 9, 6, 32)") == 0, "sums of other taps are named");
  wrong = windows;
  wrong[1] = in({2, 3, 2, 256}), wrong[0] = in({20, 8}), wrong[6] = in({80});
  expect(edgesep::check_windows(wrong, &w).empty() && w.inputs == 8 && w.rows == 20, "a matrix in eight bits fits");
  wrong[6] = in({79});
  expect(edgesep::check_windows(wrong, &w).find("scale has shape (79), expected (80)") == 0, "its scale is named");
  wrong[1] = windows[1];
  expect(edgesep::check_windows(wrong, &w).find("weight has shape (2, 3, 6, 64), expected (2 groups, taps, inputs / 4, 256)") == 0,
         "a matrix in float with a scale is named");
  wrong = windows;
  wrong[3] = Input{};
  expect(edgesep::check_windows(wrong, &w).find("index is missing") == 0, "windows of several taps need an index");
}

}  // namespace

void streams_equal_the_reference() {
  for (bool bytes : {false, true})
    for (int64_t frames : {1, 2, 8, 13, 20, 35}) {
      attention_equals_the_reference(frames, 37, 13, 41, bytes, 0);
      attention_equals_the_reference(frames, 9, 33, 5, bytes, 7);
      attention_equals_the_reference(frames, 37, 10, 41, bytes, 3);
    }
  for (bool bytes : {false, true}) {
    attention_equals_the_reference(8, 50, 132, 1056, bytes, 20);
    attention_equals_the_reference(8, 50, 13, 2 * EDGESEP_ATTENTION_CHUNK + 100, bytes, 20);  // several chunks
  }
  for (bool bytes : {false, true}) nan_stays_in_its_frame(bytes);
  for (bool bent : {false, true})
    for (int64_t frames : {1, 3})
      for (int64_t features : {1, 4, 5, 32, 64}) {
        heads_equal_the_reference(frames, 1, 1, features, bent);
        heads_equal_the_reference(frames, 33, 4, features, bent);
      }
  nan_stays_in_its_head();
  for (bool in_bytes : {false, true}) {
    for (int64_t hidden : {1, 5, 16, 24, 64}) {
      lstm_equals_the_reference(1, 1, 1, hidden, {}, in_bytes);
      lstm_equals_the_reference(9, 1, 7, hidden, {}, in_bytes);
      lstm_equals_the_reference(5, 1, 40, hidden, {}, in_bytes);
      lstm_equals_the_reference(4, 3, 11, hidden, {0, 0, 2, 1, 1, 3, -1, 2, -1, -1, 3, -1, 0, 0, -1}, in_bytes);
    }
    nan_stays_in_its_row(in_bytes);
  }
  gates_far_out_are_flat();
  for (bool behind : {false, true})
    for (int64_t outputs : {1, 16, 40, 64, 80, 150})
      for (int64_t windows : {1, 5, 12, 31}) {
        rounded_windows_equal_the_reference(1, 20, outputs, windows, behind);
        rounded_windows_equal_the_reference(5, 8, outputs, windows, behind);
      }
  misfits_of_streams_are_named();
}

void windows_equal_the_reference() {
  for (bool behind : {false, true})
    for (int64_t outputs : {1, 16, 40, 64, 80, 150})
      for (int64_t windows : {1, 5, 12, 31}) {
        windows_equal_the_reference(1, 20, outputs, windows, behind);
        windows_equal_the_reference(5, 7, outputs, windows, behind);
        for (int64_t taps : {4, 8}) windows_equal_the_reference(taps, 7, outputs, windows, behind, true);
      }
  windows_equal_the_reference(8, 3, 40, 300, true, true);  // several pieces of each share
}
