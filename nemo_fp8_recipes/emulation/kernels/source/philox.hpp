// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11), the generator of GPU libraries:
// random bits as a function of a key and a counter, so that any thread can make its own. Reference:
// numerics/philox.py.
#pragma once

#include "vectors.hpp"

namespace fp8 {

constexpr int kCounters = 2 * kLanes;  // made at once: one vector alone would wait for its own products

// The four words of each of `kCounters` counters under one key: word[w][c] is word w of counter c. The upper half of
// the 128-bit counters is zero.
inline void philox(const uint64_t (&counter)[kCounters], uint64_t key, uint32_t (&word)[4][kCounters]) {
  constexpr uint32_t kMultiplier[2] = {0xd2511f53u, 0xcd9e8d57u}, kStep[2] = {0x9e3779b9u, 0xbb67ae85u};
  Words state[2][4];
  for (int half = 0; half < 2; ++half) {
    alignas(64) uint32_t low[kLanes], high[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = uint32_t(counter[half * kLanes + lane]), high[lane] = uint32_t(counter[half * kLanes + lane] >> 32);
    }
    state[half][0] = load_lanes<Words>(low), state[half][1] = load_lanes<Words>(high);
    state[half][2] = state[half][3] = Words{};
  }
  uint32_t key_low = uint32_t(key), key_high = uint32_t(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    for (Words(&of)[4] : state) {
      Words low_0, high_0, low_1, high_1;
      multiply(of[0], kMultiplier[0], low_0, high_0);
      multiply(of[2], kMultiplier[1], low_1, high_1);
      of[0] = high_1 ^ of[1] ^ key_low;
      of[1] = low_1;
      of[2] = high_0 ^ of[3] ^ key_high;
      of[3] = low_0;
    }
    key_low += kStep[0], key_high += kStep[1];
  }
  for (int half = 0; half < 2; ++half) {
    for (int w = 0; w < 4; ++w) store_lanes(state[half][w], word[w] + half * kLanes);
  }
}

}  // namespace fp8
