// What a caller hands over, checked once for every adapter: shapes by the contract's order of inputs.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "causal_conv.h"
#include "selective_scan.h"

namespace edgesep {

// One input: its dimensions, or `given` false where an optional input is left out.
struct Input {
  bool given = false;
  std::vector<int64_t> dims;
};

// u, delta, A, B, C, D, z, delta_bias, initial_state
constexpr int kScanInputs = 9, kScanRequired = 5;
extern const char* const kScanNames[kScanInputs];

// x, weight, bias
constexpr int kConvInputs = 3;
extern const char* const kConvNames[kConvInputs];

// Empty and the sizes filled in, or a sentence that names the input, what came and what was expected.
std::string check_scan(const std::vector<Input>& inputs, EdgesepScan* sizes);
std::string check_conv(const std::vector<Input>& inputs, EdgesepConv* sizes);

}  // namespace edgesep
