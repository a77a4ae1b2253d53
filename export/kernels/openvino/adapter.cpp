// OpenVINO operators around the core: an ONNX conversion, IR through the attribute visitor, and `evaluate`, which the
// CPU plug-in calls in its own threads' arena.
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/core/parallel.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/op.hpp>

#include "../core/check.h"

namespace {

using edgesep::Input;

void require_float(const ov::Node& node) {
  for (size_t i = 0; i < node.get_input_size(); ++i)
    OPENVINO_ASSERT(node.get_input_element_type(i).is_dynamic() || node.get_input_element_type(i) == ov::element::f32,
                    "edgesep::", node.get_type_name(), ": input ", i, " is ", node.get_input_element_type(i),
                    ", expected f32");
}

// `kernel(argument, first, end)` over `rows` in the calling arena, which holds as many threads as the plug-in allows.
template <class Argument>
void split(const Argument& argument, void (*kernel)(const Argument*, int64_t, int64_t), int64_t rows) {
  const int64_t parts = std::min<int64_t>(rows, 64);
  ov::parallel_for(parts, [&](int64_t k) { kernel(&argument, rows * k / parts, rows * (k + 1) / parts); });
}

class SelectiveScan : public ov::op::Op {
 public:
  OPENVINO_OP("SelectiveScan", "edgesep");

  SelectiveScan() = default;
  // `given`: bit i says that input i of the contract is there; the node itself has no gaps among its inputs.
  SelectiveScan(const ov::OutputVector& inputs, int64_t given, bool softplus, bool reverse)
      : Op(inputs), given_(given), softplus_(softplus), reverse_(reverse) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    require_float(*this);
    const auto u = get_input_partial_shape(0), A = get_input_partial_shape(2);
    set_output_type(0, ov::element::f32, u);
    ov::PartialShape last = ov::PartialShape::dynamic(3);
    if (u.rank().is_static() && u.size() == 3) last[0] = u[0], last[1] = u[2];
    if (A.rank().is_static() && A.size() == 2) last[2] = A[1];
    set_output_type(1, ov::element::f32, last);
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<SelectiveScan>(inputs, given_, softplus_, reverse_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("given", given_);
    visitor.on_attribute("delta_softplus", softplus_);
    visitor.on_attribute("reverse", reverse_);
    return true;
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    std::vector<Input> shapes(edgesep::kScanInputs);
    const float* data[edgesep::kScanInputs] = {};
    size_t next = 0;
    for (size_t i = 0; i < shapes.size(); ++i) {
      if (!(given_ >> i & 1) || next >= inputs.size()) continue;
      const ov::Tensor& tensor = inputs[next++];
      shapes[i].given = true;
      shapes[i].dims.assign(tensor.get_shape().begin(), tensor.get_shape().end());
      data[i] = tensor.data<const float>();
    }
    EdgesepScan scan{};
    const std::string wrong = edgesep::check_scan(shapes, &scan);
    OPENVINO_ASSERT(wrong.empty(), "edgesep::SelectiveScan: ", wrong);
    outputs[0].set_shape(inputs[0].get_shape());
    outputs[1].set_shape(
        {static_cast<size_t>(scan.batch), static_cast<size_t>(scan.channels), static_cast<size_t>(scan.state)});
    scan.u = data[0], scan.delta = data[1], scan.A = data[2], scan.B = data[3], scan.C = data[4];
    scan.D = data[5], scan.z = data[6], scan.delta_bias = data[7], scan.initial_state = data[8];
    scan.delta_softplus = softplus_, scan.reverse = reverse_;
    scan.y = outputs[0].data<float>();
    scan.last_state = outputs[1].data<float>();
    split(scan, edgesep_scan, edgesep_scan_rows(&scan));
    return true;
  }

 private:
  int64_t given_ = 0;
  bool softplus_ = false, reverse_ = false;
};

class CausalConv1dSilu : public ov::op::Op {
 public:
  OPENVINO_OP("CausalConv1dSilu", "edgesep");

  CausalConv1dSilu() = default;
  CausalConv1dSilu(const ov::OutputVector& inputs, bool reverse) : Op(inputs), reverse_(reverse) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    require_float(*this);
    set_output_type(0, ov::element::f32, get_input_partial_shape(0));
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<CausalConv1dSilu>(inputs, reverse_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("reverse", reverse_);
    return true;
  }
  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    std::vector<Input> shapes(edgesep::kConvInputs);
    for (size_t i = 0; i < shapes.size() && i < inputs.size(); ++i) {
      shapes[i].given = true;
      shapes[i].dims.assign(inputs[i].get_shape().begin(), inputs[i].get_shape().end());
    }
    EdgesepConv conv{};
    const std::string wrong = edgesep::check_conv(shapes, &conv);
    OPENVINO_ASSERT(wrong.empty(), "edgesep::CausalConv1dSilu: ", wrong);
    outputs[0].set_shape(inputs[0].get_shape());
    conv.x = inputs[0].data<const float>();
    conv.w = inputs[1].data<const float>();
    conv.bias = inputs[2].data<const float>();
    conv.reverse = reverse_;
    conv.y = outputs[0].data<float>();
    split(conv, edgesep_conv, edgesep_conv_rows(&conv));
    return true;
  }

 private:
  bool reverse_ = false;
};

// An input that the ONNX file left empty.
bool absent(const ov::Output<ov::Node>& input) {
  return !input.get_node() || std::string(input.get_node()->get_type_info().name) == "NullNode";
}

ov::OutputVector scan_from_onnx(const ov::frontend::NodeContext& node) {
  ov::OutputVector inputs;
  int64_t given = 0;
  for (int i = 0; i < static_cast<int>(node.get_input_size()); ++i) {
    const ov::Output<ov::Node> input = node.get_input(i);
    if (absent(input)) continue;
    inputs.push_back(input);
    given |= int64_t{1} << i;
  }
  return std::make_shared<SelectiveScan>(inputs, given, node.get_attribute<int64_t>("delta_softplus", 0) != 0,
                                         node.get_attribute<int64_t>("reverse", 0) != 0)
      ->outputs();
}

ov::OutputVector conv_from_onnx(const ov::frontend::NodeContext& node) {
  return std::make_shared<CausalConv1dSilu>(
             ov::OutputVector{node.get_input(0), node.get_input(1), node.get_input(2)},
             node.get_attribute<int64_t>("reverse", 0) != 0)
      ->outputs();
}

}  // namespace

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>(
    {std::make_shared<ov::OpExtension<SelectiveScan>>(), std::make_shared<ov::OpExtension<CausalConv1dSilu>>(),
     std::make_shared<ov::frontend::onnx::ConversionExtension>("SelectiveScan", "edgesep", scan_from_onnx),
     std::make_shared<ov::frontend::onnx::ConversionExtension>("CausalConv1dSilu", "edgesep", conv_from_onnx)}));
