// Chooses the instruction set once, when the library is loaded; edgesep_use overrides it (tests and benchmarks).
#include <cstring>
#if defined(EDGESEP_X86)
#include <cpuid.h>
#elif defined(EDGESEP_ARM)
#include <sys/auxv.h>
#endif

#include "causal_conv.h"
#include "conv_norm.h"
#include "head_norm.h"
#include "lstm_steps.h"
#include "mamba.h"
#include "past_attention.h"
#include "selective_scan.h"
#include "window_product.h"

// Every kernel: name in its namespace, argument type.
#define EDGESEP_FLOAT_KERNELS(X)         \
  X(conv, EdgesepConv)                   \
  X(conv_backward, EdgesepConvBackward)  \
  X(conv_norm_sums, EdgesepConvNorm)     \
  X(conv_norm_apply, EdgesepConvNorm)    \
  X(conv_norm_backward, EdgesepConvNormBackward) \
  X(pooled, EdgesepPooled)               \
  X(gated, EdgesepGated)                 \
  X(head_norm, EdgesepHeadNorm)          \
  X(gated_backward, EdgesepGatedBackward)
// Those that may multiply pairs of bfloat16, or are others for processors that do.
#define EDGESEP_PAIR_KERNELS(X)         \
  X(scan, EdgesepScan)                  \
  X(scan_backward, EdgesepScanBackward) \
  X(window_product, EdgesepWindows)     \
  X(mamba, EdgesepMamba)
// Those that may multiply integers.
#define EDGESEP_INTEGER_KERNELS(X)       \
  X(attention_weights, EdgesepAttention) \
  X(attention_values, EdgesepAttention)  \
  X(lstm, EdgesepLstm)                   \
  X(rounded_rows, EdgesepWindows)        \
  X(rounded_product, EdgesepWindows)
#define EDGESEP_KERNELS(X) EDGESEP_FLOAT_KERNELS(X) EDGESEP_PAIR_KERNELS(X) EDGESEP_INTEGER_KERNELS(X)

#define EDGESEP_DECLARE(name, type) void name(const type*, int64_t, int64_t);
#define EDGESEP_DECLARE_INTEGERS EDGESEP_INTEGER_KERNELS(EDGESEP_DECLARE) extern const int sums_bytes;
#define EDGESEP_DECLARE_ALL \
  EDGESEP_FLOAT_KERNELS(EDGESEP_DECLARE) EDGESEP_PAIR_KERNELS(EDGESEP_DECLARE) EDGESEP_DECLARE_INTEGERS
#define EDGESEP_MEMBER(name, type) void (*name)(const type*, int64_t, int64_t);

namespace edgesep {
namespace baseline {
EDGESEP_DECLARE_ALL
}
#ifdef EDGESEP_X86
namespace avx2 {
EDGESEP_DECLARE_ALL
}
namespace avx512 {
EDGESEP_DECLARE_ALL
}
namespace avx512bf16 {
EDGESEP_PAIR_KERNELS(EDGESEP_DECLARE)
}
namespace avx512vnni {
EDGESEP_DECLARE_INTEGERS
}
namespace avxvnni {
EDGESEP_DECLARE_INTEGERS
}
#endif
#ifdef EDGESEP_ARM
namespace dotprod {
EDGESEP_DECLARE_INTEGERS
}
#endif
}  // namespace edgesep

namespace {

#ifdef EDGESEP_X86
// Not among the names that compilers of these years know: leaf 7, part 1, eax, bit 4.
bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

struct Table {
  const char* isa;
  const int* sums_bytes;
  EDGESEP_KERNELS(EDGESEP_MEMBER)
};

#define EDGESEP_BASELINE(name, type) edgesep::baseline::name,
#define EDGESEP_AVX2(name, type) edgesep::avx2::name,
#define EDGESEP_AVXVNNI(name, type) edgesep::avxvnni::name,
#define EDGESEP_AVX512(name, type) edgesep::avx512::name,
#define EDGESEP_AVX512VNNI(name, type) edgesep::avx512vnni::name,
#define EDGESEP_AVX512BF16(name, type) edgesep::avx512bf16::name,

#define EDGESEP_DOTPROD(name, type) edgesep::dotprod::name,

// The best one first.
const Table kTables[] = {
#ifdef EDGESEP_X86
    {"avx512bf16", &edgesep::avx512vnni::sums_bytes, EDGESEP_FLOAT_KERNELS(EDGESEP_AVX512) EDGESEP_PAIR_KERNELS(EDGESEP_AVX512BF16)
                       EDGESEP_INTEGER_KERNELS(EDGESEP_AVX512VNNI)},
    {"avx512vnni", &edgesep::avx512vnni::sums_bytes, EDGESEP_FLOAT_KERNELS(EDGESEP_AVX512) EDGESEP_PAIR_KERNELS(EDGESEP_AVX512)
                       EDGESEP_INTEGER_KERNELS(EDGESEP_AVX512VNNI)},
    {"avx512", &edgesep::avx512::sums_bytes, EDGESEP_KERNELS(EDGESEP_AVX512)},
    {"avxvnni", &edgesep::avxvnni::sums_bytes, EDGESEP_FLOAT_KERNELS(EDGESEP_AVX2) EDGESEP_PAIR_KERNELS(EDGESEP_AVX2)
                    EDGESEP_INTEGER_KERNELS(EDGESEP_AVXVNNI)},
    {"avx2", &edgesep::avx2::sums_bytes, EDGESEP_KERNELS(EDGESEP_AVX2)},
#endif
#ifdef EDGESEP_ARM
    {"dotprod", &edgesep::dotprod::sums_bytes, EDGESEP_FLOAT_KERNELS(EDGESEP_BASELINE) EDGESEP_PAIR_KERNELS(EDGESEP_BASELINE)
                    EDGESEP_INTEGER_KERNELS(EDGESEP_DOTPROD)},
#endif
    {"baseline", &edgesep::baseline::sums_bytes, EDGESEP_KERNELS(EDGESEP_BASELINE)},
};

bool supported(const char* isa) {
  const auto is = [&](const char* name) { return !std::strcmp(isa, name); };
#ifdef EDGESEP_X86
  const bool two = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const bool integers = wide && __builtin_cpu_supports("avx512vnni");
  if (is("avx512bf16")) return integers && __builtin_cpu_supports("avx512bf16");
  if (is("avx512vnni")) return integers;
  if (is("avx512")) return wide;
  if (is("avxvnni")) return two && has_avxvnni();
  if (is("avx2")) return two;
#endif
#ifdef EDGESEP_ARM
  if (is("dotprod")) return getauxval(AT_HWCAP) & (1 << 20);  // HWCAP_ASIMDDP
#endif
  return is("baseline");
}

// Intel's processors take two cycles for a register of products of pairs, in which they multiply four of floats.
bool pairs_are_slow() {
#ifdef EDGESEP_X86
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

const Table* best() {
  for (const Table& table : kTables)
    if (supported(table.isa) && !(pairs_are_slow() && !std::strcmp(table.isa, "avx512bf16"))) return &table;
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

int edgesep_sums_bytes(void) { return *chosen->sums_bytes; }

#define EDGESEP_EXPORT(name, type) \
  void edgesep_##name(const type* s, int64_t first, int64_t end) { chosen->name(s, first, end); }
EDGESEP_KERNELS(EDGESEP_EXPORT)

int64_t edgesep_scan_rows(const EdgesepScan* s) { return s->batch * blocks(s->channels); }
int64_t edgesep_conv_norm_rows(const EdgesepConvNorm* s) { return s->batch * edgesep_conv_norm_parts(s); }
int64_t edgesep_conv_rows(const EdgesepConv* s) { return s->batch * blocks(s->channels); }

// The state of every step, and two sums for every step, 16 lanes each.
int64_t edgesep_scan_backward_workspace(const EdgesepScanBackward* s) { return s->length * s->state * 16 * 3; }
}
