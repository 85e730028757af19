// What is done to a row of values: its largest magnitude, and its codes. Written out for AVX2, 32 values at a
// time; elsewhere (and with NEMO_FP8_PORTABLE) the compiler vectorises. Both are the same arithmetic.
#pragma once

#include "elements.hpp"

#if defined(__AVX2__) && !defined(NEMO_FP8_PORTABLE)
#define NEMO_FP8_AVX2
#include <immintrin.h>
#endif

namespace fp8 {

#ifdef NEMO_FP8_AVX2

// `Element::encode` of eight values, a code in each 32-bit lane.
template <class Out>
inline __m256i encode_lanes(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i full = _mm256_and_si256(bits, _mm256_set1_epi32(kMagnitude));
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, Out::kSignShift),
                                        _mm256_set1_epi32(1 << (31 - Out::kSignShift)));
  const __m256i magnitude = _mm256_min_epi32(full, _mm256_set1_epi32(Out::kMaxBits));
  const __m256i binade = _mm256_max_epi32(_mm256_and_si256(magnitude, _mm256_set1_epi32(kInfinity)),
                                          _mm256_set1_epi32(Out::kSmallestNormal));
  const __m256i rounder = _mm256_add_epi32(binade, _mm256_set1_epi32(Out::kShift << 23));
  const __m256i rounded = _mm256_castps_si256(
      _mm256_add_ps(_mm256_castsi256_ps(magnitude), _mm256_castsi256_ps(rounder)));
  const __m256i steps = _mm256_sub_epi32(rounded, rounder);
  const __m256i below =
      _mm256_srli_epi32(_mm256_sub_epi32(binade, _mm256_set1_epi32(Out::kSmallestNormal)), Out::kShift);
  const __m256i code = _mm256_or_si256(_mm256_add_epi32(below, steps), sign);
  const __m256i is_nan = _mm256_cmpgt_epi32(full, _mm256_set1_epi32(kInfinity));
  return _mm256_blendv_epi8(code, _mm256_set1_epi32(Out::kNanCode), is_nan);
}

// 32 lanes to 32 bytes, in order.
inline void pack_lanes(__m256i a, __m256i b, __m256i c, __m256i d, uint8_t* out) {
  const __m256i mixed = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(mixed, order));
}

// The larger magnitude in each lane; a NaN in `value` is passed over, because the instruction then gives its
// second operand.
inline __m256 larger(__m256 value, __m256 seen) {
  return _mm256_max_ps(_mm256_and_ps(value, _mm256_castsi256_ps(_mm256_set1_epi32(kMagnitude))), seen);
}

inline int32_t largest_lane(__m256 lanes) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return as_bits(_mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half))));
}

#endif

// Largest magnitude as integer bits, NaN passed over.
inline int32_t largest_magnitude(const float* x, int64_t count) {
  int64_t i = 0;
  int32_t largest = 0;
#ifdef NEMO_FP8_AVX2
  if (count >= 32) {
    __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
    for (; i + 32 <= count; i += 32) {
      a = larger(_mm256_loadu_ps(x + i), a);
      b = larger(_mm256_loadu_ps(x + i + 8), b);
      c = larger(_mm256_loadu_ps(x + i + 16), c);
      d = larger(_mm256_loadu_ps(x + i + 24), d);
    }
    largest = largest_lane(_mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d)));
  }
#endif
  for (; i < count; ++i) largest = std::max(largest, magnitude_bits(x[i]));
  return largest;
}

// Raises `down[i]` to the magnitude of x[i], and gives the largest magnitude of each `Block` values. `count` is a
// multiple of Block, Block one of 8.
template <int Block>
inline void observe_row(const float* __restrict x, int64_t count, int32_t* __restrict down,
                        int32_t* __restrict along) {
  for (int64_t begin = 0; begin < count; begin += Block) {
#ifdef NEMO_FP8_AVX2
    __m256 seen = _mm256_setzero_ps();
    for (int t = 0; t < Block; t += 8) {
      const __m256 value = _mm256_loadu_ps(x + begin + t);
      float* above = reinterpret_cast<float*>(down + begin + t);
      _mm256_storeu_ps(above, larger(value, _mm256_loadu_ps(above)));
      seen = larger(value, seen);
    }
    *along++ = largest_lane(seen);
#else
    int32_t magnitude[Block], largest = 0;
    for (int t = 0; t < Block; ++t) magnitude[t] = magnitude_bits(x[begin + t]);
    for (int t = 0; t < Block; ++t) down[begin + t] = std::max(down[begin + t], magnitude[t]);
    for (int t = 0; t < Block; ++t) largest = std::max(largest, magnitude[t]);
    *along++ = largest;
#endif
  }
}

// codes[i] = encode(x[i] * scale)
template <class Out>
inline void encode_row(const float* __restrict x, int64_t count, float scale, uint8_t* __restrict codes) {
  int64_t i = 0;
#ifdef NEMO_FP8_AVX2
  const __m256 factor = _mm256_set1_ps(scale);
  const auto lanes = [&](int64_t at) { return encode_lanes<Out>(_mm256_mul_ps(_mm256_loadu_ps(x + at), factor)); };
  for (; i + 32 <= count; i += 32) {
    pack_lanes(lanes(i), lanes(i + 8), lanes(i + 16), lanes(i + 24), codes + i);
  }
#endif
  for (; i < count; ++i) codes[i] = uint8_t(Out::encode(x[i] * scale));
}

// codes[i] = encode(x[i] * scale[i])
template <class Out>
inline void encode_row(const float* __restrict x, int64_t count, const float* __restrict scale,
                       uint8_t* __restrict codes) {
  int64_t i = 0;
#ifdef NEMO_FP8_AVX2
  const auto lanes = [&](int64_t at) {
    return encode_lanes<Out>(_mm256_mul_ps(_mm256_loadu_ps(x + at), _mm256_loadu_ps(scale + at)));
  };
  for (; i + 32 <= count; i += 32) {
    pack_lanes(lanes(i), lanes(i + 8), lanes(i + 16), lanes(i + 24), codes + i);
  }
#endif
  for (; i < count; ++i) codes[i] = uint8_t(Out::encode(x[i] * scale[i]));
}

}  // namespace fp8
