// How long a cache line takes from one core to another and back, in ns: `round_trip FIRST SECOND`, numbers of cores.
// Some 50 where the cores share a cache, some 300 where they do not.
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

namespace {

constexpr int kTurns = 500, kTrials = 50;

void stay_on(int core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(core, &cores);
  if (pthread_setaffinity_np(pthread_self(), sizeof cores, &cores)) std::exit(1);
}

}  // namespace

int main(int count, char** given) {
  if (count != 3) return 2;
  alignas(128) static std::atomic<int> turn{0};
  const int first = std::atoi(given[1]), second = std::atoi(given[2]);
  std::thread other([=] {
    stay_on(second);
    for (int next = 1; next < 2 * kTurns * kTrials; next += 2) {
      while (turn.load(std::memory_order_acquire) != next) {
      }
      turn.store(next + 1, std::memory_order_release);
    }
  });
  stay_on(first);
  double best = 1e9;
  int next = 0;
  for (int trial = 0; trial < kTrials; ++trial) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kTurns; ++i) {
      turn.store(next + 1, std::memory_order_release);
      next += 2;
      while (turn.load(std::memory_order_acquire) != next) {
      }
    }
    const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - begin;
    best = std::min(best, spent.count() / kTurns);
  }
  other.join();
  std::printf("%.0f\n", best);
}
