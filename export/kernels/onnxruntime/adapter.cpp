// ONNX Runtime custom operators around the core: shapes checked, rows split over the session's own threads.
#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <string>

#include "../core/check.h"
#include "ort.h"

namespace {

using edgesep::Input;

// A status of ONNX Runtime as an exception inside this file; none crosses the C boundary.
struct Failed {
  OrtStatus* status;
};

void must(OrtStatus* status) {
  if (status) throw Failed{status};
}

template <class Body>
OrtStatus* guarded(const OrtApi* api, Body body) {
  try {
    body();
    return nullptr;
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::exception& e) {
    return ort::call<ort::CreateStatus>(api, static_cast<int>(ORT_FAIL), e.what());
  }
}

[[noreturn]] void refuse(const OrtApi* api, const std::string& why) {
  throw Failed{ort::call<ort::CreateStatus>(api, static_cast<int>(ORT_INVALID_ARGUMENT), why.c_str())};
}

struct Tensor {
  Input shape;
  const float* data = nullptr;
};

// Input `i`, or one that is not given.
Tensor input(const OrtApi* api, OrtKernelContext* context, size_t i) {
  Tensor tensor;
  const OrtValue* value = nullptr;
  must(ort::call<ort::KernelContext_GetInput>(api, static_cast<const OrtKernelContext*>(context), i, &value));
  if (!value) return tensor;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  must(ort::call<ort::GetTensorTypeAndShape>(api, value, &info));
  const auto release = [api](OrtTensorTypeAndShapeInfo* p) { ort::call<ort::ReleaseTensorTypeAndShapeInfo>(api, p); };
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> owned(info, release);
  size_t rank = 0;
  const OrtTensorTypeAndShapeInfo* readable = info;
  must(ort::call<ort::GetDimensionsCount>(api, readable, &rank));
  tensor.shape.given = true;
  tensor.shape.dims.resize(rank);
  must(ort::call<ort::GetDimensions>(api, readable, tensor.shape.dims.data(), rank));
  void* data = nullptr;
  must(ort::call<ort::GetTensorMutableData>(api, const_cast<OrtValue*>(value), &data));
  tensor.data = static_cast<const float*>(data);
  return tensor;
}

// Output `i` of that shape, or null where the graph leaves it out.
float* output(const OrtApi* api, OrtKernelContext* context, size_t i, const std::vector<int64_t>& dims) {
  size_t count = 0;
  must(ort::call<ort::KernelContext_GetOutputCount>(api, static_cast<const OrtKernelContext*>(context), &count));
  if (i >= count) return nullptr;
  OrtValue* value = nullptr;
  must(ort::call<ort::KernelContext_GetOutput>(api, context, i, dims.data(), dims.size(), &value));
  if (!value) return nullptr;
  void* data = nullptr;
  must(ort::call<ort::GetTensorMutableData>(api, value, &data));
  return static_cast<float*>(data);
}

// `kernel(argument, first, end)` over `rows`, a few parts for each thread that the session may have.
template <class Argument>
void split(const OrtApi* api, OrtKernelContext* context, const Argument& argument,
           void (*kernel)(const Argument*, int64_t, int64_t), int64_t rows) {
  struct Work {
    const Argument* argument;
    void (*kernel)(const Argument*, int64_t, int64_t);
    int64_t rows, parts;
  } work{&argument, kernel, rows, std::min<int64_t>(rows, 64)};
  const auto part = [](void* data, size_t i) {
    const Work& w = *static_cast<const Work*>(data);
    const int64_t k = static_cast<int64_t>(i);
    w.kernel(w.argument, w.rows * k / w.parts, w.rows * (k + 1) / w.parts);
  };
  must(ort::call<ort::KernelContext_ParallelFor>(api, static_cast<const OrtKernelContext*>(context),
                                                 static_cast<void (*)(void*, size_t)>(part),
                                                 static_cast<size_t>(work.parts), size_t{0},
                                                 static_cast<void*>(&work)));
}

// A flag that a file may leave out: it is 0 then.
bool attribute(const OrtApi* api, const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  if (OrtStatus* absent = ort::call<ort::KernelInfoGetAttribute_int64>(api, info, name, &value))
    ort::call<ort::ReleaseStatus>(api, absent);
  return value != 0;
}

struct Scan {
  static constexpr const char* kName = "SelectiveScan";
  static constexpr size_t kInputs = edgesep::kScanInputs, kRequired = edgesep::kScanRequired, kOutputs = 2;

  const OrtApi* api;
  bool softplus, reverse;

  Scan(const OrtApi* table, const OrtKernelInfo* info)
      : api(table), softplus(attribute(table, info, "delta_softplus")), reverse(attribute(table, info, "reverse")) {}

  void compute(OrtKernelContext* context) const {
    size_t count = 0;
    must(ort::call<ort::KernelContext_GetInputCount>(api, static_cast<const OrtKernelContext*>(context), &count));
    std::vector<Input> shapes;
    const float* data[kInputs] = {};
    for (size_t i = 0; i < std::min(count, kInputs); ++i) {
      Tensor tensor = input(api, context, i);
      data[i] = tensor.data;
      shapes.push_back(std::move(tensor.shape));
    }
    EdgesepScan scan{};
    if (const std::string wrong = edgesep::check_scan(shapes, &scan); !wrong.empty())
      refuse(api, "edgesep::SelectiveScan: " + wrong);
    scan.u = data[0], scan.delta = data[1], scan.A = data[2], scan.B = data[3], scan.C = data[4];
    scan.D = data[5], scan.z = data[6], scan.delta_bias = data[7], scan.initial_state = data[8];
    scan.delta_softplus = softplus, scan.reverse = reverse;
    scan.y = output(api, context, 0, shapes[0].dims);
    scan.last_state = output(api, context, 1, {scan.batch, scan.channels, scan.state});
    split(api, context, scan, edgesep_scan, edgesep_scan_rows(&scan));
  }
};

struct Conv {
  static constexpr const char* kName = "CausalConv1dSilu";
  static constexpr size_t kInputs = edgesep::kConvInputs, kRequired = kInputs, kOutputs = 1;

  const OrtApi* api;
  bool reverse;

  Conv(const OrtApi* table, const OrtKernelInfo* info) : api(table), reverse(attribute(table, info, "reverse")) {}

  void compute(OrtKernelContext* context) const {
    std::vector<Input> shapes;
    const float* data[kInputs] = {};
    for (size_t i = 0; i < kInputs; ++i) {
      Tensor tensor = input(api, context, i);
      data[i] = tensor.data;
      shapes.push_back(std::move(tensor.shape));
    }
    EdgesepConv conv{};
    if (const std::string wrong = edgesep::check_conv(shapes, &conv); !wrong.empty())
      refuse(api, "edgesep::CausalConv1dSilu: " + wrong);
    conv.x = data[0], conv.w = data[1], conv.bias = data[2];
    conv.reverse = reverse;
    conv.y = output(api, context, 0, shapes[0].dims);
    split(api, context, conv, edgesep_conv, edgesep_conv_rows(&conv));
  }
};

std::atomic<const OrtApi*> table{nullptr};  // of the process's ONNX Runtime; set when the library is registered

// The first output is shaped as the first input, symbolic dimensions included. A dimension without size or name would
// become a size of -1, and an input whose shape is not known yet looks like a scalar: then nothing is said.
OrtStatus* infer(const OrtCustomOp*, OrtShapeInferContext* context) {
  const OrtApi* api = table;
  return guarded(api, [api, context] {
    OrtTensorTypeAndShapeInfo* first = nullptr;
    must(ort::call<ort::ShapeInferContext_GetInputTypeShape>(
        api, static_cast<const OrtShapeInferContext*>(context), size_t{0}, &first));
    const OrtTensorTypeAndShapeInfo* readable = first;
    size_t rank = 0;
    must(ort::call<ort::GetDimensionsCount>(api, readable, &rank));
    if (!rank) return;
    std::vector<int64_t> dims(rank);
    std::vector<const char*> names(rank, "");
    must(ort::call<ort::GetDimensions>(api, readable, dims.data(), rank));
    must(ort::call<ort::GetSymbolicDimensions>(api, readable, names.data(), rank));
    for (size_t i = 0; i < rank; ++i)
      if (dims[i] < 0 && !*names[i]) return;
    must(ort::call<ort::ShapeInferContext_SetOutputTypeShape>(
        api, static_cast<const OrtShapeInferContext*>(context), size_t{0}, readable));
  });
}

template <class Kernel>
const OrtCustomOp* operation() {
  static const OrtCustomOp op = [] {
    OrtCustomOp made{};
    made.version = kOrtVersion;
    made.GetName = [](const OrtCustomOp*) { return Kernel::kName; };
    made.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // CPU
    made.GetInputType = [](const OrtCustomOp*, size_t) { return kOrtFloat; };
    made.GetInputTypeCount = [](const OrtCustomOp*) { return Kernel::kInputs; };
    made.GetOutputType = [](const OrtCustomOp*, size_t) { return kOrtFloat; };
    made.GetOutputTypeCount = [](const OrtCustomOp*) { return Kernel::kOutputs; };
    made.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    made.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) -> int {
      return i < Kernel::kRequired ? ORT_REQUIRED : ORT_OPTIONAL;
    };
    made.GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) -> int { return i ? ORT_OPTIONAL : ORT_REQUIRED; };
    made.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    made.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    made.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    made.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    made.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    made.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
      return guarded(api, [&] { *kernel = new Kernel(api, info); });
    };
    made.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const Kernel& self = *static_cast<const Kernel*>(kernel);
      return guarded(self.api, [&] { self.compute(context); });
    };
    made.InferOutputShapeFn = infer;
    made.GetStartVersion = [](const OrtCustomOp*) { return 1; };
    made.GetEndVersion = [](const OrtCustomOp*) { return 1; };
    return made;
  }();
  return &op;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                                const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kOrtVersion);
  if (!api) {  // the first functions of the table are the same in every version
    const std::string why = std::string("the edgesep kernels need ONNX Runtime 1.17 or newer, this is ") +
                            base->GetVersionString() + "; pip install -U onnxruntime";
    return ort::call<ort::CreateStatus>(base->GetApi(1), static_cast<int>(ORT_FAIL), why.c_str());
  }
  table = api;
  return guarded(api, [api, options] {
    // One domain for every session: it is never changed after this, and sessions keep a pointer to it.
    static OrtCustomOpDomain* const domain = [api] {
      OrtCustomOpDomain* made = nullptr;
      must(ort::call<ort::CreateCustomOpDomain>(api, "edgesep", &made));
      must(ort::call<ort::CustomOpDomain_Add>(api, made, operation<Scan>()));
      must(ort::call<ort::CustomOpDomain_Add>(api, made, operation<Conv>()));
      return made;
    }();
    must(ort::call<ort::AddCustomOpDomain>(api, options, domain));
  });
}
