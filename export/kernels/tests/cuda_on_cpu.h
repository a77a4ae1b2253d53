// As much of CUDA as the kernels and their test use, on the CPU: the threads of a block are threads, blocks run one after
// the other. Slow, and exact about indices, barriers and arithmetic, on machines and in CI without a GPU.
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(n)

using std::min;
#ifdef __aarch64__
using __half = __fp16;
#else
using __half = _Float16;
#endif
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return static_cast<__half>(x); }

struct dim3 {
  unsigned x, y;
};
inline thread_local dim3 blockIdx{}, threadIdx{};
inline std::barrier<>* block_barrier = nullptr;
inline void __syncthreads() { block_barrier->arrive_and_wait(); }

using cudaStream_t = void*;

template <class Kernel, class... Args>
void run_on_cpu(Kernel kernel, dim3 grid, int threads, cudaStream_t, Args... args) {
  for (unsigned x = 0; x < grid.x; ++x)
    for (unsigned y = 0; y < grid.y; ++y) {
      std::barrier<> barrier(threads);
      block_barrier = &barrier;
      std::vector<std::thread> block;
      for (int t = 0; t < threads; ++t)
        block.emplace_back([&, t] {
          blockIdx = {x, y};
          threadIdx = {static_cast<unsigned>(t), 0};
          kernel(args...);
          barrier.arrive_and_drop();
        });
      for (std::thread& t : block) t.join();
    }
}

enum { cudaSuccess, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline int cudaGetLastError() { return 0; }
inline int cudaDeviceSynchronize() { return 0; }
inline int cudaGetDeviceCount(int* count) { return *count = 1, 0; }
inline int cudaMalloc(void** p, size_t bytes) { return *p = std::malloc(bytes), 0; }
inline int cudaFree(void* p) { return std::free(p), 0; }
inline int cudaMemcpy(void* to, const void* from, size_t bytes, int) { return std::memcpy(to, from, bytes), 0; }
