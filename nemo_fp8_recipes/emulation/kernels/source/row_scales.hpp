// What values are multiplied with: all with one number, each with its own, or every `Block` of them with one.
#pragma once

#include <cstdint>

#include "elements.hpp"
#include "instructions.hpp"

#ifdef NEMO_FP8_AVX2

namespace fp8 {

struct OneScale {
  float scale;
  NEMO_FP8_INLINE __m256 eight(int64_t) const { return _mm256_set1_ps(scale); }
#ifdef NEMO_FP8_AVX512
  NEMO_FP8_INLINE __m512 sixteen(int64_t) const { return _mm512_set1_ps(scale); }
#endif
};

struct OwnScales {
  const float* scale;
  NEMO_FP8_INLINE __m256 eight(int64_t at) const { return _mm256_loadu_ps(scale + at); }
#ifdef NEMO_FP8_AVX512
  NEMO_FP8_INLINE __m512 sixteen(int64_t at) const { return _mm512_loadu_ps(scale + at); }
#endif
};

template <int Block>
struct BlockScales {
  static_assert(Block % 16 == 0, "sixteen values share a scale");
  const float* scale;
  NEMO_FP8_INLINE __m256 eight(int64_t at) const { return _mm256_set1_ps(scale[at / Block]); }
#ifdef NEMO_FP8_AVX512
  NEMO_FP8_INLINE __m512 sixteen(int64_t at) const { return _mm512_set1_ps(scale[at / Block]); }
#endif
};

}  // namespace fp8

#endif
