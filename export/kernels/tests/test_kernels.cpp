// The core against a scalar float64 reference, on every instruction set that this processor has. Without a framework,
// so that sanitizers and an emulator can run it. Prints a line a check; exit status 1 if one failed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../core/check.h"
#include "testing.h"

int failures = 0;

void expect(bool good, const std::string& what) {
  if (!good) ++failures;
  std::printf("%s %s: %s\n", good ? "ok  " : "FAIL", edgesep_instruction_set(), what.c_str());
}

double snr_db(const std::vector<float>& got, const std::vector<double>& wanted) {
  double signal = 0, noise = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    signal += wanted[i] * wanted[i];
    noise += (got[i] - wanted[i]) * (got[i] - wanted[i]);
  }
  return 10 * std::log10(signal / (noise + 1e-300));
}

namespace {

struct Case {
  int64_t batch, length, channels, state;
  bool softplus, reverse, skip, gate, bias, start;
  float shift;  // of delta: tiny and large steps
  float level;  // of u: 1e-38 makes denormals
};

struct Data {
  std::vector<float> u, delta, A, B, C, D, z, bias, start, y, last;
};

Data make(const Case& c) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  const auto fill = [&](int64_t count) {
    std::vector<float> out(static_cast<size_t>(count));
    for (float& v : out) v = normal(random);
    return out;
  };
  const int64_t rows = c.batch * c.length;
  Data d;
  d.u = fill(rows * c.channels);
  d.delta = fill(rows * c.channels);
  d.A = fill(c.channels * c.state);
  d.B = fill(rows * c.state);
  d.C = fill(rows * c.state);
  if (c.skip) d.D = fill(c.channels);
  if (c.gate) d.z = fill(rows * c.channels);
  if (c.bias) d.bias = fill(c.channels);
  if (c.start) d.start = fill(c.batch * c.channels * c.state);
  for (float& v : d.u) v *= c.level;
  for (float& v : d.A) v = -std::exp(v);
  // Without softplus a step must be positive by itself, or the recurrence grows.
  for (float& v : d.delta) v = c.softplus ? v + c.shift : std::fabs(v) + (c.bias ? 4.0f : 0.0f);
  d.y.resize(d.u.size());
  d.last.resize(static_cast<size_t>(c.batch * c.channels * c.state));
  return d;
}

EdgesepScan call_of(const Case& c, Data& d) {
  const auto pointer = [](std::vector<float>& v) { return v.empty() ? nullptr : v.data(); };
  EdgesepScan s{};
  s.u = d.u.data(), s.delta = d.delta.data(), s.A = d.A.data(), s.B = d.B.data(), s.C = d.C.data();
  s.D = pointer(d.D), s.z = pointer(d.z), s.delta_bias = pointer(d.bias), s.initial_state = pointer(d.start);
  s.y = d.y.data(), s.last_state = d.last.data();
  s.batch = c.batch, s.length = c.length, s.channels = c.channels, s.state = c.state;
  s.delta_softplus = c.softplus, s.reverse = c.reverse;
  return s;
}

void reference(const EdgesepScan& s, std::vector<double>* y, std::vector<double>* last) {
  y->assign(static_cast<size_t>(s.batch * s.length * s.channels), 0);
  last->assign(static_cast<size_t>(s.batch * s.channels * s.state), 0);
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t c = 0; c < s.channels; ++c) {
      double* h = last->data() + (b * s.channels + c) * s.state;
      for (int64_t n = 0; n < s.state; ++n) h[n] = s.initial_state ? s.initial_state[h - last->data() + n] : 0;
      for (int64_t step = 0; step < s.length; ++step) {
        const int64_t t = b * s.length + (s.reverse ? s.length - 1 - step : step), at = t * s.channels + c;
        double dt = double(s.delta[at]) + (s.delta_bias ? s.delta_bias[c] : 0);
        if (s.delta_softplus) dt = dt > 30 ? dt : std::log1p(std::exp(dt));
        double sum = (s.D ? s.D[c] : 0.0) * s.u[at];
        for (int64_t n = 0; n < s.state; ++n) {
          h[n] = std::exp(dt * s.A[c * s.state + n]) * h[n] + dt * s.u[at] * s.B[t * s.state + n];
          sum += h[n] * s.C[t * s.state + n];
        }
        if (s.z) sum *= s.z[at] / (1 + std::exp(-double(s.z[at])));
        (*y)[static_cast<size_t>(at)] = sum;
      }
    }
}

void run_in_parts(const EdgesepScan& s) {
  const int64_t rows = edgesep_scan_rows(&s);
  for (int k = 0; k < 3; ++k) edgesep_scan(&s, rows * k / 3, rows * (k + 1) / 3);
}

void scan_equals_the_reference(const Case& c) {
  Data d = make(c);
  const EdgesepScan s = call_of(c, d);
  std::vector<double> y, last;
  reference(s, &y, &last);
  run_in_parts(s);
  const double worst = std::fmin(snr_db(d.y, y), snr_db(d.last, last));
  char text[200];
  std::snprintf(text, sizeof text,
                "scan %lldx%lldx%lldx%lld%s%s%s%s%s%s shift %g: %.1f dB", static_cast<long long>(c.batch),
                static_cast<long long>(c.length), static_cast<long long>(c.channels), static_cast<long long>(c.state),
                c.softplus ? " softplus" : "", c.reverse ? " reverse" : "", c.skip ? " D" : "", c.gate ? " z" : "",
                c.bias ? " bias" : "", c.start ? " start" : "", c.shift, worst);
  expect(worst >= kLimitDb, text);
}

// States in groups of 16 channels, and rough exponentials, which are that only where there is a register of channels.
// With a rank, step sizes are a product that nobody has written.
void a_scan_as_a_block_runs_it(int64_t channels, bool rough, float shift, int64_t rank = 0) {
  const Case c{2, 21, channels, 16, true, rough, true, true, true, true, shift, 1};
  Data d = make(c);
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> low(static_cast<size_t>(c.batch * c.length * rank)), matrix(static_cast<size_t>(rank * channels));
  for (float& v : low) v = normal(random);
  for (float& v : matrix) v = normal(random);
  std::vector<float> packed(static_cast<size_t>((channels + 63) / 64 * rank * 64));
  for (int64_t r = 0; r < rank; ++r)
    for (int64_t i = 0; i < channels; ++i)
      packed[static_cast<size_t>((i / 64 * rank + r) * 64 + i % 64)] = matrix[static_cast<size_t>(r * channels + i)];
  for (int64_t i = 0; rank && i < c.batch * c.length * channels; ++i) {
    double sum = 0;
    for (int64_t r = 0; r < rank; ++r)
      sum += double(low[static_cast<size_t>(i / channels * rank + r)]) *
             matrix[static_cast<size_t>(r * channels + i % channels)];
    d.delta[static_cast<size_t>(i)] = static_cast<float>(sum);
  }
  EdgesepScan s = call_of(c, d);
  std::vector<double> y, last;
  reference(s, &y, &last);
  if (rank) s.delta = nullptr, s.low = low.data(), s.steps = packed.data(), s.rank = rank;
  const int64_t groups = (channels + 15) / 16;
  std::vector<float> start(static_cast<size_t>(c.batch * groups * c.state * 16)), ended = start;
  const auto place = [&](int64_t item, int64_t channel, int64_t n) {
    return static_cast<size_t>(((item * groups + channel / 16) * c.state + n) * 16 + channel % 16);
  };
  const auto each = [&](auto f) {
    for (int64_t i = 0; i < c.batch * channels * c.state; ++i)
      f(static_cast<size_t>(i), place(i / (channels * c.state), i / c.state % channels, i % c.state));
  };
  each([&](size_t i, size_t at) { start[at] = d.start[i]; });
  s.initial_state = start.data(), s.last_state = ended.data();
  s.grouped = 1, s.rough = rough;
  run_in_parts(s);
  each([&](size_t i, size_t at) { d.last[i] = ended[at]; });
  const double snr = std::min(snr_db(d.y, y), snr_db(d.last, last));
  expect(snr > (rough ? 70 : 110), "a scan of " + std::to_string(channels) + " channels with states in groups, " +
                                       std::to_string(rank) + " ranks" + (rough ? ", rough" : "") + ": " +
                                       std::to_string(snr) + " dB");
}

void denormals_stay_small_and_finite() {
  const Case c{1, 40, 19, 16, true, false, false, false, false, false, -2, 1e-38f};
  Data d = make(c);
  const EdgesepScan s = call_of(c, d);
  std::vector<double> y, last;
  reference(s, &y, &last);
  run_in_parts(s);
  double worst = 0;
  for (size_t i = 0; i < y.size(); ++i) worst = std::fmax(worst, std::fabs(d.y[i] - y[i]));
  expect(std::isfinite(worst) && worst <= 1e-38, "denormal inputs stay within 1e-38");
}

void nan_stays_in_its_row(std::vector<float> Data::* where, const char* name) {
  const Case c{2, 9, 37, 16, true, false, true, true, true, true, -1, 1};
  Data d = make(c), clean = make(c);
  run_in_parts(call_of(c, clean));
  const size_t row = 20, at = (size_t(c.length) + 5) * size_t(c.channels) + row;  // batch item 1, step 5
  (d.*where)[at] = std::numeric_limits<float>::quiet_NaN();
  run_in_parts(call_of(c, d));
  bool good = std::isnan(d.y[at]);
  for (size_t i = 0; good && i < d.y.size(); ++i)
    if (i / size_t(c.channels * c.length) != 1 || i % size_t(c.channels) != row) good = d.y[i] == clean.y[i];
  expect(good, std::string("NaN in ") + name + " stays in its row");
}

void conv_equals_the_reference(int64_t batch, int64_t length, int64_t channels, int64_t taps, bool reverse) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const auto sized = [](int64_t count) { return std::vector<float>(static_cast<size_t>(count)); };
  auto x = sized(batch * length * channels), w = sized(channels * taps), bias = sized(channels), y = x;
  for (auto* v : {&x, &w, &bias})
    for (float& value : *v) value = normal(random);
  EdgesepConv s{};
  s.x = x.data(), s.w = w.data(), s.bias = bias.data(), s.y = y.data();
  s.batch = batch, s.length = length, s.channels = channels, s.taps = taps, s.reverse = reverse;
  edgesep_conv(&s, 0, edgesep_conv_rows(&s));
  std::vector<double> wanted(x.size());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < length; ++t)
      for (int64_t c = 0; c < channels; ++c) {
        double sum = bias[size_t(c)];
        for (int64_t k = 0; k < taps; ++k)
          if (const int64_t back = taps - 1 - k, from = reverse ? t + back : t - back; from >= 0 && from < length)
            sum += double(w[size_t(c * taps + k)]) * x[size_t((b * length + from) * channels + c)];
        wanted[size_t((b * length + t) * channels + c)] = sum / (1 + std::exp(-sum));
      }
  const double found = snr_db(y, wanted);
  expect(found >= kLimitDb, (reverse ? "reverse conv " : "conv ") + std::to_string(channels) + " channels, " +
                                std::to_string(taps) + " taps: " + std::to_string(found) + " dB");
}

void scans_and_convolutions_equal_the_reference() {
  for (int64_t length : {1, 2, 37, 4096})
    for (const auto& [channels, state] : {std::pair<int64_t, int64_t>{1, 16}, {16, 16}, {37, 1}, {23, 5}, {50, 64}}) {
      scan_equals_the_reference({2, length, channels, state, true, false, true, true, true, false, -2, 1});
      scan_equals_the_reference({1, length, channels, state, true, true, true, true, true, true, -2, 1});
    }
  for (int options = 0; options < 32; ++options)
    scan_equals_the_reference({1, 19, 21, 16, (options & 1) != 0, (options & 2) != 0, (options & 4) != 0,
                               (options & 8) != 0, (options & 16) != 0, (options & 5) == 5, -1, 1});
  for (float shift : {-30.0f, -12.0f, 12.0f})
    scan_equals_the_reference({2, 37, 23, 16, true, false, true, true, true, false, shift, 1});
  for (int64_t channels : {16, 20, 48})
    for (bool rough : {false, true})
      for (float shift : {-6.0f, -2.0f, 3.0f}) {
        a_scan_as_a_block_runs_it(channels, rough, shift);
        a_scan_as_a_block_runs_it(channels, rough, shift, 3);
      }
  denormals_stay_small_and_finite();
  nan_stays_in_its_row(&Data::u, "u");
  nan_stays_in_its_row(&Data::delta, "delta");
  nan_stays_in_its_row(&Data::z, "z");
  for (const auto& [channels, taps] : {std::pair<int64_t, int64_t>{16, 4}, {37, 4}, {5, 1}, {20, 8}})
    for (bool reverse : {false, true}) conv_equals_the_reference(2, 33, channels, taps, reverse);
}

void misfits_are_named() {
  using edgesep::Input;
  const auto in = [](edgesep::Dims dims) { return Input{true, dims}; };
  const std::vector<Input> good = {in({2, 7, 5}), in({2, 7, 5}), in({5, 3}), in({2, 7, 3}), in({2, 7, 3})};
  const auto said = [&](size_t i, edgesep::Dims dims) {
    std::vector<Input> inputs = good;
    inputs[i] = in(dims);
    EdgesepScan sizes{};
    return edgesep::check_scan(inputs, &sizes);
  };
  EdgesepScan sizes{};
  expect(edgesep::check_scan(good, &sizes).empty() && sizes.state == 3, "shapes that fit pass");
  expect(said(3, {2, 7, 4}).find("B has shape (2, 7, 4), expected (2, 7, 3)") == 0, "a wrong B is named");
  expect(said(0, {2, 0, 5}).find("no dimension may be 0") != std::string::npos, "length 0 is refused");
  expect(said(2, {5, 65}).find("at most 64") != std::string::npos, "65 states are refused");
  expect(said(2, {5}).find("A has shape (5)") == 0, "an A without states is refused");
}

}  // namespace

int main() {
  // What a set does not have for itself it takes from the next one that has everything.
  struct Set {
    const char* isa;
    bool floats, pairs, integers;
  };
  int sets = 0;
  for (const auto& [isa, floats, pairs, integers] : {Set{"avx512bf16", false, true, false},
                                                     {"avx512vnni", false, false, true},
                                                     {"avx512", true, true, true},
                                                     {"avxvnni", false, false, true},
                                                     {"avx2", true, true, true},
                                                     {"dotprod", false, false, true},
                                                     {"baseline", true, true, true}}) {
    if (edgesep_use(isa)) {
      std::printf("this processor or build has no %s\n", isa);
      continue;
    }
    ++sets;
    if (floats) scans_and_convolutions_equal_the_reference();
    if (floats) units_equal_the_reference();
    if (pairs) windows_equal_the_reference();
    if (pairs) blocks_equal_the_reference();
    if (integers) streams_equal_the_reference();
  }
  misfits_are_named();
  std::printf("%d failed on %d instruction sets\n", failures, sets);
  return failures || !sets;
}
