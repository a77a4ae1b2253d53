// Chooses the instruction set once, when the library is loaded; edgesep_use overrides it (tests and benchmarks).
#include <cstring>

#include "causal_conv.h"
#include "conv_norm.h"
#include "lstm_steps.h"
#include "mamba.h"
#include "past_attention.h"
#include "selective_scan.h"
#include "window_product.h"

// Every kernel: name in its namespace, argument type.
#define EDGESEP_FLOAT_KERNELS(X)         \
  X(scan, EdgesepScan)                   \
  X(scan_backward, EdgesepScanBackward)  \
  X(conv, EdgesepConv)                   \
  X(conv_backward, EdgesepConvBackward)  \
  X(conv_norm_sums, EdgesepConvNorm)     \
  X(conv_norm_apply, EdgesepConvNorm)    \
  X(conv_norm_backward, EdgesepConvNormBackward) \
  X(pooled, EdgesepPooled)               \
  X(gated, EdgesepGated)                 \
  X(gated_backward, EdgesepGatedBackward)
// Those that may multiply what has fewer bits: pairs of bfloat16, integers.
#define EDGESEP_NARROW_KERNELS(X)            \
  X(window_product, EdgesepWindows)      \
  X(mamba, EdgesepMamba)                 \
  X(attention_weights, EdgesepAttention) \
  X(attention_values, EdgesepAttention)  \
  X(lstm, EdgesepLstm)
#define EDGESEP_KERNELS(X) EDGESEP_FLOAT_KERNELS(X) EDGESEP_NARROW_KERNELS(X)

#define EDGESEP_DECLARE(name, type) void name(const type*, int64_t, int64_t);
#define EDGESEP_MEMBER(name, type) void (*name)(const type*, int64_t, int64_t);

namespace edgesep {
namespace baseline {
EDGESEP_KERNELS(EDGESEP_DECLARE)
}
#ifdef EDGESEP_X86
namespace avx2 {
EDGESEP_KERNELS(EDGESEP_DECLARE)
}
namespace avx512 {
EDGESEP_KERNELS(EDGESEP_DECLARE)
}
namespace avx512bf16 {
EDGESEP_NARROW_KERNELS(EDGESEP_DECLARE)
}
#endif
}  // namespace edgesep

namespace {

struct Table {
  const char* isa;
  EDGESEP_KERNELS(EDGESEP_MEMBER)
};

const Table kTables[] = {
#ifdef EDGESEP_X86
#define EDGESEP_ENTRY(name, type) edgesep::avx512::name,
#define EDGESEP_NARROW_ENTRY(name, type) edgesep::avx512bf16::name,
    {"avx512bf16", EDGESEP_FLOAT_KERNELS(EDGESEP_ENTRY) EDGESEP_NARROW_KERNELS(EDGESEP_NARROW_ENTRY)},
    {"avx512", EDGESEP_KERNELS(EDGESEP_ENTRY)},
#undef EDGESEP_ENTRY
#define EDGESEP_ENTRY(name, type) edgesep::avx2::name,
    {"avx2", EDGESEP_KERNELS(EDGESEP_ENTRY)},
#undef EDGESEP_ENTRY
#endif
#define EDGESEP_ENTRY(name, type) edgesep::baseline::name,
    {"baseline", EDGESEP_KERNELS(EDGESEP_ENTRY)},
#undef EDGESEP_ENTRY
};

bool supported(const char* isa) {
#ifdef EDGESEP_X86
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(isa, "avx512bf16"))
    return wide && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (!std::strcmp(isa, "avx512")) return wide;
  if (!std::strcmp(isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !std::strcmp(isa, "baseline");
}

const Table* best() {
  for (const Table& table : kTables)
    if (supported(table.isa)) return &table;
  return nullptr;  // not reached: the baseline is always supported
}

const Table* chosen = best();

int64_t blocks(int64_t channels) { return (channels + 15) / 16; }

}  // namespace

extern "C" {

// Returns 0, or 1 where this processor or this build lacks the instruction set.
int edgesep_use(const char* isa) {
  for (const Table& table : kTables)
    if (!std::strcmp(table.isa, isa) && supported(isa)) {
      chosen = &table;
      return 0;
    }
  return 1;
}

const char* edgesep_instruction_set(void) { return chosen->isa; }

#define EDGESEP_EXPORT(name, type) \
  void edgesep_##name(const type* s, int64_t first, int64_t end) { chosen->name(s, first, end); }
EDGESEP_KERNELS(EDGESEP_EXPORT)

int64_t edgesep_scan_rows(const EdgesepScan* s) { return s->batch * blocks(s->channels); }
int64_t edgesep_conv_norm_rows(const EdgesepConvNorm* s) { return s->batch * edgesep_conv_norm_parts(s); }
int64_t edgesep_conv_rows(const EdgesepConv* s) { return s->batch * blocks(s->channels); }

// The state of every step, and two sums for every step, 16 lanes each.
int64_t edgesep_scan_backward_workspace(const EdgesepScanBackward* s) { return s->length * s->state * 16 * 3; }
}
