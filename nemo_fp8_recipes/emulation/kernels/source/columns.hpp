// The transposed matrix, for NVFP4's columnwise data; with the random Hadamard transform where asked for.
// Reference: numerics/hadamard.py.
#pragma once

#include <atomic>

#include "elements.hpp"
#include "loops.hpp"
#include "per_tensor.hpp"

namespace fp8 {

// Rounded to nearest even; a NaN stays one.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = uint32_t(as_bits(value));
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & kMagnitude) > uint32_t(kInfinity) ? 0x7fc0 : rounded);
}

// Rows whose transposed parts are written one after the other, while their cache lines are still there; and what
// is brought together at once: rows at a distance of a power of two would push each other out of the cache.
constexpr int64_t kStrip = 64, kTogether = 16, kAcross = 64;

// out[j, i] = x[i, j]
template <class Word>
void transpose_words(const Word* x, int64_t m, int64_t k, Word* out, int32_t threads) {
  parallel((m + kStrip - 1) / kStrip, threads, [&](int64_t first, int64_t last) {
    Word tile[kTogether][kAcross];
    for (int64_t strip = first * kStrip; strip < std::min(last * kStrip, m); strip += kStrip) {
      const int64_t end = std::min(strip + kStrip, m);
      for (int64_t j0 = 0; j0 < k; j0 += kAcross) {
        const int64_t columns = std::min(kAcross, k - j0);
        for (int64_t i0 = strip; i0 < end; i0 += kTogether) {
          const int64_t rows = std::min(kTogether, end - i0);
          for (int64_t r = 0; r < rows; ++r) {
            std::memcpy(tile[r], x + (i0 + r) * k + j0, size_t(columns) * sizeof(Word));
          }
          for (int64_t j = 0; j < columns; ++j) {
            Word* target = out + (j0 + j) * m + i0;
            for (int64_t r = 0; r < rows; ++r) target[r] = tile[r][j];
          }
        }
      }
    }
  });
}

// Blocks of 16 down the columns of x [m, k] in bf16, m a multiple of 16: their signs changed where `signs` has a
// bit, transformed, rounded to bf16 and written transposed, [k, m]. Returns the amax of the result.
inline float hadamard_columns(const uint16_t* x, int64_t m, int64_t k, int32_t signs, uint16_t* out,
                              int32_t threads) {
  constexpr int64_t kSize = kTogether, kWidth = kAcross;
  std::atomic<int32_t> largest{0};
  parallel((m + kStrip - 1) / kStrip, threads, [&](int64_t first, int64_t last) {
    alignas(64) float tile[kSize][kWidth];
    alignas(64) uint16_t result[kSize][kWidth];
    int32_t seen = 0;
    for (int64_t strip = first * kStrip; strip < std::min(last * kStrip, m); strip += kStrip) {
      for (int64_t j0 = 0; j0 < k; j0 += kWidth) {
        const int64_t columns = std::min(kWidth, k - j0);
        for (int64_t i0 = strip; i0 < std::min(strip + kStrip, m); i0 += kSize) {
          for (int r = 0; r < kSize; ++r) {
            const uint16_t* row = x + (i0 + r) * k + j0;
            const float factor = signs >> r & 1 ? -0.25f : 0.25f;
            for (int64_t j = 0; j < columns; ++j) tile[r][j] = as_float(int32_t(row[j]) << 16) * factor;
            for (int64_t j = columns; j < kWidth; ++j) tile[r][j] = 0.0f;
          }
          for (int step = 1; step < kSize; step *= 2) {
            for (int r = 0; r < kSize; ++r) {
              if (r & step) continue;
              for (int j = 0; j < kWidth; ++j) {
                const float a = tile[r][j], b = tile[r + step][j];
                tile[r][j] = a + b, tile[r + step][j] = a - b;
              }
            }
          }
          for (int r = 0; r < kSize; ++r) {
            for (int j = 0; j < kWidth; ++j) {
              result[r][j] = to_bfloat16(tile[r][j]);
              seen = std::max(seen, magnitude_bits(as_float(int32_t(result[r][j]) << 16)));
            }
          }
          for (int64_t j = 0; j < columns; ++j) {
            uint16_t* target = out + (j0 + j) * m + i0;
            for (int r = 0; r < kSize; ++r) target[r] = result[r][j];
          }
        }
      }
    }
    raise_to(largest, seen);
  });
  return as_float(largest.load());
}

}  // namespace fp8
