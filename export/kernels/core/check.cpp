#include "check.h"

namespace edgesep {

const char* const kScanNames[kScanInputs] = {"u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"};
const char* const kConvNames[kConvInputs] = {"x", "weight", "bias"};

namespace {

std::string text(const std::vector<int64_t>& dims) {
  std::string out = "(";
  for (size_t i = 0; i < dims.size(); ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
  return out + ")";
}

// The first input that is missing or differs from what the first ones determine.
std::string first_misfit(const std::vector<Input>& inputs, const char* const* names, int required,
                         const std::vector<std::vector<int64_t>>& wanted) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].given) {
      if (static_cast<int>(i) < required) return std::string(names[i]) + " is missing";
    } else if (inputs[i].dims != wanted[i]) {
      return std::string(names[i]) + " has shape " + text(inputs[i].dims) + ", expected " + text(wanted[i]) +
             " beside " + names[0] + " " + text(inputs[0].dims);
    }
  }
  return "";
}

std::string sequence(const Input& input, const char* name) {
  if (!input.given) return std::string(name) + " is missing";
  for (int64_t n : input.dims)
    if (n < 1) return std::string(name) + " has shape " + text(input.dims) + ": no dimension may be 0";
  if (input.dims.size() != 3)
    return std::string(name) + " has shape " + text(input.dims) + ", expected (batch, length, channels)";
  return "";
}

}  // namespace

std::string check_scan(const std::vector<Input>& in, EdgesepScan* sizes) {
  if (in.size() < kScanRequired || in.size() > kScanInputs)
    return "SelectiveScan takes 5 to 9 inputs, got " + std::to_string(in.size());
  if (std::string wrong = sequence(in[0], "u"); !wrong.empty()) return wrong;
  const int64_t batch = in[0].dims[0], length = in[0].dims[1], channels = in[0].dims[2];
  if (!in[2].given || in[2].dims.size() != 2 || in[2].dims[1] < 1)
    return "A has shape " + text(in[2].dims) + ", expected (" + std::to_string(channels) + ", state)";
  const int64_t state = in[2].dims[1];
  if (state > EDGESEP_SCAN_MAX_STATE)
    return "A has " + std::to_string(state) + " states, at most " + std::to_string(EDGESEP_SCAN_MAX_STATE) +
           " are supported; use the portable scan";
  const std::vector<int64_t> sequence_shape = {batch, length, channels}, mixing = {batch, length, state};
  const std::vector<std::vector<int64_t>> wanted = {sequence_shape, sequence_shape, {channels, state},
                                                    mixing,         mixing,         {channels},
                                                    sequence_shape, {channels},     {batch, channels, state}};
  sizes->batch = batch;
  sizes->length = length;
  sizes->channels = channels;
  sizes->state = state;
  return first_misfit(in, kScanNames, kScanRequired, wanted);
}

std::string check_conv(const std::vector<Input>& in, EdgesepConv* sizes) {
  if (in.size() != kConvInputs) return "CausalConv1dSilu takes 3 inputs, got " + std::to_string(in.size());
  if (std::string wrong = sequence(in[0], "x"); !wrong.empty()) return wrong;
  const int64_t channels = in[0].dims[2];
  if (!in[1].given || in[1].dims.size() != 2 || in[1].dims[1] < 1 || in[1].dims[1] > EDGESEP_CONV_MAX_TAPS)
    return "weight has shape " + text(in[1].dims) + ", expected (" + std::to_string(channels) + ", 1 to " +
           std::to_string(EDGESEP_CONV_MAX_TAPS) + ")";
  sizes->batch = in[0].dims[0];
  sizes->length = in[0].dims[1];
  sizes->channels = channels;
  sizes->taps = in[1].dims[1];
  return first_misfit(in, kConvNames, kConvInputs, {in[0].dims, {channels, sizes->taps}, {channels}});
}

}  // namespace edgesep
