// Compiled where ONNX Runtime's own header is at hand (ONNXRUNTIME_INCLUDE_DIR): the compiler itself checks that what
// ort.h declares by offset is what the header says.
#include <onnxruntime_c_api.h>

#include <cstddef>
#include <cstdint>

namespace own {
#include "ort.h"
}

namespace {

template <size_t Offset, class Result, class... Args>
constexpr size_t offset(own::ort::Function<Offset, Result, Args...>) {
  return Offset;
}

#define SAME_FUNCTION(name) static_assert(offset(own::ort::name{}) == offsetof(OrtApi, name), #name)
SAME_FUNCTION(CreateStatus);
SAME_FUNCTION(CreateCustomOpDomain);
SAME_FUNCTION(CustomOpDomain_Add);
SAME_FUNCTION(AddCustomOpDomain);
SAME_FUNCTION(GetTensorMutableData);
SAME_FUNCTION(GetTensorElementType);
SAME_FUNCTION(GetDimensionsCount);
SAME_FUNCTION(GetDimensions);
SAME_FUNCTION(GetSymbolicDimensions);
SAME_FUNCTION(GetTensorTypeAndShape);
SAME_FUNCTION(KernelInfoGetAttribute_float);
SAME_FUNCTION(KernelInfoGetAttribute_int64);
SAME_FUNCTION(KernelContext_GetInputCount);
SAME_FUNCTION(KernelContext_GetOutputCount);
SAME_FUNCTION(KernelContext_GetInput);
SAME_FUNCTION(KernelContext_GetOutput);
SAME_FUNCTION(ReleaseStatus);
SAME_FUNCTION(ReleaseTensorTypeAndShapeInfo);
SAME_FUNCTION(ShapeInferContext_GetInputTypeShape);
SAME_FUNCTION(ShapeInferContext_SetOutputTypeShape);
SAME_FUNCTION(KernelContext_ParallelFor);

#define SAME_MEMBER(name) static_assert(offsetof(own::OrtCustomOp, name) == offsetof(OrtCustomOp, name), #name)
SAME_MEMBER(version);
SAME_MEMBER(CreateKernel);
SAME_MEMBER(GetName);
SAME_MEMBER(GetExecutionProviderType);
SAME_MEMBER(GetInputType);
SAME_MEMBER(GetInputTypeCount);
SAME_MEMBER(GetOutputType);
SAME_MEMBER(GetOutputTypeCount);
SAME_MEMBER(KernelCompute);
SAME_MEMBER(KernelDestroy);
SAME_MEMBER(GetInputCharacteristic);
SAME_MEMBER(GetOutputCharacteristic);
SAME_MEMBER(GetInputMemoryType);
SAME_MEMBER(GetVariadicInputMinArity);
SAME_MEMBER(GetVariadicInputHomogeneity);
SAME_MEMBER(GetVariadicOutputMinArity);
SAME_MEMBER(GetVariadicOutputHomogeneity);
SAME_MEMBER(CreateKernelV2);
SAME_MEMBER(KernelComputeV2);
SAME_MEMBER(InferOutputShapeFn);
SAME_MEMBER(GetStartVersion);
SAME_MEMBER(GetEndVersion);

static_assert(own::kOrtVersion <= ORT_API_VERSION, "a header older than the version that is asked for");
static_assert(own::kOrtFloat == static_cast<int>(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT), "float");
static_assert(own::kOrtAnyType == static_cast<int>(ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED), "any");
static_assert(own::kOrtUint8 == static_cast<int>(ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8), "uint8");
static_assert(own::kOrtInt8 == static_cast<int>(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8), "int8");
static_assert(own::kOrtInt64 == static_cast<int>(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64), "int64");
static_assert(int{own::ORT_FAIL} == int{ORT_FAIL} && int{own::ORT_INVALID_ARGUMENT} == int{ORT_INVALID_ARGUMENT}, "");
static_assert(int{own::ORT_OPTIONAL} == int{INPUT_OUTPUT_OPTIONAL}, "optional");

}  // namespace
