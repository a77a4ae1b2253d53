// What the tests of the core share.
#pragma once
#include <string>
#include <vector>

extern "C" {
int edgesep_use(const char* isa);
const char* edgesep_instruction_set(void);
}

// The smallest SNR allowed, in dB: float32 arithmetic over thousands of steps leaves 118 or better.
constexpr double kLimitDb = 110;

void expect(bool good, const std::string& what);  // prints a line, counts failures
double snr_db(const std::vector<float>& got, const std::vector<double>& wanted);
void units_equal_the_reference();    // test_units.cpp
void streams_equal_the_reference();  // test_streams.cpp
void blocks_equal_the_reference();   // test_mamba.cpp
