// Compiled once per instruction set, each time in a namespace of its own (EDGESEP_ISA); see dispatch.cpp.
//
// Overlapping windows as rows of one matrix are up to `taps` copies of the same map. Here a window is a few pointers to
// its rows.
#include "window_product.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "unfolded_product.h"
#include "window_tiles.h"

namespace edgesep {
namespace EDGESEP_ISA {

namespace {

// Windows of which each is one row behind the one before, no more of them than taps: first, first + apart, ...
struct Run {
  int64_t first, count;
};

class Runs {
 public:
  explicit Runs(const EdgesepWindows& s) : s_(s) {
    while (apart < s.windows && !follows(0)) ++apart;
    if (apart == s.windows) apart = 1;
    std::vector<char> taken(static_cast<size_t>(s.windows));
    const auto left = [&](int64_t m) { return m < s.windows && !taken[static_cast<size_t>(m)]; };
    for (int64_t m = 0; m < s.windows; ++m) {
      if (!left(m)) continue;
      Run run{m, 0};
      for (int64_t next = m; left(next) && run.count < s.taps; next += apart) {
        taken[static_cast<size_t>(next)] = 1;
        ++run.count;
        if (!follows(next)) break;
      }
      all.push_back(run);
    }
  }

  int64_t apart = 1;
  std::vector<Run> all;

 private:
  // Whether the window `apart` behind m is one row behind it.
  bool follows(int64_t m) const {
    const int64_t* rows = s_.index + m * s_.taps;
    return m + apart < s_.windows && std::equal(rows + 1, rows + s_.taps, rows + apart * s_.taps);
  }

  const EdgesepWindows& s_;
};

// Some of the runs: what the sums of the matrix meet, then one group of outputs after another.
class Unfolded {
 public:
  Unfolded(const EdgesepWindows& s, const Runs& runs, int64_t first, int64_t count)
      : s_(s), runs_(runs.all.data() + first), apart_(runs.apart), count_(count) {
    const int64_t steps = 2 * s.taps - 1;
    const std::vector<float> zeros(static_cast<size_t>(s.inputs));
    at_once_ = (count + pieces() - 1) / pieces();  // as even as can be
    size_ = unfolded_size(s.inputs, s.taps);
    parts_.resize(static_cast<size_t>(pieces() * size_));
    const float* rows[(2 * kUnfoldedTaps - 1) * kUnfoldedBlocks];
    for (int64_t i = 0; i < pieces(); ++i) {
      for (int64_t b = 0; b < blocks(i); ++b)
        for (int64_t step = 0; step < steps; ++step) {
          const int64_t row = row_of(runs_[i * at_once_ + b], step);
          rows[b * steps + step] = row < 0 ? zeros.data() : s.x + row * s.inputs;
        }
      unfold(rows, s.inputs, s.taps, blocks(i), false, parts_.data() + i * size_);
    }
  }

  void meet(int64_t group) const {
    const int64_t from = group * kUnfoldedGroup, outputs = std::min<int64_t>(kUnfoldedGroup, s_.outputs - from);
    const float* weight = s_.weight + group * edgesep_unfolded_parts(s_.taps) * s_.inputs * kUnfoldedGroup;
    std::vector<float> sums(static_cast<size_t>(at_once_ * s_.taps * kUnfoldedGroup));
    for (int64_t i = 0; i < pieces(); ++i) {
      unfolded_product(parts_.data() + i * size_, blocks(i), s_.inputs, s_.taps, weight, kUnfoldedGroup, nullptr,
                       blocks(i) * s_.taps, false, sums.data());
      for (int64_t b = 0; b < blocks(i); ++b) {
        const Run& run = runs_[i * at_once_ + b];
        for (int64_t m = 0; m < run.count; ++m)
          for (int64_t v = 0; v < outputs; v += kLanes) {
            const int64_t lanes = std::min<int64_t>(kLanes, outputs - v);
            const Vec sum = load(sums.data() + (b * s_.taps + m) * kUnfoldedGroup + v, kLanes);
            finish(s_, sum + load(s_.bias + from + v, lanes), run.first + m * apart_, from + v, lanes);
          }
      }
    }
  }

 private:
  int64_t pieces() const { return (count_ + kUnfoldedBlocks - 1) / kUnfoldedBlocks; }
  int64_t blocks(int64_t piece) const { return std::min(at_once_, count_ - piece * at_once_); }

  int64_t row_of(const Run& run, int64_t step) const {
    if (step < s_.taps) return s_.index[run.first * s_.taps + step];
    const int64_t behind = step - s_.taps + 1;  // the window whose last row this is
    return behind < run.count ? s_.index[(run.first + behind * apart_ + 1) * s_.taps - 1] : -1;
  }

  const EdgesepWindows& s_;
  const Run* runs_;
  int64_t apart_, count_, at_once_, size_;
  std::vector<float> parts_;
};

// All shares of a group one after the other: its part of the matrix is read from memory once.
void unfolded(const EdgesepWindows& s, int64_t first, int64_t end) {
  const Runs runs(s);
  const int64_t all = static_cast<int64_t>(runs.all.size());
  const auto edge = [&](int64_t share) { return all * share / EDGESEP_UNFOLDED_SHARES; };
  std::optional<Unfolded> shares[EDGESEP_UNFOLDED_SHARES];
  for (int64_t row = first; row < end; ++row) {
    const int64_t share = row % EDGESEP_UNFOLDED_SHARES, count = edge(share + 1) - edge(share);
    if (!count) continue;
    if (!shares[share]) shares[share].emplace(s, runs, edge(share), count);
    shares[share]->meet(row / EDGESEP_UNFOLDED_SHARES);
  }
}

}  // namespace

void window_product(const EdgesepWindows* s, int64_t first, int64_t end) {
  if (s->unfolded) return unfolded(*s, first, end);
  const std::vector<float> zeros(static_cast<size_t>(s->inputs * std::max(Pair::kMet, Single::kMet)));
  s->pairs ? product<Pair>(s, zeros.data(), first, end) : product<Single>(s, zeros.data(), first, end);
}

}  // namespace EDGESEP_ISA
}  // namespace edgesep
