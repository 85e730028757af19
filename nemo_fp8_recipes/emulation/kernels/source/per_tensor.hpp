// Per-tensor FP8: amax, and the cast under a given scale, with the transposed codes on the way.
// Reference: numerics/tensorwise.py, numerics/delayed.py.
#pragma once

#include <atomic>

#include "elements.hpp"
#include "loops.hpp"
#include "rows.hpp"

namespace fp8 {

constexpr int64_t kPiece = 2048;  // elements of a contiguous piece, small enough for the first-level cache
constexpr int64_t kTile = 64;     // rows that are transposed together

inline void raise_to(std::atomic<int32_t>& largest, int32_t candidate) {
  int32_t seen = largest.load();
  while (candidate > seen && !largest.compare_exchange_weak(seen, candidate)) {
  }
}

inline float amax(Input x, int64_t count, int32_t threads) {
  std::atomic<int32_t> largest{0};
  parallel((count + kPiece - 1) / kPiece, threads, [&](int64_t first, int64_t last) {
    raise_to(largest, largest_magnitude(x, first * kPiece, std::min(last * kPiece, count) - first * kPiece));
  });
  return as_float(largest.load());
}

// Codes of `count` values from `offset`; returns their amax where `observe` is set. `far`: the tensor is too large for
// the caches of a core.
template <class Out>
int32_t cast_range(Input x, int64_t offset, int64_t count, float scale, uint8_t* codes, bool observe, bool far) {
  constexpr int64_t kStep = 256, kAhead = 512;
  alignas(64) float buffer[kStep];
  int32_t seen = 0;
  for (int64_t begin = offset; begin < offset + count; begin += kStep) {
    const int64_t length = std::min(kStep, offset + count - begin);
    for (int64_t i = 0; far && i < kStep; i += 16) x.prefetch(begin + kAhead + i);
    const float* values = x.read(begin, length, buffer);
    if (observe) seen = std::max(seen, largest_magnitude(values, length));
    encode_row<Out>(values, length, scale, codes + begin);
  }
  return seen;
}

// Codes of x [m, k] under `scale`; their transpose [k, m] where `transposed` is not null; the amax of x on the
// way where `observe` is set (else 0).
template <class Out>
float cast(Input x, int64_t m, int64_t k, float scale, uint8_t* codes, uint8_t* transposed, bool observe,
           int32_t threads) {
  const bool far = m * k > kFar;
  std::atomic<int32_t> largest{0};
  if (!transposed) {
    const int64_t count = m * k;
    parallel((count + kPiece - 1) / kPiece, threads, [&](int64_t first, int64_t last) {
      const int64_t begin = first * kPiece, end = std::min(last * kPiece, count);
      raise_to(largest, cast_range<Out>(x, begin, end - begin, scale, codes, observe, far));
    });
    return as_float(largest.load());
  }
  parallel((m + kTile - 1) / kTile, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first * kTile; i < std::min(last * kTile, m); i += kTile) {
      const int64_t rows = std::min(kTile, m - i);
      raise_to(largest, cast_range<Out>(x, i * k, rows * k, scale, codes, observe, far));
      for (int64_t j = 0; j < k; j += kTile) {
        transpose(codes + i * k + j, k, rows, std::min(kTile, k - j), transposed + j * m + i, m);
      }
    }
  });
  return as_float(largest.load());
}

}  // namespace fp8
