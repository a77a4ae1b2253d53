// What both passes of attention over the past share: past values in eight bits, and what meets them.
#pragma once
#include "integers.h"
#include "past_attention.h"

namespace edgesep {
namespace EDGESEP_ISA {

constexpr int64_t kGroup = EDGESEP_ATTENTION_GROUP;  // frames side by side: the same on every instruction set
constexpr int kParts = static_cast<int>(kGroup) / kLanes;  // registers of a group
constexpr float kFinest = 8.3e6f;  // integers that add up to this stay below 2**31 when they weigh 255 each

// A plain loop: compilers widen registers of bytes better than what the vector types let one say.
inline void widen(const uint8_t* __restrict from, int64_t count, float scale, float zero, float* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = (static_cast<float>(from[i]) - zero) * scale;
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
