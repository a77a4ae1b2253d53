// One thread a channel, a loop over time, decay and state in registers. Channels lie side by side in memory, so a warp
// reads and writes whole lines; B and C are the same for all channels of a batch item and go through shared memory.
// Splitting over time instead would pay for long sequences of few rows; a separator has short ones and 10^5 rows.
#include "kernels.h"

#ifdef EDGESEP_CUDA_ON_CPU
#define EDGESEP_LAUNCH(kernel, grid, stream, ...) run_on_cpu(kernel, grid, kThreads, stream, __VA_ARGS__)
#else
#include <cuda_fp16.h>
#define EDGESEP_LAUNCH(kernel, grid, stream, ...) kernel<<<grid, kThreads, 0, stream>>>(__VA_ARGS__)
#endif

namespace {

constexpr int kThreads = 128;  // channels of a block
constexpr int kChunk = 8;      // steps whose loads are in flight together
constexpr int kConvSteps = 32;
constexpr float kLog2E = 1.44269504088896341f;

__device__ float read(const float* p) { return *p; }
__device__ float read(const __half* p) { return __half2float(*p); }
__device__ void write(float* p, float x) { *p = x; }
__device__ void write(__half* p, float x) { *p = __float2half_rn(x); }

__device__ float silu(float x) { return x / (1.0f + expf(-x)); }
__device__ float softplus(float x) { return (x < 0.0f ? 0.0f : x) + log1pf(expf(-fabsf(x))); }  // NaN stays NaN

template <class T>
__device__ const T* as(const float* p) {
  return reinterpret_cast<const T*>(p);
}

// Up to kState states; those beyond s.state have no decay, no input and no weight, so that they stay zero.
template <class T, int kState>
__global__ void __launch_bounds__(kThreads) scan_kernel(const EdgesepScan s) {
  __shared__ float mixing[2][kChunk][kState];
  const int64_t item = blockIdx.x, channel = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  const bool mine = channel < s.channels;
  const int64_t states = (item * s.channels + channel) * s.state;
  float decay[kState], h[kState];
#pragma unroll
  for (int n = 0; n < kState; ++n) {
    const bool used = mine && n < s.state;
    decay[n] = used ? s.A[channel * s.state + n] * kLog2E : 0.0f;
    h[n] = used && s.initial_state ? s.initial_state[states + n] : 0.0f;
  }
  const float bias = mine && s.delta_bias ? s.delta_bias[channel] : 0.0f;
  const float skip = mine && s.D ? s.D[channel] : 0.0f;
  // Row of step t in the sequences.
  const auto row = [&](int64_t t) { return item * s.length + (s.reverse ? s.length - 1 - t : t); };
  for (int64_t begin = 0; begin < s.length; begin += kChunk) {
    const int steps = static_cast<int>(min(int64_t(kChunk), s.length - begin));
    float u[kChunk], dt[kChunk], z[kChunk];
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      const bool here = mine && k < steps;
      const int64_t at = here ? row(begin + k) * s.channels + channel : 0;
      u[k] = here ? read(as<T>(s.u) + at) : 0.0f;
      dt[k] = here ? read(as<T>(s.delta) + at) : 0.0f;
      z[k] = here && s.z ? read(as<T>(s.z) + at) : 0.0f;
    }
    __syncthreads();  // the last chunk's B and C are read
    for (int i = threadIdx.x; i < kChunk * kState; i += kThreads) {
      const int k = i / kState, n = i % kState;
      const bool here = k < steps && n < s.state;
      const int64_t at = here ? row(begin + k) * s.state + n : 0;
      mixing[0][k][n] = here ? read(as<T>(s.B) + at) : 0.0f;
      mixing[1][k][n] = here ? read(as<T>(s.C) + at) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      if (k >= steps) break;
      float step = dt[k] + bias;
      if (s.delta_softplus) step = softplus(step);
      const float x = step * u[k];
      float y = skip * u[k];
#pragma unroll
      for (int n = 0; n < kState; ++n) {
        h[n] = exp2f(step * decay[n]) * h[n] + x * mixing[0][k][n];
        y += h[n] * mixing[1][k][n];
      }
      if (s.z) y *= silu(z[k]);
      if (mine) write(reinterpret_cast<T*>(s.y) + row(begin + k) * s.channels + channel, y);
    }
  }
  if (mine && s.last_state) {
#pragma unroll
    for (int n = 0; n < kState; ++n)
      if (n < s.state) s.last_state[states + n] = h[n];
  }
}

// kConvSteps steps of one channel, the last inputs in registers.
template <class T>
__global__ void __launch_bounds__(kThreads) conv_kernel(const EdgesepConv s, int64_t parts) {
  const int64_t item = blockIdx.x / parts, begin = blockIdx.x % parts * kConvSteps;
  const int64_t channel = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  if (channel >= s.channels) return;
  const T* x = as<T>(s.x);
  const auto at = [&](int64_t t) {
    return (item * s.length + (s.reverse ? s.length - 1 - t : t)) * s.channels + channel;
  };
  float weight[EDGESEP_CONV_MAX_TAPS], past[EDGESEP_CONV_MAX_TAPS];  // the newest last
#pragma unroll
  for (int k = 0; k < EDGESEP_CONV_MAX_TAPS; ++k) {
    const int64_t tap = k - (EDGESEP_CONV_MAX_TAPS - s.taps), from = begin - EDGESEP_CONV_MAX_TAPS + k;
    weight[k] = tap >= 0 ? s.w[channel * s.taps + tap] : 0.0f;
    past[k] = tap >= 0 && from >= 0 ? read(x + at(from)) : 0.0f;
  }
  const int64_t end = min(begin + kConvSteps, s.length);
  for (int64_t t = begin; t < end; ++t) {
    float sum = s.bias ? s.bias[channel] : 0.0f;
#pragma unroll
    for (int k = 0; k + 1 < EDGESEP_CONV_MAX_TAPS; ++k) past[k] = past[k + 1];
    past[EDGESEP_CONV_MAX_TAPS - 1] = read(x + at(t));
#pragma unroll
    for (int k = 0; k < EDGESEP_CONV_MAX_TAPS; ++k) sum += weight[k] * past[k];
    write(reinterpret_cast<T*>(s.y) + at(t), silu(sum));
  }
}

unsigned blocks(int64_t channels) { return static_cast<unsigned>((channels + kThreads - 1) / kThreads); }

template <class T>
int launch(const EdgesepScan& s, cudaStream_t stream) {
  const dim3 grid{static_cast<unsigned>(s.batch), blocks(s.channels)};
  if (s.state <= 16)
    EDGESEP_LAUNCH((scan_kernel<T, 16>), grid, stream, s);
  else
    EDGESEP_LAUNCH((scan_kernel<T, EDGESEP_SCAN_MAX_STATE>), grid, stream, s);
  return cudaGetLastError();
}

template <class T>
int launch(const EdgesepConv& s, cudaStream_t stream) {
  const int64_t parts = (s.length + kConvSteps - 1) / kConvSteps;
  const dim3 grid{static_cast<unsigned>(s.batch * parts), blocks(s.channels)};
  EDGESEP_LAUNCH(conv_kernel<T>, grid, stream, s, parts);
  return cudaGetLastError();
}

}  // namespace

int edgesep_cuda_scan(const EdgesepScan* scan, bool half, cudaStream_t stream) {
  return half ? launch<__half>(*scan, stream) : launch<float>(*scan, stream);
}

int edgesep_cuda_conv(const EdgesepConv* conv, bool half, cudaStream_t stream) {
  return half ? launch<__half>(*conv, stream) : launch<float>(*conv, stream);
}
