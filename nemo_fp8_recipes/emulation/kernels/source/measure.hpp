// What quantisation did to a tensor: the sums that telemetry makes its statistics of, in one pass over the tensor
// and its codes, after a look at a sample of it. Reference: nemo_fp8_recipes/telemetry/elements.py.
#pragma once

#include <type_traits>
#include <vector>

#include "decode.hpp"
#include "elements.hpp"
#include "loops.hpp"
#include "scale_place.hpp"

namespace fp8 {

enum CodeFormat : int32_t { kCodesE4M3 = 0, kCodesE5M2 = 1, kCodesE2M1 = 2 };  // E2M1: two a byte
enum ScaleFormat : int32_t { kScalesFloat32 = 0, kScalesE8M0 = 1, kScalesE4M3 = 2 };

// Rounding of scale and inverse scale may add this to the largest magnitude without clipping it.
constexpr float kRounding = 1.0f + 1.0f / (1 << 20);

// A quantised matrix [m, k] as it is stored: codes row by row, one scale for each block.
struct Coded {
  const uint8_t* codes;
  int32_t format;
  const void* scales;
  int32_t scale_format;
  int64_t block_rows, block_columns;
  bool swapped;  // the place of a scale is addressed by (column, block row)
  ScalePlace place;
  const float* amax;  // of scales in E4M3: the tensor's, or one for each row
  bool row_scaled;
};

// What is counted and summed over a tensor, in the order of `MEASURED`.
struct Measured {
  int64_t nonzero, kept, saturated, finite;
  double norm, noise, bulk_norm, bulk_noise;
  int32_t largest;  // as fp32 bits
};

// What a code of row i stands for is multiplied with, for `count` columns from j.
inline void scales_of(const Coded& coded, int64_t i, int64_t j, int64_t count, float* __restrict scale) {
  const int64_t down = i / coded.block_rows;
  const auto at = [&](int64_t across) {
    const int64_t place = coded.swapped ? coded.place.at(across, down) : coded.place.at(down, across);
    if (coded.scale_format == kScalesFloat32) return static_cast<const float*>(coded.scales)[place];
    const uint8_t code = static_cast<const uint8_t*>(coded.scales)[place];
    if (coded.scale_format == kScalesE8M0) return e8m0_value(code);
    return E4M3::decode(code) * coded.amax[coded.row_scaled ? i : 0] * (1.0f / 2688.0f);
  };
  int64_t across = j / coded.block_columns, t = 0;
  const auto fill = [&](auto columns) {  // whole blocks of a number of columns that the compiler knows
    if (coded.block_columns != columns || j % columns) return;
    for (; t + columns <= count; t += columns) std::fill_n(scale + t, int64_t(columns), at(across++));
  };
  fill(std::integral_constant<int64_t, 16>{});
  fill(std::integral_constant<int64_t, 32>{});
  for (int64_t end; t < count; t = end, ++across) {
    end = std::min(count, (across + 1) * coded.block_columns - j);
    std::fill(scale + t, scale + end, at(across));
  }
}

// values[t] = (code of row i, column j + t) * scale[t]
inline void values_of(const Coded& coded, int64_t offset, int64_t count, const float* __restrict scale,
                      float* __restrict values) {
  if (coded.format == kCodesE4M3) {
    decode_row<E4M3>(coded.codes + offset, count, scale, values);
  } else if (coded.format == kCodesE5M2) {
    decode_row<E5M2>(coded.codes + offset, count, scale, values);
  } else {
    const uint8_t* __restrict pairs = coded.codes + offset / 2;
    for (int64_t t = 0; t < count / 2; ++t) {
      values[2 * t] = E2M1::decode(pairs[t]) * scale[2 * t];
      values[2 * t + 1] = E2M1::decode(pairs[t] >> 4) * scale[2 * t + 1];
    }
  }
}

// Counts of `count` elements. Elements that are no numbers become zero, in `x` and `values`; `bulk` is all ones
// where the magnitude is not above `limit_bits`, else zero.
inline void count_elements(float* __restrict x, float* __restrict values, const float* __restrict scale,
                           float max, int32_t limit_bits, int64_t count, int32_t* __restrict bulk,
                           Measured& sums) {
  int32_t nonzero = 0, kept = 0, saturated = 0, finite = 0, largest = sums.largest;
  for (int64_t t = 0; t < count; ++t) {
    const int32_t bits = as_bits(x[t]), code = as_bits(values[t]);
    const int32_t known = -int32_t((bits & kMagnitude) < kInfinity);
    const int32_t magnitude = bits & kMagnitude & known;
    const int32_t value = code & known & -int32_t((code & kMagnitude) < kInfinity);
    nonzero += magnitude != 0;
    kept += (value & kMagnitude) != 0;
    finite -= known;
    saturated += as_float(magnitude) > scale[t] * max * kRounding;
    largest = std::max(largest, magnitude);
    bulk[t] = -int32_t(magnitude <= limit_bits);
    x[t] = as_float(bits & known);
    values[t] = as_float(value);
  }
  sums.nonzero += nonzero;
  sums.kept += kept;
  sums.saturated += saturated;
  sums.finite += finite;
  sums.largest = largest;
}

// Squares of x and of its error, added in fp64: all of them, and those of the bulk.
inline void add_squares(const float* __restrict x, const float* __restrict values,
                        const int32_t* __restrict bulk, int64_t count, Measured& sums) {
  int64_t t = 0;
#ifdef NEMO_FP8_AVX2
  __m256d norm[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
  __m256d noise[2] = {norm[0], norm[0]}, bulk_norm[2] = {norm[0], norm[0]}, bulk_noise[2] = {norm[0], norm[0]};
  for (; t + 8 <= count; t += 8) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = t + 4 * half;
      const __m256d of = _mm256_cvtps_pd(_mm_loadu_ps(x + at));
      const __m256d error = _mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(values + at)), of);
      const __m128i flags = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bulk + at));
      const __m256d mask = _mm256_castsi256_pd(_mm256_cvtepi32_epi64(flags));
      const __m256d square = _mm256_mul_pd(of, of), wrong = _mm256_mul_pd(error, error);
      norm[half] = _mm256_add_pd(norm[half], square);
      noise[half] = _mm256_add_pd(noise[half], wrong);
      bulk_norm[half] = _mm256_add_pd(bulk_norm[half], _mm256_and_pd(square, mask));
      bulk_noise[half] = _mm256_add_pd(bulk_noise[half], _mm256_and_pd(wrong, mask));
    }
  }
  const auto sum = [](const __m256d (&lanes)[2]) {
    alignas(32) double part[4];
    _mm256_store_pd(part, _mm256_add_pd(lanes[0], lanes[1]));
    return (part[0] + part[1]) + (part[2] + part[3]);
  };
  sums.norm += sum(norm);
  sums.noise += sum(noise);
  sums.bulk_norm += sum(bulk_norm);
  sums.bulk_noise += sum(bulk_noise);
#endif
  for (; t < count; ++t) {
    const double of = x[t], error = double(values[t]) - of;
    sums.norm += of * of;
    sums.noise += error * error;
    if (bulk[t]) {
      sums.bulk_norm += of * of;
      sums.bulk_noise += error * error;
    }
  }
}

// The `top`-th largest of `size` numbers, of which `at` gives each.
template <class At>
inline int32_t nth_largest(int64_t size, int64_t top, At at) {
  // Most lie far below: a few of them give a bound that a few in a hundred reach, and only those are kept.
  constexpr int64_t kApart = 64;
  const auto descending = [](int32_t a, int32_t b) { return a > b; };
  int32_t bound = 0;
  if (size >= kApart * kApart) {
    std::vector<int32_t> some;
    for (int64_t i = kApart / 2; i < size; i += kApart) some.push_back(at(i));
    const auto guess = some.begin() + std::min<int64_t>(3 * top / kApart + 4, int64_t(some.size()) - 1);
    std::nth_element(some.begin(), guess, some.end(), descending);
    bound = *guess;
  }
  // Kept for the next call, as fresh memory costs more than what is done in it.
  static thread_local std::vector<int32_t> kept;
  if (int64_t(kept.size()) < size) kept.resize(static_cast<size_t>(size));
  int64_t number = 0;
  const auto keep = [&] {
    number = 0;
    for (int64_t i = 0; i < size; ++i) {
      const int32_t one = at(i);
      kept[static_cast<size_t>(number)] = one;
      number += one >= bound;
    }
  };
  keep();
  if (number < top) {
    bound = 0;
    keep();
  }
  std::nth_element(kept.begin(), kept.begin() + (top - 1), kept.begin() + number, descending);
  return kept[static_cast<size_t>(top - 1)];
}

// The `top`-th largest magnitude of every `stride`-th of `count` elements, as fp32 bits; NaN and Inf are zero.
inline int32_t bulk_limit(Input x, int64_t count, int64_t stride, int64_t top) {
  const auto of = [&](auto bits_at) {
    return nth_largest((count + stride - 1) / stride, top, [&](int64_t i) {
      const int32_t magnitude = bits_at(i * stride) & kMagnitude;
      return magnitude < kInfinity ? magnitude : 0;
    });
  };
  if (x.type == kFloat32) {
    return of([values = static_cast<const float*>(x.data)](int64_t i) { return as_bits(values[i]); });
  }
  const auto* halves = static_cast<const uint16_t*>(x.data);
  if (x.type == kBFloat16) return of([=](int64_t i) { return int32_t(halves[i]) << 16; });
  return of([=](int64_t i) { return as_bits(from_float16(halves[i])); });
}

// A part of a matrix: elements `first` to `last`, counted row by row.
struct Part {
  int64_t first, last;
};

// Compares x, a part of a matrix [m, k], with what its codes stand for; `limit_bits` is the bulk's limit. The sums
// of pieces are added in their order, so that they are the same on any number of threads.
inline Measured measure(Input x, int64_t k, Part part, const Coded& coded, int32_t limit_bits, int32_t threads) {
  constexpr int64_t kColumns = 1024, kElements = 1 << 14;
  const float max = coded.format == kCodesE4M3 ? E4M3::max : coded.format == kCodesE5M2 ? E5M2::max : 6.0f;
  const int64_t top = part.first / k, bottom = (part.last + k - 1) / k;  // the rows that it touches
  const int64_t rows = std::max<int64_t>(1, kElements / k), strips = (bottom - top + rows - 1) / rows;
  std::vector<Measured> parts(static_cast<size_t>(strips));
  parallel(strips, threads, [&](int64_t first, int64_t last) {
    alignas(64) float values[kColumns], scale[kColumns], of[kColumns];
    alignas(64) int32_t bulk[kColumns];
    for (int64_t strip = first; strip < last; ++strip) {
      Measured sums{};
      const int64_t begin = top + strip * rows, end = std::min(begin + rows, bottom);
      for (int64_t j = 0; j < k; j += kColumns) {
        const int64_t columns = std::min(kColumns, k - j);
        for (int64_t i = begin; i < end; ++i) {
          if (i == begin || i % coded.block_rows == 0) scales_of(coded, i, j, columns, scale);
          const int64_t offset = i * k + j, skipped = std::max<int64_t>(0, part.first - offset);
          const int64_t count = std::min(columns, part.last - offset) - skipped;
          if (count <= 0) continue;
          values_of(coded, offset, columns, scale, values);
          x.copy(offset + skipped - part.first, count, of);
          count_elements(of, values + skipped, scale + skipped, max, limit_bits, count, bulk, sums);
          add_squares(of, values + skipped, bulk, count, sums);
        }
      }
      parts[static_cast<size_t>(strip)] = sums;
    }
  });
  Measured all{};
  for (const Measured& one : parts) {
    all.nonzero += one.nonzero;
    all.kept += one.kept;
    all.saturated += one.saturated;
    all.finite += one.finite;
    all.norm += one.norm;
    all.noise += one.noise;
    all.bulk_norm += one.bulk_norm;
    all.bulk_noise += one.bulk_noise;
    all.largest = std::max(all.largest, one.largest);
  }
  return all;
}

}  // namespace fp8
