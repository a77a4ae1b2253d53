// ONNX Runtime custom operators around the core: shapes checked, rows split over the session's own threads.
#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <string>

#include "../core/check.h"
#include "../core/room.h"
#include "ort.h"

namespace {

using edgesep::Dims;
using edgesep::Input;
using edgesep::room;

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
  int type = kOrtFloat;

  const int64_t* integers() const { return reinterpret_cast<const int64_t*>(data); }
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
  must(ort::call<ort::GetTensorElementType>(api, readable, &tensor.type));
  void* data = nullptr;
  must(ort::call<ort::GetTensorMutableData>(api, const_cast<OrtValue*>(value), &data));
  tensor.data = static_cast<const float*>(data);
  return tensor;
}

// The first `most` inputs of the contract, those that the node leaves out at the end too.
std::vector<Tensor> inputs(const OrtApi* api, OrtKernelContext* context, size_t most) {
  size_t count = 0;
  must(ort::call<ort::KernelContext_GetInputCount>(api, static_cast<const OrtKernelContext*>(context), &count));
  std::vector<Tensor> found(most);
  for (size_t i = 0; i < std::min(count, most); ++i) found[i] = input(api, context, i);
  return found;
}

std::vector<Input> shapes_of(const std::vector<Tensor>& tensors) {
  std::vector<Input> shapes;
  for (const Tensor& tensor : tensors) shapes.push_back(tensor.shape);
  return shapes;
}

void require(const OrtApi* api, const char* name, const std::string& wrong) {
  if (!wrong.empty()) refuse(api, std::string("edgesep::") + name + ": " + wrong);
}

// Output `i` of that shape, or null where the graph leaves it out.
float* output(const OrtApi* api, OrtKernelContext* context, size_t i, const Dims& dims) {
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

// `kernel(argument, first, end)` over `rows`, a few parts for each thread that the session may have; fewer of them where
// what a call begins with is worth as much as that all threads end together.
constexpr int64_t kParts = 64, kFewParts = 16;

template <class Argument>
void split(const OrtApi* api, OrtKernelContext* context, const Argument& argument,
           void (*kernel)(const Argument*, int64_t, int64_t), int64_t rows, int64_t most = kParts) {
  struct Work {
    const Argument* argument;
    void (*kernel)(const Argument*, int64_t, int64_t);
    int64_t rows, parts;
  } work{&argument, kernel, rows, std::min(rows, most)};
  const auto part = [](void* data, size_t i) {
    const Work& w = *static_cast<const Work*>(data);
    const int64_t k = static_cast<int64_t>(i);
    w.kernel(w.argument, w.rows * k / w.parts, w.rows * (k + 1) / w.parts);
  };
  if (work.parts == 1) return kernel(&argument, 0, rows);
  must(ort::call<ort::KernelContext_ParallelFor>(api, static_cast<const OrtKernelContext*>(context),
                                                 static_cast<void (*)(void*, size_t)>(part),
                                                 static_cast<size_t>(work.parts), size_t{0},
                                                 static_cast<void*>(&work)));
}

// Attributes that a file may leave out.
int64_t attribute(const OrtApi* api, const OrtKernelInfo* info, const char* name, int64_t otherwise = 0) {
  int64_t value = otherwise;
  if (OrtStatus* absent = ort::call<ort::KernelInfoGetAttribute_int64>(api, info, name, &value)) {
    ort::call<ort::ReleaseStatus>(api, absent);
    return otherwise;
  }
  return value;
}

float attribute_float(const OrtApi* api, const OrtKernelInfo* info, const char* name, float otherwise) {
  float value = otherwise;
  if (OrtStatus* absent = ort::call<ort::KernelInfoGetAttribute_float>(api, info, name, &value)) {
    ort::call<ort::ReleaseStatus>(api, absent);
    return otherwise;
  }
  return value;
}

struct Scan {
  static constexpr const char* kName = "SelectiveScan";
  static constexpr size_t kInputs = edgesep::kScanInputs, kRequired = edgesep::kScanRequired, kOutputs = 2;
  static constexpr int type(size_t) { return kOrtFloat; }
  static constexpr bool kKeepsShape = true;

  const OrtApi* api;
  bool softplus, reverse;

  Scan(const OrtApi* table, const OrtKernelInfo* info)
      : api(table), softplus(attribute(table, info, "delta_softplus") != 0),
        reverse(attribute(table, info, "reverse") != 0) {}

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = inputs(api, context, kInputs);
    EdgesepScan scan{};
    require(api, kName, edgesep::check_scan(shapes_of(in), &scan));
    scan.u = in[0].data, scan.delta = in[1].data, scan.A = in[2].data, scan.B = in[3].data, scan.C = in[4].data;
    scan.D = in[5].data, scan.z = in[6].data, scan.delta_bias = in[7].data, scan.initial_state = in[8].data;
    scan.delta_softplus = softplus, scan.reverse = reverse;
    scan.y = output(api, context, 0, in[0].shape.dims);
    scan.last_state = output(api, context, 1, {scan.batch, scan.channels, scan.state});
    split(api, context, scan, edgesep_scan, edgesep_scan_rows(&scan));
  }
};

struct Conv {
  static constexpr const char* kName = "CausalConv1dSilu";
  static constexpr size_t kInputs = edgesep::kConvInputs, kRequired = kInputs, kOutputs = 1;
  static constexpr int type(size_t) { return kOrtFloat; }
  static constexpr bool kKeepsShape = true;

  const OrtApi* api;
  bool reverse;

  Conv(const OrtApi* table, const OrtKernelInfo* info)
      : api(table), reverse(attribute(table, info, "reverse") != 0) {}

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = inputs(api, context, kInputs);
    EdgesepConv conv{};
    require(api, kName, edgesep::check_conv(shapes_of(in), &conv));
    conv.x = in[0].data, conv.w = in[1].data, conv.bias = in[2].data;
    conv.reverse = reverse;
    conv.y = output(api, context, 0, in[0].shape.dims);
    split(api, context, conv, edgesep_conv, edgesep_conv_rows(&conv));
  }
};

// A slope of 1 is none.
const float* given(const float& slope) { return slope == 1.0f ? nullptr : &slope; }

// The unit's two passes.
void run(const OrtApi* api, OrtKernelContext* context, EdgesepConvNorm& norm) {
  std::vector<double> sums(static_cast<size_t>(norm.batch) * EDGESEP_NORM_MAX_PARTS * 2);
  norm.sums = sums.data();
  const int64_t rows = edgesep_conv_norm_rows(&norm);
  if (norm.gamma || norm.stats) split(api, context, norm, edgesep_conv_norm_sums, rows);
  if (norm.gamma || !norm.stats) return split(api, context, norm, edgesep_conv_norm_apply, rows);
  edgesep_conv_norm_apply(&norm, 0, rows);  // a few numbers
}

struct Norm {
  static constexpr const char* kName = "ConvNorm";
  static constexpr size_t kInputs = edgesep::kNormInputs, kRequired = edgesep::kNormRequired, kOutputs = 2;
  static constexpr bool kKeepsShape = false;  // a stride leaves fewer frames
  static constexpr int type(size_t i) {
    return i == edgesep::kNormIndex || i == edgesep::kNormReadIndex ? kOrtInt64 : kOrtFloat;
  }

  const OrtApi* api;
  int64_t stride, sigmoid;
  float epsilon, slope, x_slope;

  Norm(const OrtApi* table, const OrtKernelInfo* info)
      : api(table),
        stride(attribute(table, info, "stride", 1)),
        sigmoid(attribute(table, info, "sigmoid")),
        epsilon(attribute_float(table, info, "epsilon", 1e-5f)),
        slope(attribute_float(table, info, "slope", 1.0f)),
        x_slope(attribute_float(table, info, "x_slope", 1.0f)) {}

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = inputs(api, context, kInputs);
    EdgesepConvNorm norm{};
    require(api, kName, edgesep::check_norm(shapes_of(in), stride, &norm));
    norm.x = in[0].data, norm.w = in[1].data, norm.bias = in[2].data, norm.gamma = in[3].data, norm.beta = in[4].data;
    norm.gate = in[5].data, norm.shift = in[6].data, norm.index = in[7].integers();
    norm.x_stats = in[8].data, norm.x_bias = in[9].data, norm.x_gamma = in[10].data, norm.x_beta = in[11].data;
    norm.x_shift = in[12].data, norm.x_index = in[13].integers();
    if (norm.index) require(api, kName, edgesep::check_index(norm.index, norm.frames, norm.coarse));
    if (norm.x_index) require(api, kName, edgesep::check_index(norm.x_index, norm.frames_in, norm.x_coarse));
    norm.slope = given(slope);
    norm.x_slope = given(x_slope);
    norm.eps = epsilon;
    norm.sigmoid = sigmoid != 0;
    Dims dims = in[0].shape.dims;
    dims[dims.size() - 2] = norm.frames;
    norm.out = output(api, context, 0, dims);
    norm.y = edgesep_conv_norm_twice(&norm) ? nullptr : norm.out;
    norm.stats = output(api, context, 1, {norm.batch, 2});
    run(api, context, norm);
  }
};

struct GlobalStats {
  static constexpr const char* kName = "GlobalStats";
  static constexpr size_t kInputs = edgesep::kStatsInputs, kRequired = edgesep::kStatsRequired, kOutputs = 1;
  static constexpr bool kKeepsShape = false;
  static constexpr int type(size_t) { return kOrtFloat; }

  const OrtApi* api;
  float epsilon;

  GlobalStats(const OrtApi* table, const OrtKernelInfo* info)
      : api(table), epsilon(attribute_float(table, info, "epsilon", 1e-5f)) {}

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = inputs(api, context, kInputs);
    EdgesepConvNorm norm{};
    require(api, kName, edgesep::check_stats(shapes_of(in), &norm));
    norm.x = in[0].data, norm.bias = in[1].data;
    norm.eps = epsilon;
    norm.stats = output(api, context, 0, {norm.batch, 2});
    run(api, context, norm);
  }
};

struct Pooled {
  static constexpr const char* kName = "PooledSum";
  static constexpr size_t kInputs = edgesep::kPooledInputs, kRequired = edgesep::kPooledRequired, kOutputs = 1;
  static constexpr bool kKeepsShape = true;
  static constexpr int type(size_t i) { return i == edgesep::kPooledIndex ? kOrtInt64 : kOrtFloat; }

  const OrtApi* api;
  float x_slope;

  Pooled(const OrtApi* table, const OrtKernelInfo* info)
      : api(table), x_slope(attribute_float(table, info, "x_slope", 1.0f)) {}

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = inputs(api, context, kInputs);
    EdgesepPooled pooled{};
    require(api, kName, edgesep::check_pooled(shapes_of(in), &pooled));
    pooled.total = in[0].data, pooled.x = in[1].data, pooled.index = in[2].integers(), pooled.weight = in[3].data;
    pooled.x_stats = in[4].data, pooled.x_bias = in[5].data, pooled.x_gamma = in[6].data, pooled.x_beta = in[7].data;
    pooled.x_slope = given(x_slope);
    require(api, kName, edgesep::check_index(pooled.index, pooled.coarse * pooled.span, pooled.frames));
    pooled.out = output(api, context, 0, in[0].shape.dims);
    split(api, context, pooled, edgesep_pooled, pooled.batch * pooled.coarse);
  }
};

struct HeadNorm {
  static constexpr const char* kName = "HeadNorm";
  static constexpr size_t kInputs = edgesep::kHeadNormInputs, kRequired = edgesep::kHeadNormRequired, kOutputs = 1;
  static constexpr bool kKeepsShape = false;
  static constexpr int type(size_t) { return kOrtFloat; }

  const OrtApi* api;
  int64_t first;
  float epsilon;

  HeadNorm(const OrtApi* table, const OrtKernelInfo* info)
      : api(table), first(attribute(table, info, "first")), epsilon(attribute_float(table, info, "epsilon", 1e-5f)) {}

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = inputs(api, context, kInputs);
    EdgesepHeadNorm norm{};
    norm.first = first, norm.epsilon = epsilon;
    require(api, kName, edgesep::check_head_norm(shapes_of(in), &norm));
    norm.x = in[0].data, norm.gain = in[1].data, norm.bias = in[2].data;
    norm.slope = in[edgesep::kHeadNormSlope].data;
    norm.y = output(api, context, 0, {1, norm.heads, norm.frames, norm.bins * norm.features});
    split(api, context, norm, edgesep_head_norm, edgesep_head_norm_rows(&norm), kFewParts);
  }
};

struct Attention {
  static constexpr const char* kName = "PastAttention";
  static constexpr size_t kInputs = edgesep::kAttentionInputs, kRequired = kInputs, kOutputs = 1;
  static constexpr bool kKeepsShape = false;
  static constexpr int type(size_t i) { return i == 3 || i == 4 ? kOrtAnyType : kOrtFloat; }  // float or uint8

  const OrtApi* api;
  float k_scale, k_zero, v_scale, v_zero;

  Attention(const OrtApi* table, const OrtKernelInfo* info)
      : api(table),
        k_scale(attribute_float(table, info, "k_scale", 0)),
        k_zero(attribute_float(table, info, "k_zero", 0)),
        v_scale(attribute_float(table, info, "v_scale", 0)),
        v_zero(attribute_float(table, info, "v_zero", 0)) {}

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = inputs(api, context, kInputs);
    EdgesepAttention attention{};
    require(api, kName, edgesep::check_attention(shapes_of(in), &attention));
    const int of_k = k_scale == 0 ? kOrtFloat : kOrtUint8, of_v = v_scale == 0 ? kOrtFloat : kOrtUint8;
    if (in[3].type != of_k || in[4].type != of_v)
      require(api, kName, "past_k and past_v are uint8 where they have a scale, else float");
    attention.q = in[0].data, attention.k = in[1].data, attention.v = in[2].data, attention.hidden = in[5].data;
    attention.past_k = in[3].data, attention.past_v = in[4].data;
    attention.k_scale = k_scale, attention.k_zero = k_zero, attention.v_scale = v_scale, attention.v_zero = v_zero;
    attention.y = output(api, context, 0, in[2].shape.dims);
    attention.weights = room(edgesep_attention_workspace(&attention));
    split(api, context, attention, edgesep_attention_weights, attention.items);
    split(api, context, attention, edgesep_attention_values, attention.items * edgesep_attention_chunks(&attention));
  }
};

struct Lstm {
  static constexpr const char* kName = "LstmSteps";
  static constexpr size_t kInputs = edgesep::kLstmInputs, kRequired = edgesep::kLstmRequired, kOutputs = 3;
  static constexpr bool kKeepsShape = false;
  static constexpr int type(size_t i) {
    return i == edgesep::kLstmOrder ? kOrtInt64 : i == edgesep::kLstmRecurrent ? kOrtAnyType : kOrtFloat;
  }

  const OrtApi* api;

  Lstm(const OrtApi* table, const OrtKernelInfo*) : api(table) {}

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = inputs(api, context, kInputs);
    EdgesepLstm lstm{};
    require(api, kName, edgesep::check_lstm(shapes_of(in), &lstm));
    lstm.gates = in[0].data, lstm.initial_h = in[2].data, lstm.initial_c = in[3].data;
    lstm.scale = in[edgesep::kLstmScale].data;
    if (in[1].type != (lstm.scale ? kOrtInt8 : kOrtFloat))
      require(api, kName, "recurrent is int8 where it has a scale, else float");
    if (lstm.scale)
      lstm.bytes = reinterpret_cast<const int8_t*>(in[1].data);
    else
      lstm.recurrent = in[1].data;
    lstm.order = in[4].integers();
    if (lstm.order) require(api, kName, edgesep::check_index(lstm.order, lstm.steps * lstm.sets, lstm.frames, -1));
    const Dims& state = in[2].shape.dims;
    lstm.y = output(api, context, 0, {lstm.steps, 1, state[1], state[2]});
    lstm.last_h = output(api, context, 1, state);
    lstm.last_c = output(api, context, 2, state);
    split(api, context, lstm, edgesep_lstm, edgesep_lstm_blocks(&lstm), kFewParts);
  }
};

struct Windows {
  static constexpr const char* kName = "WindowProduct";
  static constexpr size_t kInputs = edgesep::kWindowInputs, kRequired = edgesep::kWindowRequired, kOutputs = 1;
  static constexpr bool kKeepsShape = false;
  static constexpr int type(size_t i) {
    return i == edgesep::kWindowIndex ? kOrtInt64 : i == edgesep::kWindowWeight ? kOrtAnyType : kOrtFloat;
  }

  const OrtApi* api;
  float x_scale;
  int64_t x_zero;

  Windows(const OrtApi* table, const OrtKernelInfo* info)
      : api(table), x_scale(attribute_float(table, info, "x_scale", 1.0f)), x_zero(attribute(table, info, "x_zero")) {}

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = inputs(api, context, kInputs);
    EdgesepWindows windows{};
    require(api, kName, edgesep::check_windows(shapes_of(in), &windows));
    windows.x = in[0].data, windows.weight = in[1].data, windows.bias = in[2].data, windows.index = in[3].integers();
    windows.slope = in[4].data, windows.residual = in[5].data;
    if (windows.index)
      require(api, kName,
              edgesep::check_index(windows.index, windows.windows * windows.taps, windows.rows, edgesep::kNoRow));
    windows.y = output(api, context, 0, {windows.windows, windows.outputs});
    windows.scale = in[edgesep::kWindowScale].data;
    if (in[edgesep::kWindowWeight].type != (windows.scale ? kOrtInt8 : kOrtFloat))
      require(api, kName, "weight is int8 where it has a scale, else float");
    if (!windows.scale) return split(api, context, windows, edgesep_window_product, edgesep_window_rows(&windows), kFewParts);
    windows.bytes = reinterpret_cast<const int8_t*>(windows.weight);
    windows.x_scale = x_scale, windows.x_zero = static_cast<int32_t>(x_zero);
    windows.room = room(edgesep_window_room(&windows));
    split(api, context, windows, edgesep_rounded_rows, windows.rows, kFewParts);
    split(api, context, windows, edgesep_rounded_product, edgesep_window_rows(&windows), kFewParts);
  }
};

struct Mamba {
  static constexpr const char* kName = "BidirectionalMamba";
  static constexpr size_t kInputs = edgesep::kMambaInputs, kRequired = edgesep::kMambaRequired, kOutputs = 1;
  static constexpr bool kKeepsShape = false;
  static constexpr int type(size_t i) { return edgesep::mamba_pairs(i) ? kOrtAnyType : kOrtFloat; }

  const OrtApi* api;
  float epsilon;
  bool pairs;

  Mamba(const OrtApi* table, const OrtKernelInfo* info)
      : api(table),
        epsilon(attribute_float(table, info, "epsilon", 1e-5f)),
        pairs(attribute(table, info, "bf16") != 0) {}

  void compute(OrtKernelContext* context) const {
    const std::vector<Tensor> in = inputs(api, context, kInputs);
    const bool bytes = in[edgesep::kMambaScale].data;
    for (size_t i = 0; i < kInputs; ++i) {
      const bool narrow = bytes && edgesep::mamba_bytes(i);
      if (edgesep::mamba_pairs(i) && in[i].type != (narrow ? kOrtInt8 : pairs ? kOrtInt32 : kOrtFloat))
        require(api, kName,
                std::string(edgesep::kMambaNames[i]) + " must be " + (narrow ? "int8" : pairs ? "int32" : "float"));
    }
    EdgesepMamba mamba{};
    mamba.pairs = pairs;
    require(api, kName, edgesep::check_mamba(shapes_of(in), &mamba));
    mamba.epsilon = epsilon;
    size_t i = 0;
    for (const float** to : edgesep::mamba_inputs(&mamba)) *to = in[i++].data;
    mamba.y = output(api, context, 0, {mamba.rows, mamba.length, mamba.channels});
    split(api, context, mamba, edgesep_mamba, mamba.rows, kFewParts);
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
    made.GetInputType = [](const OrtCustomOp*, size_t i) { return Kernel::type(i); };
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
    if (Kernel::kKeepsShape) made.InferOutputShapeFn = infer;
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
      for (const OrtCustomOp* op : {operation<Scan>(), operation<Conv>(), operation<Norm>(), operation<GlobalStats>(), operation<Pooled>(),
                                   operation<Attention>(), operation<Lstm>(), operation<Windows>(),
                                   operation<Mamba>(), operation<HeadNorm>()})
        must(ort::call<ort::CustomOpDomain_Add>(api, made, op));
      return made;
    }();
    must(ort::call<ort::AddCustomOpDomain>(api, options, domain));
  });
}
