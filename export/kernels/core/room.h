// Workspaces of adapters' calls.
#pragma once
#include <cstdint>
#include <vector>

namespace edgesep {

// Room for a call, which its thread keeps: from the system it would come as empty pages every time.
inline float* room(int64_t floats) {
  thread_local std::vector<float> kept;
  if (kept.size() < static_cast<size_t>(floats)) kept.resize(static_cast<size_t>(floats));
  return kept.data();
}

}  // namespace edgesep
