// What the tests of the core share.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

inline size_t at(int64_t i) { return static_cast<size_t>(i); }

extern "C" {
int edgesep_use(const char* isa);
const char* edgesep_instruction_set(void);
}

// The smallest SNR allowed, in dB: float32 arithmetic over thousands of steps leaves 118 or better.
constexpr double kLimitDb = 110;

void expect(bool good, const std::string& what);  // prints a line, counts failures
double snr_db(const std::vector<float>& got, const std::vector<double>& wanted);
// (taps, channels, outputs) as unfolded_product.h reads it, appended (test_mamba.cpp).
void append_unfolded(const Floats& matrix, int64_t taps, int64_t channels, int64_t outputs, Floats* to);
void units_equal_the_reference();    // test_units.cpp
void streams_equal_the_reference();  // test_streams.cpp: attention, norms of heads, LSTMs, products in eight bits
void windows_equal_the_reference();  // test_streams.cpp
void blocks_equal_the_reference();   // test_mamba.cpp
