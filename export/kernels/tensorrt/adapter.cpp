// TensorRT plug-ins (IPluginV3, from 10.0 on) around the CUDA kernels. TensorRT finds them through getCreators when the
// library is loaded into its registry; nothing of TensorRT is linked.
//
// The parser maps a node to a plug-in by name, version and namespace "edgesep": the node's domain from 10.10 on, before
// that its attribute plugin_namespace. Its inputs have no gaps; the attribute `given` says which of the contract's
// inputs they are (bit i: input i).
#include <NvInfer.h>

#include <cstdio>
#include <string>
#include <vector>

#include "../core/check.h"
#include "../cuda/kernels.h"

namespace {

using nvinfer1::DataType;
using edgesep::Input;

constexpr const char* kNamespace = "edgesep";
constexpr const char* kVersion = "1";

struct Flags {
  int32_t given = 0, delta_softplus = 0, reverse = 0;
};

Input shape_of(const nvinfer1::Dims& dims) {
  Input input;
  input.given = true;
  input.dims.assign(dims.d, dims.d + dims.nbDims);
  return input;
}

// What the operators have in common and what differs: name, inputs, outputs, types, the launch.
struct Scan {
  static constexpr const char* kName = "SelectiveScan";
  static constexpr int kOutputs = 2, kRequired = (1 << edgesep::kScanRequired) - 1;

  // Sequences may be half, weights and states are float.
  static bool is_sequence(int input) { return input < 5 ? input != 2 : input == 6; }
  static bool output_is_sequence(int output) { return output == 0; }

  static void output_shapes(const nvinfer1::DimsExprs* in, nvinfer1::DimsExprs* out) {
    out[0] = in[0];
    out[1].nbDims = 3;
    out[1].d[0] = in[0].d[0], out[1].d[1] = in[0].d[2], out[1].d[2] = in[2].d[1];
  }

  static std::string launch(const std::vector<Input>& shapes, const void* const* data, void* const* out, Flags flags,
                            bool half, cudaStream_t stream) {
    EdgesepScan s{};
    if (std::string wrong = edgesep::check_scan(shapes, &s); !wrong.empty()) return wrong;
    const auto at = [&](int i) { return static_cast<const float*>(data[i]); };
    s.u = at(0), s.delta = at(1), s.A = at(2), s.B = at(3), s.C = at(4);
    s.D = at(5), s.z = at(6), s.delta_bias = at(7), s.initial_state = at(8);
    s.y = static_cast<float*>(out[0]), s.last_state = static_cast<float*>(out[1]);
    s.delta_softplus = flags.delta_softplus, s.reverse = flags.reverse;
    const int status = edgesep_cuda_scan(&s, half, stream);
    return status ? "CUDA error " + std::to_string(status) : "";
  }
};

struct Conv {
  static constexpr const char* kName = "CausalConv1dSilu";
  static constexpr int kOutputs = 1, kRequired = (1 << edgesep::kConvInputs) - 1;

  static bool is_sequence(int input) { return input == 0; }
  static bool output_is_sequence(int) { return true; }

  static void output_shapes(const nvinfer1::DimsExprs* in, nvinfer1::DimsExprs* out) { out[0] = in[0]; }

  static std::string launch(const std::vector<Input>& shapes, const void* const* data, void* const* out, Flags flags,
                            bool half, cudaStream_t stream) {
    EdgesepConv s{};
    if (std::string wrong = edgesep::check_conv(shapes, &s); !wrong.empty()) return wrong;
    s.x = static_cast<const float*>(data[0]);
    s.w = static_cast<const float*>(data[1]);
    s.bias = static_cast<const float*>(data[2]);
    s.y = static_cast<float*>(out[0]);
    s.reverse = flags.reverse;
    const int status = edgesep_cuda_conv(&s, half, stream);
    return status ? "CUDA error " + std::to_string(status) : "";
  }
};

template <class Op>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit Plugin(Flags flags) : flags_(flags) {
    for (int i = 0; i < 16; ++i)
      if (flags_.given >> i & 1) inputs_.push_back(i);
    fields_ = {{"given", &flags_.given, nvinfer1::PluginFieldType::kINT32, 1},
               {"delta_softplus", &flags_.delta_softplus, nvinfer1::PluginFieldType::kINT32, 1},
               {"reverse", &flags_.reverse, nvinfer1::PluginFieldType::kINT32, 1}};
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  nvinfer1::IPluginV3* clone() noexcept override { return new Plugin(flags_); }

  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return Op::kOutputs; }

  int32_t getOutputDataTypes(DataType* out, int32_t outputs, const DataType* in, int32_t) const noexcept override {
    for (int32_t i = 0; i < outputs; ++i) out[i] = Op::output_is_sequence(i) ? in[0] : DataType::kFLOAT;
    return 0;
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* out, int32_t, nvinfer1::IExprBuilder&) noexcept override {
    Op::output_shapes(in, out);
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t) noexcept override {
    if (inputs != static_cast<int32_t>(inputs_.size())) return false;
    const nvinfer1::PluginTensorDesc &tensor = tensors[position].desc, &first = tensors[0].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position == 0) return tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF;
    const bool sequence = position < inputs ? Op::is_sequence(inputs_[static_cast<size_t>(position)])
                                            : Op::output_is_sequence(position - inputs);
    return tensor.type == (sequence ? first.type : DataType::kFLOAT);
  }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t inputs,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override {
    return inputs == static_cast<int32_t>(inputs_.size()) ? 0 : 1;
  }
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc*, int32_t, const nvinfer1::PluginTensorDesc*,
                        int32_t) noexcept override {
    return 0;
  }

  int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void*, cudaStream_t stream) noexcept override {
    std::vector<Input> shapes(static_cast<size_t>(inputs_.back()) + 1);
    const void* data[16] = {};
    for (size_t k = 0; k < inputs_.size(); ++k) {
      shapes[static_cast<size_t>(inputs_[k])] = shape_of(in[k].dims);
      data[inputs_[k]] = inputs[k];
    }
    const std::string wrong = Op::launch(shapes, data, outputs, flags_, in[0].type == DataType::kHALF, stream);
    if (!wrong.empty()) std::fprintf(stderr, "edgesep::%s: %s\n", Op::kName, wrong.c_str());
    return wrong.empty() ? 0 : 1;
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

 private:
  Flags flags_;
  std::vector<int> inputs_;  // of the contract, in order
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

template <class Op>
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() {
    for (const char* name : {"given", "delta_softplus", "reverse"})
      fields_.emplace_back(name, nullptr, nvinfer1::PluginFieldType::kINT32, 1);
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }

  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    Flags flags;
    flags.given = Op::kRequired;
    for (int32_t i = 0; i < fields->nbFields; ++i) {
      const nvinfer1::PluginField& field = fields->fields[i];
      const std::string name = field.name;
      if (!field.data || field.type != nvinfer1::PluginFieldType::kINT32) continue;
      const int32_t value = *static_cast<const int32_t*>(field.data);
      if (name == "given") flags.given = value;
      if (name == "delta_softplus") flags.delta_softplus = value;
      if (name == "reverse") flags.reverse = value;
    }
    if ((flags.given & Op::kRequired) != Op::kRequired) return nullptr;
    return new Plugin<Op>(flags);
  }

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace

// What TensorRT looks for in a plug-in library.
extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  static Creator<Scan> scan;
  static Creator<Conv> conv;
  static nvinfer1::IPluginCreatorInterface* const all[] = {&scan, &conv};
  count = 2;
  return all;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder*) {}
