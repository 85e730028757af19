// The random Hadamard transform of blocks of 16 down the columns of a matrix. Reference: numerics/hadamard.py.
#pragma once

#include <atomic>

#include "loops.hpp"
#include "per_tensor.hpp"
#include "vectors.hpp"

namespace fp8 {

constexpr int kHadamard = 16;  // size of the transform

// Sums and differences of rows at a distance of `Step`. Unrolled, so that the rows stay in registers.
template <int Step>
NEMO_FP8_INLINE void butterflies(Floats (&row)[kHadamard]) {
#pragma GCC unroll 16
  for (int r = 0; r < kHadamard; ++r) {
    if (r & Step) continue;
    const Floats a = row[r], b = row[r + Step];
    row[r] = a + b, row[r + Step] = a - b;
  }
}

// A vector's columns of sixteen rows: their signs changed where `signs` has a bit, transformed, not rounded.
NEMO_FP8_INLINE void hadamard(Floats (&row)[kHadamard], int32_t signs) {
#pragma GCC unroll 16
  for (int r = 0; r < kHadamard; ++r) row[r] *= signs >> r & 1 ? -0.25f : 0.25f;
  butterflies<1>(row);
  butterflies<2>(row);
  butterflies<4>(row);
  butterflies<8>(row);
}

// What NVFP4 needs to know of x [m, k] in bf16, multiples of 16: its amax, and that of the transformed columns,
// rounded to bf16.
inline void amax_with_hadamard(const uint16_t* x, int64_t m, int64_t k, int32_t signs, float* plain, float* transformed,
                               int32_t threads) {
  std::atomic<int32_t> largest{0}, largest_transformed{0};
  parallel(m / kHadamard, threads, [&](int64_t first, int64_t last) {
    Ints seen{}, seen_transformed{};
    for (int64_t block = first; block < last; ++block) {
      const uint16_t* top = x + block * kHadamard * k;
      for (int64_t j = 0; j < k; j += kLanes) {
        Floats row[kHadamard];
#pragma GCC unroll 16
        for (int r = 0; r < kHadamard; ++r) {
          row[r] = load_bfloat16(top + r * k + j);
          seen = larger(magnitude_bits(row[r]), seen);
        }
        hadamard(row, signs);
#pragma GCC unroll 16
        for (int r = 0; r < kHadamard; ++r) seen_transformed = larger(magnitude_bits(row[r]), seen_transformed);
      }
    }
    raise_to(largest, largest_lane(seen));
    raise_to(largest_transformed, largest_lane(seen_transformed));
  });
  *plain = as_float(largest.load());
  // Rounding keeps the order: the largest one rounded is the largest of the rounded ones.
  *transformed = round_to_bfloat16(Floats{} + as_float(largest_transformed.load()))[0];
}

}  // namespace fp8
