// Fused units and pooled sums against their contract in float64 (core/conv_norm.h).
#include <cmath>
#include <random>

#include "../core/conv_norm.h"
#include "testing.h"

namespace {

using Floats = std::vector<float>;

struct Unit {
  int64_t batch, frames_in, channels, taps, stride;  // taps 0: no convolution
  bool norm, deferred = false;                             // deferred: statistics alone
  bool gated = false, sigmoid = false, resampled = false;  // resampled: gate and shift through an index
  bool from_norm = false, from_shift = false;              // what is read is normed and shifted on the way
  bool twice = false;                                      // what a norm is of is made twice, not written
};

class Drawn {
 public:
  Floats fill(int64_t count, float mean = 0) {
    Floats out(static_cast<size_t>(count));
    for (float& v : out) v = mean + normal_(random_);
    return out;
  }

 private:
  std::mt19937 random_{11};
  std::normal_distribution<float> normal_;
};

size_t at(int64_t a, int64_t b, int64_t c, int64_t rows, int64_t channels) {
  return static_cast<size_t>((a * rows + b) * channels + c);
}

double activated(double n, float slope, bool sigmoid) {
  return sigmoid ? 1 / (1 + std::exp(-n)) : n > 0 ? n : slope * n;
}

std::vector<int64_t> nearest(int64_t fine, int64_t coarse) {
  std::vector<int64_t> index;
  for (int64_t t = 0; t < fine; ++t) index.push_back(t * coarse / fine);
  return index;
}

void unit_equals_the_reference_once(const Unit& c) {
  Drawn drawn;
  const int64_t frames = (c.frames_in - 1) / c.stride + 1, C = c.channels;
  const int64_t coarse = c.resampled ? (frames + 2) / 3 : frames, x_coarse = (c.frames_in + 1) / 2;
  const Floats x = drawn.fill(c.batch * c.frames_in * C, 0.5f), w = drawn.fill(c.taps * C), bias = drawn.fill(C);
  const Floats gamma = drawn.fill(C, 1), beta = drawn.fill(C), x_bias = drawn.fill(C), x_gamma = drawn.fill(C, 1);
  const Floats gate = drawn.fill(c.batch * coarse * C), shift = drawn.fill(c.batch * coarse * C), x_beta = drawn.fill(C);
  const Floats x_shift = drawn.fill(c.batch * x_coarse * C);
  const float slope = 0.25f, x_slope = -0.5f;
  Floats x_stats;
  for (int64_t b = 0; b < c.batch; ++b) x_stats.insert(x_stats.end(), {0.1f * float(b + 1), 1.5f - 0.25f * float(b)});
  const std::vector<int64_t> index = nearest(frames, coarse), x_index = nearest(c.frames_in, x_coarse);

  Floats y(static_cast<size_t>(c.batch * frames * C)), out = y, stats(static_cast<size_t>(2 * c.batch));
  EdgesepConvNorm s{};
  s.x = x.data(), s.bias = bias.data();
  if (c.from_norm) {
    s.x_stats = x_stats.data(), s.x_bias = x_bias.data(), s.x_gamma = x_gamma.data(), s.x_beta = x_beta.data();
    s.x_slope = &x_slope;
  }
  if (c.from_shift) s.x_shift = x_shift.data(), s.x_index = x_index.data(), s.x_coarse = x_coarse;
  if (c.taps) s.w = w.data();
  if (c.norm) s.gamma = gamma.data(), s.beta = beta.data();
  if (c.norm || c.deferred) s.stats = stats.data();
  if (!c.deferred && !c.sigmoid) s.slope = &slope;
  if (c.gated) s.gate = gate.data(), s.shift = shift.data();
  if (c.gated && c.resampled) s.index = index.data();
  s.out = out.data();
  s.y = c.twice ? nullptr : out.data();
  s.batch = c.batch, s.frames_in = c.frames_in, s.frames = frames, s.channels = C;
  s.taps = c.taps ? c.taps : 1, s.stride = c.stride, s.coarse = coarse, s.eps = 1e-8f, s.sigmoid = c.sigmoid;
  std::vector<double> sums(static_cast<size_t>(2 * c.batch * edgesep_conv_norm_parts(&s)));
  s.sums = sums.data();
  const int64_t rows = edgesep_conv_norm_rows(&s);
  if (c.norm || c.deferred)
    for (int k = 0; k < 3; ++k) edgesep_conv_norm_sums(&s, rows * k / 3, rows * (k + 1) / 3);
  for (int k = 0; k < 3; ++k) edgesep_conv_norm_apply(&s, rows * k / 3, rows * (k + 1) / 3);

  const auto read = [&](int64_t b, int64_t i, int64_t ch) {
    const size_t k = static_cast<size_t>(ch);
    double u = x[at(b, i, ch, c.frames_in, C)];
    if (c.from_norm) {
      u = (u + x_bias[k] - x_stats[static_cast<size_t>(2 * b)]) * x_stats[static_cast<size_t>(2 * b + 1)];
      u = activated(u * x_gamma[k] + x_beta[k], x_slope, false);
    }
    return c.from_shift ? u + x_shift[at(b, x_index[static_cast<size_t>(i)], ch, x_coarse, C)] : u;
  };
  std::vector<double> wanted(out.size()), wanted_stats;
  for (int64_t b = 0; b < c.batch; ++b) {
    double sum = 0, squares = 0;
    for (int64_t t = 0; t < frames; ++t)
      for (int64_t ch = 0; ch < C; ++ch) {
        double v = bias[static_cast<size_t>(ch)];
        if (!c.taps) v += read(b, t, ch);
        for (int64_t k = 0; k < c.taps; ++k)
          if (const int64_t i = t * c.stride - c.taps / 2 + k; i >= 0 && i < c.frames_in)
            v += double(w[static_cast<size_t>(k * C + ch)]) * read(b, i, ch);
        wanted[at(b, t, ch, frames, C)] = v, sum += v;
      }
    const double count = double(frames * C), mean = sum / count;
    for (int64_t i = 0; i < frames * C; ++i)
      squares += std::pow(wanted[static_cast<size_t>(b * frames * C + i)] - mean, 2);
    const double rstd = 1 / std::sqrt(squares / count + 1e-8);
    wanted_stats.insert(wanted_stats.end(), {mean, rstd});
    for (int64_t t = 0; t < frames && !c.deferred; ++t)
      for (int64_t ch = 0; ch < C; ++ch) {
        const size_t k = static_cast<size_t>(ch), here = at(b, t, ch, frames, C);
        double n = wanted[here];
        if (c.norm) n = gamma[k] * (n - mean) * rstd + beta[k];
        n = activated(n, slope, c.sigmoid);
        if (c.gated) {
          const size_t from = at(b, c.resampled ? index[static_cast<size_t>(t)] : t, ch, coarse, C);
          n = n * gate[from] + shift[from];
        }
        wanted[here] = n;
      }
  }
  double worst = snr_db(out, wanted);
  if (c.norm || c.deferred) worst = std::fmin(worst, snr_db(stats, wanted_stats));
  std::string text = "unit " + std::to_string(c.batch) + "x" + std::to_string(c.frames_in) + "x" + std::to_string(C);
  text += ", " + std::to_string(c.taps) + " taps, stride " + std::to_string(c.stride);
  for (const auto& [there, name] :
       {std::pair<bool, const char*>{c.norm, " norm"}, {c.deferred, " statistics"}, {c.gated, " gate"},
        {c.sigmoid, " sigmoid"}, {c.resampled, " resampled"}, {c.from_norm, " of normed"}, {c.from_shift, " shifted"},
        {c.twice, " twice"}})
    if (there) text += name;
  expect(worst >= kLimitDb, text + ": " + std::to_string(worst) + " dB");
}

void unit_equals_the_reference(Unit c) {
  unit_equals_the_reference_once(c);
  c.twice = true;
  if (c.norm) unit_equals_the_reference_once(c);
}

void pooled_equals_the_reference(bool from_norm) {
  Drawn drawn;
  const int64_t batch = 2, frames = 61, coarse = 7, span = 10, C = 21;
  const Floats total = drawn.fill(batch * coarse * C), x = drawn.fill(batch * frames * C), bias = drawn.fill(C);
  const Floats gamma = drawn.fill(C, 1), beta = drawn.fill(C), weight = drawn.fill(coarse * span);
  const Floats stats = {0.1f, 1.5f, -0.2f, 0.7f};
  const float slope = 0.25f;
  std::vector<int64_t> index;
  for (int64_t i = 0; i < coarse * span; ++i) index.push_back((i * 53) % frames);
  Floats out(total.size());
  EdgesepPooled s{};
  s.total = total.data(), s.x = x.data(), s.weight = weight.data(), s.index = index.data(), s.out = out.data();
  if (from_norm) {
    s.x_stats = stats.data(), s.x_bias = bias.data(), s.x_gamma = gamma.data(), s.x_beta = beta.data();
    s.x_slope = &slope;
  }
  s.batch = batch, s.frames = frames, s.coarse = coarse, s.span = span, s.channels = C;
  for (int k = 0; k < 3; ++k) edgesep_pooled(&s, batch * coarse * k / 3, batch * coarse * (k + 1) / 3);
  std::vector<double> wanted(total.begin(), total.end());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t j = 0; j < coarse; ++j)
      for (int64_t k = 0; k < span; ++k)
        for (int64_t ch = 0; ch < C; ++ch) {
          const size_t n = static_cast<size_t>(ch), tap = static_cast<size_t>(j * span + k);
          double u = x[at(b, index[tap], ch, frames, C)];
          if (from_norm) {
            u = (u + bias[n] - stats[static_cast<size_t>(2 * b)]) * stats[static_cast<size_t>(2 * b + 1)];
            u = activated(u * gamma[n] + beta[n], slope, false);
          }
          wanted[at(b, j, ch, coarse, C)] += double(weight[tap]) * u;
        }
  const double found = snr_db(out, wanted);
  const std::string what = from_norm ? "pooled sum of normed: " : "pooled sum: ";
  expect(found >= kLimitDb, what + std::to_string(found) + " dB");
}

}  // namespace

void units_equal_the_reference() {
  for (int64_t frames : {1, 2, 7, 300})
    for (int64_t channels : {3, 16, 37, 96})  // a norm of one value alone is rounding noise
      for (int64_t taps : {0, 1, 3, 5, 7})
        for (int64_t stride : {1, 2, 3})
          if (taps || stride == 1)
            unit_equals_the_reference({2, frames, channels, taps, stride, true});
  for (int options = 0; options < 64; ++options) {
    const auto on = [&](int bit) { return (options >> bit & 1) != 0; };
    const bool gated = on(1);
    unit_equals_the_reference({2, 45, 37, 5, 1, on(0), false, gated, on(2), gated && on(3), on(4), on(5)});
  }
  for (int64_t stride : {1, 2, 3})
    unit_equals_the_reference({2, 45, 37, 5, stride, false, true, false, false, false, true, true});
  unit_equals_the_reference({1, 900, 96, 5, 1, true, false, true, true, true, true, true});  // several parts
  for (bool from_norm : {false, true}) pooled_equals_the_reference(from_norm);
}
