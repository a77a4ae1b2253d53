// The operators on CUDA: the core's structures with device pointers, on the caller's stream.
//
// Sequences (u, delta, B, C, z, y; x, y of the convolution) are float or half, everything else and all arithmetic is
// float. Each call returns the status of its launch (cudaError_t, 0 is success).
#pragma once
#ifdef EDGESEP_CUDA_ON_CPU
#include "../tests/cuda_on_cpu.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "../core/causal_conv.h"
#include "../core/selective_scan.h"

// With `half` the pointers to sequences point to 16-bit floats.
int edgesep_cuda_scan(const EdgesepScan* scan, bool half, cudaStream_t stream);
int edgesep_cuda_conv(const EdgesepConv* conv, bool half, cudaStream_t stream);
