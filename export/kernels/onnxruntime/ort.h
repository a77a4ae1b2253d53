// The little of ONNX Runtime's C interface that the adapter needs, without its headers: no package carries them.
//
// OrtApi is one append-only table of functions for every version, so a function is its byte offset; asking for version
// 17 of the table works with every ONNX Runtime from 1.17 on. OrtCustomOp is filled in up to that version's last member.
#pragma once
#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtShapeInferContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtApi;

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

constexpr uint32_t kOrtVersion = 17;
enum OrtErrorCode { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum OrtCharacteristic { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };
// ONNX_TENSOR_ELEMENT_DATA_TYPE_*
constexpr int kOrtAnyType = 0, kOrtFloat = 1, kOrtUint8 = 2, kOrtInt8 = 3, kOrtInt32 = 6, kOrtInt64 = 7;

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
};

// A function of the table: `ort::call<ort::GetDimensions>(api, info, dims, count)`.
namespace ort {

template <size_t Offset, class Result, class... Args>
struct Function {};

using CreateStatus = Function<0, OrtStatus*, int, const char*>;
using CreateCustomOpDomain = Function<208, OrtStatus*, const char*, OrtCustomOpDomain**>;
using CustomOpDomain_Add = Function<216, OrtStatus*, OrtCustomOpDomain*, const OrtCustomOp*>;
using AddCustomOpDomain = Function<224, OrtStatus*, OrtSessionOptions*, OrtCustomOpDomain*>;
using GetTensorMutableData = Function<408, OrtStatus*, OrtValue*, void**>;
using GetTensorElementType = Function<480, OrtStatus*, const OrtTensorTypeAndShapeInfo*, int*>;
using GetDimensionsCount = Function<488, OrtStatus*, const OrtTensorTypeAndShapeInfo*, size_t*>;
using GetDimensions = Function<496, OrtStatus*, const OrtTensorTypeAndShapeInfo*, int64_t*, size_t>;
using GetSymbolicDimensions = Function<504, OrtStatus*, const OrtTensorTypeAndShapeInfo*, const char**, size_t>;
using GetTensorTypeAndShape = Function<520, OrtStatus*, const OrtValue*, OrtTensorTypeAndShapeInfo**>;
using KernelInfoGetAttribute_float = Function<680, OrtStatus*, const OrtKernelInfo*, const char*, float*>;
using KernelInfoGetAttribute_int64 = Function<688, OrtStatus*, const OrtKernelInfo*, const char*, int64_t*>;
using KernelContext_GetInputCount = Function<704, OrtStatus*, const OrtKernelContext*, size_t*>;
using KernelContext_GetOutputCount = Function<712, OrtStatus*, const OrtKernelContext*, size_t*>;
using KernelContext_GetInput = Function<720, OrtStatus*, const OrtKernelContext*, size_t, const OrtValue**>;
using KernelContext_GetOutput =
    Function<728, OrtStatus*, OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**>;
using ReleaseStatus = Function<744, void, OrtStatus*>;
using ReleaseTensorTypeAndShapeInfo = Function<792, void, OrtTensorTypeAndShapeInfo*>;
using ShapeInferContext_GetInputTypeShape =
    Function<2144, OrtStatus*, const OrtShapeInferContext*, size_t, OrtTensorTypeAndShapeInfo**>;
using ShapeInferContext_SetOutputTypeShape =
    Function<2160, OrtStatus*, const OrtShapeInferContext*, size_t, const OrtTensorTypeAndShapeInfo*>;
using KernelContext_ParallelFor =
    Function<2192, OrtStatus*, const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*>;

template <size_t Offset, class Result, class... Args>
Result invoke(Function<Offset, Result, Args...>, const OrtApi* api, Args... args) {
  using Pointer = Result (*)(Args...);
  return (*reinterpret_cast<const Pointer*>(reinterpret_cast<const char*>(api) + Offset))(args...);
}

template <class F, class... Args>
auto call(const OrtApi* api, Args... args) {
  return invoke(F{}, api, args...);
}

}  // namespace ort
