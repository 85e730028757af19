// Largest magnitudes: of a tensor, of a row's blocks, and of columns. A NaN is passed over.
#pragma once

#include <algorithm>

#include "elements.hpp"
#include "instructions.hpp"

namespace fp8 {

#ifdef NEMO_FP8_AVX2

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
NEMO_FP8_CALLED inline int32_t largest_magnitude(const float* x, int64_t count) {
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

#ifdef NEMO_FP8_AVX2

// Raises lanes to the magnitudes of 32 bytes of a tensor, NaN passed over.
struct LargestFloats {
  using Value = float;
  __m256 seen = _mm256_setzero_ps();
  NEMO_FP8_INLINE void see(const float* x) { seen = larger(_mm256_loadu_ps(x), seen); }
  int32_t bits() const { return largest_lane(seen); }
  static int32_t bits(float value) { return magnitude_bits(value); }
};

template <class To32>
struct LargestHalves {
  using Value = uint16_t;
  __m256i seen = _mm256_setzero_si256();
  NEMO_FP8_INLINE void see(const uint16_t* x) {
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    const __m256i full = _mm256_and_si256(value, _mm256_set1_epi16(0x7fff));
    const __m256i nan = _mm256_cmpgt_epi16(full, _mm256_set1_epi16(To32::kHalfInfinity));
    seen = _mm256_max_epi16(seen, _mm256_andnot_si256(nan, full));
  }
  int32_t bits() const {
    alignas(32) uint16_t lane[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), seen);
    return as_bits(To32::value(*std::max_element(lane, lane + 16)));
  }
  static int32_t bits(uint16_t half) { return magnitude_bits(To32::value(half)); }
};

struct FromBFloat16 {
  static constexpr int16_t kHalfInfinity = 0x7f80;
  static float value(uint16_t half) { return as_float(int32_t(half) << 16); }
};

struct FromFloat16 {
  static constexpr int16_t kHalfInfinity = 0x7c00;
  static float value(uint16_t half) { return from_float16(half); }
};

// Largest magnitude of a piece of a tensor as integer bits, NaN passed over. It is read in four places at once: a core
// that reads in one waits for the memory at every page.
template <class Lanes>
inline int32_t largest_of_streams(const typename Lanes::Value* x, int64_t count) {
  constexpr int64_t kHalf = 32 / sizeof(*x), kLine = 2 * kHalf, kAhead = 32 * kLine, kStreams = 4;
  Lanes lanes[kStreams];
  const int64_t stream = count / (kStreams * kLine) * kLine;
  for (int64_t i = 0; i < stream; i += kLine) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const auto* line = x + s * stream + i;
      __builtin_prefetch(line + kAhead);
      lanes[s].see(line);
      lanes[s].see(line + kHalf);
    }
  }
  int64_t i = kStreams * stream;
  for (; i + kHalf <= count; i += kHalf) lanes[0].see(x + i);
  int32_t largest = 0;
  for (const Lanes& each : lanes) largest = std::max(largest, each.bits());
  for (; i < count; ++i) largest = std::max(largest, Lanes::bits(x[i]));
  return largest;
}

#endif

// Largest magnitude of `count` values of x from `offset`, as fp32 bits, NaN passed over.
inline int32_t largest_magnitude(const Input& x, int64_t offset, int64_t count) {
#ifdef NEMO_FP8_AVX2
  if (x.type == kFloat32) {
    return largest_of_streams<LargestFloats>(static_cast<const float*>(x.data) + offset, count);
  }
  const auto* halves = static_cast<const uint16_t*>(x.data) + offset;
  if (x.type == kBFloat16) return largest_of_streams<LargestHalves<FromBFloat16>>(halves, count);
  return largest_of_streams<LargestHalves<FromFloat16>>(halves, count);
#else
  constexpr int64_t kPiece = 2048;
  alignas(64) float buffer[kPiece];
  int32_t seen = 0;
  for (int64_t i = 0; i < count; i += kPiece) {
    const int64_t length = std::min(kPiece, count - i);
    seen = std::max(seen, largest_magnitude(x.read(offset + i, length, buffer), length));
  }
  return seen;
#endif
}

// largest[b] = largest magnitude of x[b * Block] and the Block - 1 values after it; Block is a multiple of 8.
template <int Block>
inline void block_maxima(const float* __restrict x, int64_t blocks, int32_t* __restrict largest) {
  int64_t b = 0;
#ifdef NEMO_FP8_AVX2
  const auto lanes = [](const float* block) __attribute__((always_inline)) {
    __m256 seen = _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int t = 0; t < Block; t += 8) seen = larger(_mm256_loadu_ps(block + t), seen);
    return seen;
  };
  for (; b + 8 <= blocks; b += 8, x += 8 * Block) {
    // Eight at once: halves of two blocks side by side, then their lanes.
    __m256 pair[4], four[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256 one = lanes(x + i * Block), other = lanes(x + (i + 4) * Block);
      pair[i] = _mm256_max_ps(_mm256_permute2f128_ps(one, other, 0x20), _mm256_permute2f128_ps(one, other, 0x31));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      four[i] = _mm256_max_ps(_mm256_unpacklo_ps(pair[i], pair[i + 2]), _mm256_unpackhi_ps(pair[i], pair[i + 2]));
    }
    const __m256 all = _mm256_max_ps(_mm256_unpacklo_ps(four[0], four[1]), _mm256_unpackhi_ps(four[0], four[1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(largest + b), _mm256_castps_si256(all));
  }
  for (; b < blocks; ++b, x += Block) largest[b] = largest_lane(lanes(x));
#else
  for (; b < blocks; ++b, x += Block) {
    int32_t magnitude = 0;
    for (int t = 0; t < Block; ++t) magnitude = std::max(magnitude, magnitude_bits(x[t]));
    largest[b] = magnitude;
  }
#endif
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

}  // namespace fp8
