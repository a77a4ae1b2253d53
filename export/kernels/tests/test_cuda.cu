// The CUDA kernels against the float64 reference, and timed: SNR, share of memory bandwidth. Needs a GPU; exit status 77
// without one, 1 if a check failed. With EDGESEP_CUDA_ON_CPU the same checks run on the CPU, without times.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../cuda/kernels.h"
#ifndef EDGESEP_CUDA_ON_CPU
#include <cuda_fp16.h>
#endif

namespace {

int failures = 0;

struct Buffers {
  std::vector<void*> held;
  template <class T>
  float* copy(const std::vector<T>& host) {
    void* device = nullptr;
    cudaMalloc(&device, host.size() * sizeof(T));
    cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice);
    held.push_back(device);
    return static_cast<float*>(device);
  }
  ~Buffers() {
    for (void* p : held) cudaFree(p);
  }
};

std::vector<float> normal(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> next;
  std::vector<float> out(count);
  for (float& v : out) v = next(random);
  return out;
}

std::vector<__half> halves(const std::vector<float>& in) {
  std::vector<__half> out;
  for (float v : in) out.push_back(__float2half_rn(v));
  return out;
}

// What the kernel sees: with 16-bit sequences the reference is given the rounded numbers.
void round_to_half(std::vector<float>& in) {
  for (float& v : in) v = __half2float(__float2half_rn(v));
}

#ifdef EDGESEP_CUDA_ON_CPU
void time_scan(const EdgesepScan&, bool, int, float*) {}
#else
void time_scan(const EdgesepScan& s, bool half, int repeats, float* other) {
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  cudaEventRecord(start);
  for (int i = 0; i < repeats; ++i) edgesep_cuda_scan(&s, half, nullptr);
  cudaEventRecord(stop);
  cudaEventSynchronize(stop);
  float ms = 0;
  cudaEventElapsedTime(&ms, start, stop);
  const double rows = double(s.batch) * s.length, wide = rows * s.channels;
  const double seconds = ms / 1e3 / repeats, bytes = double(half ? 2 : 4) * (4 * wide + 2 * rows * s.state);
  // The machine's own bandwidth, by copying what the scan reads.
  cudaEventRecord(start);
  for (int i = 0; i < repeats; ++i)
    cudaMemcpyAsync(other, s.u, static_cast<size_t>(wide) * (half ? 2 : 4), cudaMemcpyDeviceToDevice, nullptr);
  cudaEventRecord(stop);
  cudaEventSynchronize(stop);
  cudaEventElapsedTime(&ms, start, stop);
  const double copied = 2.0 * wide * (half ? 2 : 4) / (ms / 1e3 / repeats);
  std::printf(", %.4f ms, %.4f ns per state update, %.0f GB/s, %.0f %% of a copy's", seconds * 1e3,
              seconds * 1e9 / (wide * s.state), bytes / seconds / 1e9, 100 * bytes / seconds / copied);
}
#endif

void scan(int64_t batch, int64_t length, int64_t channels, int64_t state, bool reverse, bool half, double limit_db,
          int repeats) {
  const size_t rows = static_cast<size_t>(batch * length), wide = rows * channels;
  auto u = normal(wide, 1), delta = normal(wide, 2), z = normal(wide, 3), B = normal(rows * state, 4);
  auto C = normal(rows * state, 5), A = normal(channels * state, 6), D = normal(channels, 7), bias = normal(channels, 8);
  for (float& v : A) v = -std::exp(v);
  for (float& v : delta) v -= 2;
  if (half)
    for (auto* v : {&u, &delta, &z, &B, &C}) round_to_half(*v);
  Buffers gpu;
  const auto sequence = [&](const std::vector<float>& v) { return half ? gpu.copy(halves(v)) : gpu.copy(v); };
  EdgesepScan s{};
  s.u = sequence(u), s.delta = sequence(delta), s.z = sequence(z), s.B = sequence(B), s.C = sequence(C);
  s.A = gpu.copy(A), s.D = gpu.copy(D), s.delta_bias = gpu.copy(bias);
  s.y = sequence(u);
  s.batch = batch, s.length = length, s.channels = channels, s.state = state;
  s.delta_softplus = 1, s.reverse = reverse;
  if (const int status = edgesep_cuda_scan(&s, half, nullptr)) {
    std::printf("FAIL launch: CUDA error %d\n", status);
    ++failures;
    return;
  }
  cudaDeviceSynchronize();
  std::vector<float> y(wide);
  if (half) {
    std::vector<__half> raw(wide);
    cudaMemcpy(raw.data(), s.y, wide * sizeof(__half), cudaMemcpyDeviceToHost);
    for (size_t i = 0; i < wide; ++i) y[i] = __half2float(raw[i]);
  } else {
    cudaMemcpy(y.data(), s.y, wide * sizeof(float), cudaMemcpyDeviceToHost);
  }
  double signal = 0, noise = 0;
  std::vector<double> h(static_cast<size_t>(state));
  for (int64_t b = 0; b < batch; b += std::max<int64_t>(1, batch / 4))  // a few items of many
    for (int64_t c = 0; c < channels; ++c) {
      std::fill(h.begin(), h.end(), 0.0);
      for (int64_t step = 0; step < length; ++step) {
        const int64_t t = b * length + (reverse ? length - 1 - step : step), at = t * channels + c;
        const double raw = double(delta[at]) + bias[c], dt = raw > 30 ? raw : std::log1p(std::exp(raw));
        double sum = double(D[c]) * u[at];
        for (int64_t n = 0; n < state; ++n) {
          h[n] = std::exp(dt * A[c * state + n]) * h[n] + dt * u[at] * B[t * state + n];
          sum += h[n] * C[t * state + n];
        }
        sum *= z[at] / (1 + std::exp(-double(z[at])));
        signal += sum * sum, noise += (y[at] - sum) * (y[at] - sum);
      }
    }
  const double db = 10 * std::log10(signal / noise);
  if (!(db >= limit_db)) ++failures;
  std::printf("%s scan %lldx%lldx%lldx%lld%s %s: %.1f dB", db >= limit_db ? "ok  " : "FAIL",
              static_cast<long long>(batch), static_cast<long long>(length), static_cast<long long>(channels),
              static_cast<long long>(state), reverse ? " reverse" : "", half ? "fp16" : "fp32", db);
  if (repeats) time_scan(s, half, repeats, gpu.copy(u));
  std::printf("\n");
}

void conv(int64_t batch, int64_t length, int64_t channels, int64_t taps, bool reverse) {
  const auto x = normal(static_cast<size_t>(batch * length * channels), 1);
  const auto w = normal(static_cast<size_t>(channels * taps), 2), bias = normal(static_cast<size_t>(channels), 3);
  Buffers gpu;
  EdgesepConv s{};
  s.x = gpu.copy(x), s.w = gpu.copy(w), s.bias = gpu.copy(bias), s.y = gpu.copy(x);
  s.batch = batch, s.length = length, s.channels = channels, s.taps = taps, s.reverse = reverse;
  edgesep_cuda_conv(&s, false, nullptr);
  std::vector<float> y(x.size());
  cudaMemcpy(y.data(), s.y, y.size() * sizeof(float), cudaMemcpyDeviceToHost);
  double signal = 0, noise = 0;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < length; ++t)
      for (int64_t c = 0; c < channels; ++c) {
        double sum = bias[c];
        for (int64_t k = 0; k < taps; ++k) {
          const int64_t from = reverse ? t + taps - 1 - k : t - taps + 1 + k;
          if (from >= 0 && from < length) sum += double(w[c * taps + k]) * x[(b * length + from) * channels + c];
        }
        sum /= 1 + std::exp(-sum);
        const double got = y[(b * length + t) * channels + c];
        signal += sum * sum, noise += (got - sum) * (got - sum);
      }
  const double db = 10 * std::log10(signal / noise);
  if (!(db >= 100)) ++failures;
  std::printf("%s conv %lldx%lldx%lld, %lld taps%s: %.1f dB\n", db >= 100 ? "ok  " : "FAIL",
              static_cast<long long>(batch), static_cast<long long>(length), static_cast<long long>(channels),
              static_cast<long long>(taps), reverse ? " reverse" : "", db);
}

}  // namespace

int main() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || !count) {
    std::printf("no CUDA GPU here\n");
    return 77;
  }
  for (int64_t length : {1, 7, 8, 9, 130})
    for (int64_t state : {1, 16, 20, 64}) scan(2, length, 133, state, length % 2, false, 100, 0);
  scan(2, 130, 133, 16, false, true, 60, 0);
  for (int64_t length : {1, 3, 32, 75})
    for (int64_t taps : {1, 4, 8}) conv(2, length, 133, taps, length % 2);
#ifndef EDGESEP_CUDA_ON_CPU
  scan(126, 250, 512, 16, false, false, 100, 50);  // SPMamba over bins and over frames, one second
  scan(257, 119, 512, 16, true, false, 100, 50);
  scan(257, 119, 512, 16, true, true, 60, 50);
#endif
  std::printf("%d failed\n", failures);
  return failures ? 1 : 0;
}
