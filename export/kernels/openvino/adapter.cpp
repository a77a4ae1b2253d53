// OpenVINO operators around the core: an ONNX conversion, IR through the attribute visitor, and `evaluate`, which the
// CPU plug-in calls in its own threads' arena.
#include <atomic>
#include <mutex>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/core/parallel.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/op.hpp>

#include "../core/check.h"
#include "../core/room.h"

namespace {

using edgesep::Input;
using edgesep::room;

// Every input but the one at `integers` is f32.
void require_float(const ov::Node& node, size_t integers = SIZE_MAX) {
  for (size_t i = 0; i < node.get_input_size(); ++i)
    OPENVINO_ASSERT(i == integers || node.get_input_element_type(i).is_dynamic() || node.get_input_element_type(i) == ov::element::f32,
                    "edgesep::", node.get_type_name(), ": input ", i, " is ", node.get_input_element_type(i),
                    ", expected f32");
}

constexpr int64_t kAll = -1;  // of `given`: every input that there can be

// Every input that `given` says there is has the type that the contract wants; dynamic: another check sees to it.
template <class Wanted>
void require_types(const ov::Node& node, int64_t given, const char* const* names, Wanted wanted) {
  for (size_t i = 0, at = 0; at < node.get_input_size(); ++i) {
    if (!(given >> i & 1)) continue;
    const ov::element::Type found = node.get_input_element_type(at++), expected = wanted(i);
    OPENVINO_ASSERT(found.is_dynamic() || expected.is_dynamic() || found == expected, "edgesep::", node.get_type_name(),
                    ": ", names[i], " is ", found, ", expected ", expected);
  }
}

// `kernel(argument, first, end)` over `rows` in the calling arena, one call for each thread that the plug-in allows: what a
// call begins with, and what its rows share, it does once.
template <class Argument>
void split(const Argument& argument, void (*kernel)(const Argument*, int64_t, int64_t), int64_t rows) {
  const int threads = static_cast<int>(std::min<int64_t>(rows, parallel_get_max_threads()));
  if (threads <= 1) return kernel(&argument, 0, rows);
  ov::parallel_nt_static(threads, [&](int i, int all) { kernel(&argument, rows * i / all, rows * (i + 1) / all); });
}

// The contract's inputs from those there are: bit i of `given` says that input i is.
struct Inputs {
  std::vector<Input> shapes;
  std::vector<const ov::Tensor*> tensors;

  Inputs(const ov::TensorVector& inputs, int64_t given, size_t most) : shapes(most), tensors(most) {
    size_t next = 0;
    for (size_t i = 0; i < most; ++i) {
      if (!(given >> i & 1) || next >= inputs.size()) continue;
      tensors[i] = &inputs[next++];
      shapes[i].given = true;
      shapes[i].dims.assign(tensors[i]->get_shape().begin(), tensors[i]->get_shape().end());
    }
  }

  const float* data(size_t i) const { return tensors[i] ? tensors[i]->data<const float>() : nullptr; }

  // Of a tensor of whatever type.
  const float* bits(size_t i) const { return tensors[i] ? static_cast<const float*>(tensors[i]->data()) : nullptr; }

  // The plug-in may have made them 32 bits wide.
  std::vector<int64_t> integers(size_t i) const {
    if (!tensors[i]) return {};
    const size_t count = tensors[i]->get_size();
    if (tensors[i]->get_element_type() == ov::element::i64) {
      const int64_t* from = tensors[i]->data<const int64_t>();
      return {from, from + count};
    }
    const int32_t* from = tensors[i]->data<const int32_t>();
    return {from, from + count};
  }
};

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
    const Inputs in(inputs, given_, edgesep::kScanInputs);
    EdgesepScan scan{};
    const std::string wrong = edgesep::check_scan(in.shapes, &scan);
    OPENVINO_ASSERT(wrong.empty(), "edgesep::SelectiveScan: ", wrong);
    outputs[0].set_shape(inputs[0].get_shape());
    outputs[1].set_shape(
        {static_cast<size_t>(scan.batch), static_cast<size_t>(scan.channels), static_cast<size_t>(scan.state)});
    scan.u = in.data(0), scan.delta = in.data(1), scan.A = in.data(2), scan.B = in.data(3), scan.C = in.data(4);
    scan.D = in.data(5), scan.z = in.data(6), scan.delta_bias = in.data(7), scan.initial_state = in.data(8);
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
    const Inputs in(inputs, 7, edgesep::kConvInputs);
    EdgesepConv conv{};
    const std::string wrong = edgesep::check_conv(in.shapes, &conv);
    OPENVINO_ASSERT(wrong.empty(), "edgesep::CausalConv1dSilu: ", wrong);
    outputs[0].set_shape(inputs[0].get_shape());
    conv.x = in.data(0), conv.w = in.data(1), conv.bias = in.data(2);
    conv.reverse = reverse_;
    conv.y = outputs[0].data<float>();
    split(conv, edgesep_conv, edgesep_conv_rows(&conv));
    return true;
  }

 private:
  bool reverse_ = false;
};

// A slope of 1 is none.
const float* given_slope(const float& slope) { return slope == 1.0f ? nullptr : &slope; }

// The unit's two passes.
void run(EdgesepConvNorm& norm) {
  std::vector<double> sums(static_cast<size_t>(norm.batch) * EDGESEP_NORM_MAX_PARTS * 2);
  norm.sums = sums.data();
  const int64_t rows = edgesep_conv_norm_rows(&norm);
  if (norm.gamma || norm.stats) split(norm, edgesep_conv_norm_sums, rows);
  if (norm.gamma || !norm.stats) return split(norm, edgesep_conv_norm_apply, rows);
  edgesep_conv_norm_apply(&norm, 0, rows);  // a few numbers
}

// (batch, 2), from rows.
ov::PartialShape stats_shape(const ov::PartialShape& rows) {
  return {rows.rank().is_static() ? rows[0] : ov::Dimension::dynamic(), 2};
}

struct NormAttributes {
  int64_t given = 1, stride = 1;
  bool sigmoid = false, stats = false;
  float epsilon = 1e-5f, slope = 1, x_slope = 1;
};

class ConvNorm : public ov::op::Op {
 public:
  OPENVINO_OP("ConvNorm", "edgesep");

  ConvNorm() = default;
  ConvNorm(const ov::OutputVector& inputs, const NormAttributes& attributes) : Op(inputs), made_(attributes) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    require_types(*this, made_.given, edgesep::kNormNames, [](size_t i) {
      const bool integers = i == edgesep::kNormIndex || i == edgesep::kNormReadIndex;
      return integers ? ov::element::dynamic : ov::element::f32;
    });
    ov::PartialShape shape = get_input_partial_shape(0);
    if (made_.stats) set_output_type(1, ov::element::f32, stats_shape(shape));
    if (made_.stride > 1 && shape.rank().is_static()) {
      ov::Dimension& frames = shape[shape.size() - 2];
      frames =
          frames.is_static() ? ov::Dimension((frames.get_length() - 1) / made_.stride + 1) : ov::Dimension::dynamic();
    }
    set_output_type(0, ov::element::f32, shape);
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<ConvNorm>(inputs, made_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("given", made_.given);
    visitor.on_attribute("stride", made_.stride);
    visitor.on_attribute("sigmoid", made_.sigmoid);
    visitor.on_attribute("stats", made_.stats);
    visitor.on_attribute("epsilon", made_.epsilon);
    visitor.on_attribute("slope", made_.slope);
    visitor.on_attribute("x_slope", made_.x_slope);
    return true;
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const Inputs in(inputs, made_.given, edgesep::kNormInputs);
    EdgesepConvNorm norm{};
    std::string wrong = edgesep::check_norm(in.shapes, made_.stride, &norm);
    const std::vector<int64_t> index = in.integers(edgesep::kNormIndex), read = in.integers(edgesep::kNormReadIndex);
    if (wrong.empty() && !index.empty()) wrong = edgesep::check_index(index.data(), norm.frames, norm.coarse);
    if (wrong.empty() && !read.empty()) wrong = edgesep::check_index(read.data(), norm.frames_in, norm.x_coarse);
    OPENVINO_ASSERT(wrong.empty(), "edgesep::ConvNorm: ", wrong);
    ov::Shape shape = inputs[0].get_shape();
    shape[shape.size() - 2] = static_cast<size_t>(norm.frames);
    outputs[0].set_shape(shape);
    norm.x = in.data(0), norm.w = in.data(1), norm.bias = in.data(2), norm.gamma = in.data(3), norm.beta = in.data(4);
    norm.gate = in.data(5), norm.shift = in.data(6), norm.index = index.empty() ? nullptr : index.data();
    norm.x_stats = in.data(8), norm.x_bias = in.data(9), norm.x_gamma = in.data(10), norm.x_beta = in.data(11);
    norm.x_shift = in.data(12), norm.x_index = read.empty() ? nullptr : read.data();
    norm.slope = given_slope(made_.slope);
    norm.x_slope = given_slope(made_.x_slope);
    norm.eps = made_.epsilon;
    norm.sigmoid = made_.sigmoid;
    norm.out = outputs[0].data<float>();
    norm.y = edgesep_conv_norm_twice(&norm) ? nullptr : norm.out;
    if (made_.stats) {
      outputs[1].set_shape({static_cast<size_t>(norm.batch), 2});
      norm.stats = outputs[1].data<float>();
    }
    run(norm);
    return true;
  }

 private:
  NormAttributes made_;
};

class GlobalStats : public ov::op::Op {
 public:
  OPENVINO_OP("GlobalStats", "edgesep");

  GlobalStats() = default;
  GlobalStats(const ov::OutputVector& inputs, float epsilon) : Op(inputs), epsilon_(epsilon) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    require_float(*this);
    set_output_type(0, ov::element::f32, stats_shape(get_input_partial_shape(0)));
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<GlobalStats>(inputs, epsilon_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("epsilon", epsilon_);
    return true;
  }
  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const Inputs in(inputs, 3, edgesep::kStatsInputs);
    EdgesepConvNorm norm{};
    const std::string wrong = edgesep::check_stats(in.shapes, &norm);
    OPENVINO_ASSERT(wrong.empty(), "edgesep::GlobalStats: ", wrong);
    outputs[0].set_shape({static_cast<size_t>(norm.batch), 2});
    norm.x = in.data(0), norm.bias = in.data(1);
    norm.eps = epsilon_;
    norm.stats = outputs[0].data<float>();
    run(norm);
    return true;
  }

 private:
  float epsilon_ = 1e-5f;
};

class PooledSum : public ov::op::Op {
 public:
  OPENVINO_OP("PooledSum", "edgesep");

  PooledSum() = default;
  PooledSum(const ov::OutputVector& inputs, int64_t given, float x_slope)
      : Op(inputs), given_(given), x_slope_(x_slope) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    require_float(*this, edgesep::kPooledIndex);
    set_output_type(0, ov::element::f32, get_input_partial_shape(0));
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<PooledSum>(inputs, given_, x_slope_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("given", given_);
    visitor.on_attribute("x_slope", x_slope_);
    return true;
  }
  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const Inputs in(inputs, given_, edgesep::kPooledInputs);
    EdgesepPooled pooled{};
    std::string wrong = edgesep::check_pooled(in.shapes, &pooled);
    const std::vector<int64_t> index = in.integers(edgesep::kPooledIndex);
    if (wrong.empty()) wrong = edgesep::check_index(index.data(), pooled.coarse * pooled.span, pooled.frames);
    OPENVINO_ASSERT(wrong.empty(), "edgesep::PooledSum: ", wrong);
    outputs[0].set_shape(inputs[0].get_shape());
    pooled.total = in.data(0), pooled.x = in.data(1), pooled.index = index.data(), pooled.weight = in.data(3);
    pooled.x_stats = in.data(4), pooled.x_bias = in.data(5), pooled.x_gamma = in.data(6), pooled.x_beta = in.data(7);
    pooled.x_slope = given_slope(x_slope_);
    pooled.out = outputs[0].data<float>();
    split(pooled, edgesep_pooled, pooled.batch * pooled.coarse);
    return true;
  }

 private:
  int64_t given_ = 15;
  float x_slope_ = 1;
};

class HeadNorm : public ov::op::Op {
 public:
  OPENVINO_OP("HeadNorm", "edgesep");

  HeadNorm() = default;
  HeadNorm(const ov::OutputVector& inputs, int64_t given, int64_t first, float epsilon)
      : Op(inputs), given_(given), first_(first), epsilon_(epsilon) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    require_float(*this);
    const auto x = get_input_partial_shape(0), gain = get_input_partial_shape(1);
    ov::PartialShape y = ov::PartialShape::dynamic(4);
    y[0] = 1;
    if (gain.is_static() && gain.size() == 3) {
      y[1] = gain[0], y[3] = gain[1] * gain[2];
      if (x.is_static() && x.size())
        y[2] = static_cast<int64_t>(ov::shape_size(x.to_shape())) / (x[x.size() - 1] * gain[1]).get_length();
    }
    set_output_type(0, ov::element::f32, y);
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<HeadNorm>(inputs, given_, first_, epsilon_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("given", given_);
    visitor.on_attribute("first", first_);
    visitor.on_attribute("epsilon", epsilon_);
    return true;
  }
  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const Inputs in(inputs, given_, edgesep::kHeadNormInputs);
    EdgesepHeadNorm norm{};
    norm.first = first_, norm.epsilon = epsilon_;
    const std::string wrong = edgesep::check_head_norm(in.shapes, &norm);
    OPENVINO_ASSERT(wrong.empty(), "edgesep::HeadNorm: ", wrong);
    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    outputs[0].set_shape({1, size(norm.heads), size(norm.frames), size(norm.bins * norm.features)});
    norm.x = in.data(0), norm.gain = in.data(1), norm.bias = in.data(2);
    norm.slope = in.data(edgesep::kHeadNormSlope);
    norm.y = outputs[0].data<float>();
    split(norm, edgesep_head_norm, edgesep_head_norm_rows(&norm));
    return true;
  }

 private:
  int64_t given_ = 0, first_ = 0;
  float epsilon_ = 1e-5f;
};

struct Rounding {
  float k_scale = 0, k_zero = 0, v_scale = 0, v_zero = 0;
};

class PastAttention : public ov::op::Op {
 public:
  OPENVINO_OP("PastAttention", "edgesep");

  PastAttention() = default;
  PastAttention(const ov::OutputVector& inputs, const Rounding& rounding) : Op(inputs), rounding_(rounding) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    require_types(*this, kAll, edgesep::kAttentionNames, [this](size_t i) {
      const bool bytes = (i == 3 && rounding_.k_scale != 0) || (i == 4 && rounding_.v_scale != 0);
      return bytes ? ov::element::u8 : ov::element::f32;
    });
    set_output_type(0, ov::element::f32, get_input_partial_shape(2));
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<PastAttention>(inputs, rounding_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("k_scale", rounding_.k_scale);
    visitor.on_attribute("k_zero", rounding_.k_zero);
    visitor.on_attribute("v_scale", rounding_.v_scale);
    visitor.on_attribute("v_zero", rounding_.v_zero);
    return true;
  }
  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const Inputs in(inputs, (1 << edgesep::kAttentionInputs) - 1, edgesep::kAttentionInputs);
    EdgesepAttention attention{};
    const std::string wrong = edgesep::check_attention(in.shapes, &attention);
    OPENVINO_ASSERT(wrong.empty(), "edgesep::PastAttention: ", wrong);
    outputs[0].set_shape(inputs[2].get_shape());
    attention.q = in.data(0), attention.k = in.data(1), attention.v = in.data(2), attention.hidden = in.data(5);
    const ov::Tensor &past_k = inputs[3], &past_v = inputs[4];
    attention.past_k = past_k.data();
    attention.past_v = past_v.data();
    attention.k_scale = rounding_.k_scale, attention.k_zero = rounding_.k_zero;
    attention.v_scale = rounding_.v_scale, attention.v_zero = rounding_.v_zero;
    attention.y = outputs[0].data<float>();
    attention.weights = room(edgesep_attention_workspace(&attention));
    split(attention, edgesep_attention_weights, attention.items);
    split(attention, edgesep_attention_values, attention.items * edgesep_attention_chunks(&attention));
    return true;
  }

 private:
  Rounding rounding_;
};

class LstmSteps : public ov::op::Op {
 public:
  OPENVINO_OP("LstmSteps", "edgesep");

  LstmSteps() = default;
  LstmSteps(const ov::OutputVector& inputs, int64_t given) : Op(inputs), given_(given) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    const bool bytes = given_ >> edgesep::kLstmScale & 1, ordered = given_ >> edgesep::kLstmOrder & 1;
    require_types(*this, given_, edgesep::kLstmNames, [=](size_t i) {
      if (i == edgesep::kLstmOrder) return ov::element::dynamic;
      return bytes && i == edgesep::kLstmRecurrent ? ov::element::i8 : ov::element::f32;
    });
    const auto gates = get_input_partial_shape(0), state = get_input_partial_shape(2);
    ov::PartialShape y = ov::PartialShape::dynamic(4);
    y[1] = 1;
    if (state.rank().is_static()) y[2] = state[1], y[3] = state[2];
    if (ordered) {
      const auto order = get_input_partial_shape(edgesep::kLstmOrder);
      if (order.rank().is_static()) y[0] = order[0];
    } else if (gates.is_static() && state.is_static()) {
      const int64_t step = state[1].get_length() * state[2].get_length() * 4;
      y[0] = static_cast<int64_t>(ov::shape_size(gates.to_shape())) / step;
    }
    set_output_type(0, ov::element::f32, y);
    set_output_type(1, ov::element::f32, state);
    set_output_type(2, ov::element::f32, state);
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<LstmSteps>(inputs, given_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("given", given_);
    return true;
  }
  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const Inputs in(inputs, given_, edgesep::kLstmInputs);
    EdgesepLstm lstm{};
    std::string wrong = edgesep::check_lstm(in.shapes, &lstm);
    const std::vector<int64_t> order = in.integers(edgesep::kLstmOrder);
    if (wrong.empty() && !order.empty())
      wrong = edgesep::check_index(order.data(), lstm.steps * lstm.sets, lstm.frames, -1);
    OPENVINO_ASSERT(wrong.empty(), "edgesep::LstmSteps: ", wrong);
    const ov::Shape state = inputs[2].get_shape();
    outputs[0].set_shape({static_cast<size_t>(lstm.steps), 1, state[1], state[2]});
    outputs[1].set_shape(state);
    outputs[2].set_shape(state);
    lstm.gates = in.data(0), lstm.initial_h = in.data(2), lstm.initial_c = in.data(3);
    lstm.scale = in.data(edgesep::kLstmScale);
    if (lstm.scale)
      lstm.bytes = inputs[edgesep::kLstmRecurrent].data<const int8_t>();
    else
      lstm.recurrent = in.data(edgesep::kLstmRecurrent);
    lstm.order = order.empty() ? nullptr : order.data();
    lstm.y = outputs[0].data<float>();
    lstm.last_h = outputs[1].data<float>();
    lstm.last_c = outputs[2].data<float>();
    split(lstm, edgesep_lstm, edgesep_lstm_blocks(&lstm));
    return true;
  }

 private:
  int64_t given_ = 0;
};

class WindowProduct : public ov::op::Op {
 public:
  OPENVINO_OP("WindowProduct", "edgesep");

  WindowProduct() = default;
  WindowProduct(const ov::OutputVector& inputs, int64_t given, float x_scale, int64_t x_zero)
      : Op(inputs), given_(given), x_scale_(x_scale), x_zero_(x_zero) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    const bool indexed = given_ >> edgesep::kWindowIndex & 1, rounded = given_ >> edgesep::kWindowScale & 1;
    require_types(*this, given_, edgesep::kWindowNames, [=](size_t i) {
      if (i == edgesep::kWindowIndex) return ov::element::dynamic;
      return rounded && i == edgesep::kWindowWeight ? ov::element::i8 : ov::element::f32;
    });
    const auto x = get_input_partial_shape(0), weight = get_input_partial_shape(1), bias = get_input_partial_shape(2);
    ov::PartialShape y = ov::PartialShape::dynamic(2);
    if (bias.rank().is_static()) y[1] = bias[0];
    if (indexed) {
      const auto index = get_input_partial_shape(edgesep::kWindowIndex);
      if (index.rank().is_static()) y[0] = index[0];
      fixed_ = ov::is_type<ov::op::v0::Constant>(get_input_node_ptr(edgesep::kWindowIndex));
    } else if (x.is_static() && weight.is_static()) {
      y[0] = static_cast<int64_t>(ov::shape_size(x.to_shape()) / (weight.to_shape().at(2) * (rounded ? 4 : 1)));
    }
    set_output_type(0, ov::element::f32, y);
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<WindowProduct>(inputs, given_, x_scale_, x_zero_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("given", given_);
    visitor.on_attribute("x_scale", x_scale_);
    visitor.on_attribute("x_zero", x_zero_);
    return true;
  }
  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const Inputs in(inputs, given_, edgesep::kWindowInputs);
    EdgesepWindows windows{};
    std::string wrong = edgesep::check_windows(in.shapes, &windows);
    std::vector<int64_t> changing;
    if (fixed_)
      std::call_once(once_, [&] { index_ = in.integers(edgesep::kWindowIndex); });
    else
      changing = in.integers(edgesep::kWindowIndex);
    const std::vector<int64_t>& index = fixed_ ? index_ : changing;
    if (wrong.empty() && !index.empty() && !(fixed_ && fitting_ == windows.rows))
      wrong = edgesep::check_index(index.data(), windows.windows * windows.taps, windows.rows, edgesep::kNoRow);
    OPENVINO_ASSERT(wrong.empty(), "edgesep::WindowProduct: ", wrong);
    fitting_ = windows.rows;
    outputs[0].set_shape({static_cast<size_t>(windows.windows), static_cast<size_t>(windows.outputs)});
    windows.x = in.data(0), windows.bias = in.data(2), windows.scale = in.data(edgesep::kWindowScale);
    windows.index = index.empty() ? nullptr : index.data();
    windows.slope = in.data(4), windows.residual = in.data(5);
    windows.y = outputs[0].data<float>();
    if (!windows.scale) {
      windows.weight = in.data(edgesep::kWindowWeight);
      split(windows, edgesep_window_product, edgesep_window_rows(&windows));
      return true;
    }
    windows.bytes = inputs[edgesep::kWindowWeight].data<const int8_t>();
    windows.x_scale = x_scale_, windows.x_zero = static_cast<int32_t>(x_zero_);
    windows.room = room(edgesep_window_room(&windows));
    split(windows, edgesep_rounded_rows, windows.rows);
    split(windows, edgesep_rounded_product, edgesep_window_rows(&windows));
    return true;
  }

 private:
  int64_t given_ = 7;
  float x_scale_ = 1;
  int64_t x_zero_ = 0;
  // An index that is a constant, as it nearly always is, is read once, and checked once for as many rows.
  bool fixed_ = false;
  mutable std::once_flag once_;
  mutable std::vector<int64_t> index_;
  mutable std::atomic<int64_t> fitting_{-1};
};

class BidirectionalMamba : public ov::op::Op {
 public:
  OPENVINO_OP("BidirectionalMamba", "edgesep");

  BidirectionalMamba() = default;
  BidirectionalMamba(const ov::OutputVector& inputs, float epsilon, bool pairs)
      : Op(inputs), epsilon_(epsilon), pairs_(pairs) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    const bool bytes = get_input_size() > edgesep::kMambaScale;
    require_types(*this, kAll, edgesep::kMambaNames, [=](size_t i) {
      if (bytes && edgesep::mamba_bytes(i)) return ov::element::i8;
      return pairs_ && edgesep::mamba_pairs(i) ? ov::element::i32 : ov::element::f32;
    });
    const auto x = get_input_partial_shape(0);
    ov::PartialShape y = ov::PartialShape::dynamic(3);
    if (x.rank().is_static() && x.size() == 3) y = {x[0], x[2], x[1]};
    set_output_type(0, ov::element::f32, y);
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<BidirectionalMamba>(inputs, epsilon_, pairs_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("epsilon", epsilon_);
    visitor.on_attribute("bf16", pairs_);
    return true;
  }
  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const Inputs in(inputs, (1 << inputs.size()) - 1, edgesep::kMambaInputs);  // those in front
    EdgesepMamba mamba{};
    mamba.pairs = pairs_;
    const std::string wrong = edgesep::check_mamba(in.shapes, &mamba);
    OPENVINO_ASSERT(wrong.empty(), "edgesep::BidirectionalMamba: ", wrong);
    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    outputs[0].set_shape({size(mamba.rows), size(mamba.length), size(mamba.channels)});
    mamba.epsilon = epsilon_;
    size_t i = 0;
    for (const float** to : edgesep::mamba_inputs(&mamba)) *to = in.bits(i++);
    mamba.y = outputs[0].data<float>();
    split(mamba, edgesep_mamba, mamba.rows);
    return true;
  }

 private:
  float epsilon_ = 1e-5f;
  bool pairs_ = false;
};

// An input that the ONNX file left empty.
bool absent(const ov::Output<ov::Node>& input) {
  return !input.get_node() || std::string(input.get_node()->get_type_info().name) == "NullNode";
}

// The inputs that are there, and which of the contract's they are.
ov::OutputVector present(const ov::frontend::NodeContext& node, int64_t* given) {
  ov::OutputVector inputs;
  for (int i = 0; i < static_cast<int>(node.get_input_size()); ++i) {
    const ov::Output<ov::Node> input = node.get_input(i);
    if (absent(input)) continue;
    inputs.push_back(input);
    *given |= int64_t{1} << i;
  }
  return inputs;
}

ov::OutputVector scan_from_onnx(const ov::frontend::NodeContext& node) {
  int64_t given = 0;
  const ov::OutputVector inputs = present(node, &given);
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

ov::OutputVector norm_from_onnx(const ov::frontend::NodeContext& node) {
  NormAttributes made;
  made.given = 0;
  const ov::OutputVector inputs = present(node, &made.given);
  made.stride = node.get_attribute<int64_t>("stride", 1);
  made.sigmoid = node.get_attribute<int64_t>("sigmoid", 0) != 0;
  made.stats = node.get_attribute<int64_t>("deferred", 0) != 0;
  made.epsilon = node.get_attribute<float>("epsilon", 1e-5f);
  made.slope = node.get_attribute<float>("slope", 1);
  made.x_slope = node.get_attribute<float>("x_slope", 1);
  return std::make_shared<ConvNorm>(inputs, made)->outputs();
}

ov::OutputVector stats_from_onnx(const ov::frontend::NodeContext& node) {
  int64_t given = 0;
  const ov::OutputVector inputs = present(node, &given);
  return std::make_shared<GlobalStats>(inputs, node.get_attribute<float>("epsilon", 1e-5f))->outputs();
}

ov::OutputVector pooled_from_onnx(const ov::frontend::NodeContext& node) {
  int64_t given = 0;
  const ov::OutputVector inputs = present(node, &given);
  return std::make_shared<PooledSum>(inputs, given, node.get_attribute<float>("x_slope", 1))->outputs();
}

ov::OutputVector head_norm_from_onnx(const ov::frontend::NodeContext& node) {
  int64_t given = 0;
  const ov::OutputVector inputs = present(node, &given);
  return std::make_shared<HeadNorm>(inputs, given, node.get_attribute<int64_t>("first", 0),
                                    node.get_attribute<float>("epsilon", 1e-5f))
      ->outputs();
}

ov::OutputVector attention_from_onnx(const ov::frontend::NodeContext& node) {
  int64_t given = 0;
  const ov::OutputVector inputs = present(node, &given);
  const auto value = [&node](const char* name) { return node.get_attribute<float>(name, 0); };
  return std::make_shared<PastAttention>(
             inputs, Rounding{value("k_scale"), value("k_zero"), value("v_scale"), value("v_zero")})
      ->outputs();
}

ov::OutputVector lstm_from_onnx(const ov::frontend::NodeContext& node) {
  int64_t given = 0;
  const ov::OutputVector inputs = present(node, &given);
  return std::make_shared<LstmSteps>(inputs, given)->outputs();
}

ov::OutputVector windows_from_onnx(const ov::frontend::NodeContext& node) {
  int64_t given = 0;
  const ov::OutputVector inputs = present(node, &given);
  return std::make_shared<WindowProduct>(inputs, given, node.get_attribute<float>("x_scale", 1),
                                         node.get_attribute<int64_t>("x_zero", 0))
      ->outputs();
}

ov::OutputVector mamba_from_onnx(const ov::frontend::NodeContext& node) {
  int64_t given = 0;
  return std::make_shared<BidirectionalMamba>(present(node, &given), node.get_attribute<float>("epsilon", 1e-5f),
                                              node.get_attribute<int64_t>("bf16", 0) != 0)
      ->outputs();
}

}  // namespace

using ov::frontend::onnx::ConversionExtension;
OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>(
    {std::make_shared<ov::OpExtension<SelectiveScan>>(), std::make_shared<ov::OpExtension<CausalConv1dSilu>>(),
     std::make_shared<ov::OpExtension<ConvNorm>>(), std::make_shared<ov::OpExtension<GlobalStats>>(),
     std::make_shared<ov::OpExtension<PooledSum>>(), std::make_shared<ov::OpExtension<PastAttention>>(),
     std::make_shared<ov::OpExtension<LstmSteps>>(), std::make_shared<ov::OpExtension<WindowProduct>>(),
     std::make_shared<ov::OpExtension<BidirectionalMamba>>(), std::make_shared<ov::OpExtension<HeadNorm>>(),
     std::make_shared<ConversionExtension>("SelectiveScan", "edgesep", scan_from_onnx),
     std::make_shared<ConversionExtension>("CausalConv1dSilu", "edgesep", conv_from_onnx),
     std::make_shared<ConversionExtension>("ConvNorm", "edgesep", norm_from_onnx),
     std::make_shared<ConversionExtension>("GlobalStats", "edgesep", stats_from_onnx),
     std::make_shared<ConversionExtension>("PooledSum", "edgesep", pooled_from_onnx),
     std::make_shared<ConversionExtension>("HeadNorm", "edgesep", head_norm_from_onnx),
     std::make_shared<ConversionExtension>("PastAttention", "edgesep", attention_from_onnx),
     std::make_shared<ConversionExtension>("LstmSteps", "edgesep", lstm_from_onnx),
     std::make_shared<ConversionExtension>("WindowProduct", "edgesep", windows_from_onnx),
     std::make_shared<ConversionExtension>("BidirectionalMamba", "edgesep", mamba_from_onnx)}));
