// The threads that kernels run on, and the version of the interface.
#include <pthread.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "interface.hpp"
#include "loops.hpp"

namespace fp8 {
namespace {

// `GOMP_parallel(function, argument, threads, flags)` of an OpenMP runtime: calls function(argument) on a team
// of threads that it keeps. GNU's, LLVM's and Intel's runtimes all have it.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The team of torch's own runtime, where there is one. Its threads wait for work by spinning for a while: a
// thread of our own beside them would only find the core taken.
std::atomic<Team>& team() {
  static std::atomic<Team> shared{nullptr};
  return shared;
}

void use_team(Team parallel) {
  // A forked child has none of its parent's threads, and OpenMP runtimes wait for them for ever.
  static const int watched = pthread_atfork(nullptr, nullptr, [] { team().store(nullptr); });
  if (watched == 0) team().store(parallel);
}

// A range of work that any number of threads take their next part from.
struct Shared {
  Work work;
  int64_t count, parts;
  std::atomic<int64_t> next{0};

  void run() {
    for (int64_t part = next++; part < parts; part = next++) {
      work(count * part / parts, count * (part + 1) / parts);
    }
  }
};

}  // namespace

void run_parts(int64_t count, int64_t threads, Work work) {
  // Twice as many parts as threads: one that starts late does less.
  Shared shared{work, count, std::min(2 * threads, count)};
  if (const Team run_on_team = team().load()) {
    run_on_team([](void* job) { static_cast<Shared*>(job)->run(); }, &shared, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  try {
    for (int64_t begun = 1; begun < threads; ++begun) others.emplace_back([&] { shared.run(); });
  } catch (const std::system_error&) {
    // No more threads to be had: those that there are do it.
  }
  shared.run();
  for (auto& thread : others) thread.join();
}

}  // namespace fp8

using namespace fp8;

KERNEL int32_t nemo_fp8_interface() { return 6; }

// Run on the threads of the OpenMP runtime whose `GOMP_parallel` this is; null: on new threads.
KERNEL void nemo_fp8_use_team(void* parallel) { use_team(reinterpret_cast<Team>(parallel)); }

KERNEL int32_t nemo_fp8_has_team() { return team().load() != nullptr; }
