// E2M1 codes in pairs, rounded to nearest or stochastically. Reference: numerics/fp4.py.
#pragma once

#include "encode.hpp"

namespace fp8 {

inline float e2m1_step(float magnitude) {
  return magnitude >= 4.0f ? 2.0f : magnitude >= 2.0f ? 1.0f : 0.5f;
}

// Rounds away from zero with a chance of the distance to the lower neighbour, from eight random bits.
inline int32_t encode_stochastically(float value, uint8_t random) {
  const int32_t bits = as_bits(value);
  const int32_t magnitude_of = bits & kMagnitude;
  const float magnitude = as_float(magnitude_of);
  const float jittered = float(random) * (1.0f / 256.0f) * e2m1_step(magnitude) + magnitude;
  const float step = e2m1_step(jittered);
  // The grid's number below; everything from 6 on, infinity too, is 6.
  const float saturated = jittered < 6.0f ? jittered : 6.0f;
  const float rounded = float(int32_t(saturated / step)) * step;
  const int32_t code = E2M1::encode(rounded < 6.0f ? rounded : 6.0f);
  const int32_t sign = int32_t(uint32_t(bits) >> 28) & 8;
  return magnitude_of > kInfinity ? 7 : code | sign;
}

#ifdef NEMO_FP8_AVX2

// `encode_stochastically` of eight values, a code in each 32-bit lane. The step between neighbours is half of the
// magnitude's binade, which counts from 1 to 4; all products with powers of two are exact.
NEMO_FP8_INLINE __m256i encode_stochastically(__m256 value, __m256i random) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i full = _mm256_and_si256(bits, _mm256_set1_epi32(kMagnitude));
  const __m256i one = _mm256_set1_epi32(power_bits(0)), exponent = _mm256_set1_epi32(kInfinity);
  const __m256i within = _mm256_min_epi32(_mm256_max_epi32(full, one), _mm256_set1_epi32(power_bits(2)));
  const __m256 binade = _mm256_castsi256_ps(_mm256_and_si256(within, exponent));
  const __m256 share = _mm256_mul_ps(_mm256_cvtepi32_ps(random), _mm256_set1_ps(1.0f / 512.0f));
  const __m256 jittered = _mm256_add_ps(_mm256_mul_ps(share, binade), _mm256_castsi256_ps(full));
  const __m256 saturated = _mm256_min_ps(jittered, _mm256_set1_ps(6.0f));
  const __m256i reached =
      _mm256_and_si256(_mm256_max_epi32(_mm256_castps_si256(saturated), one), exponent);  // 1, 2 or 4
  const __m256 steps = _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_set1_epi32(kInfinity), reached));
  const __m256i whole = _mm256_cvttps_epi32(_mm256_mul_ps(saturated, steps));
  const __m256i code = _mm256_add_epi32(whole, _mm256_srli_epi32(_mm256_sub_epi32(reached, one), 22));
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 28), _mm256_set1_epi32(8));
  const __m256i is_nan = _mm256_cmpgt_epi32(full, exponent);
  return _mm256_blendv_epi8(_mm256_or_si256(code, sign), _mm256_set1_epi32(7), is_nan);
}

#ifdef NEMO_FP8_AVX512

// The same of sixteen values, a code in each byte.
NEMO_FP8_INLINE __m128i encode_stochastically(__m512 value, __m512i random) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i full = _mm512_and_si512(bits, _mm512_set1_epi32(kMagnitude));
  const __m512i one = _mm512_set1_epi32(power_bits(0)), exponent = _mm512_set1_epi32(kInfinity);
  const __m512i within = _mm512_min_epi32(_mm512_max_epi32(full, one), _mm512_set1_epi32(power_bits(2)));
  const __m512 binade = _mm512_castsi512_ps(_mm512_and_si512(within, exponent));
  const __m512 share = _mm512_mul_ps(_mm512_cvtepi32_ps(random), _mm512_set1_ps(1.0f / 512.0f));
  const __m512 jittered = _mm512_add_ps(_mm512_mul_ps(share, binade), _mm512_castsi512_ps(full));
  const __m512 saturated = _mm512_min_ps(jittered, _mm512_set1_ps(6.0f));
  const __m512i reached = _mm512_and_si512(_mm512_max_epi32(_mm512_castps_si512(saturated), one), exponent);
  const __m512 steps = _mm512_castsi512_ps(_mm512_sub_epi32(exponent, reached));
  const __m512i whole = _mm512_cvttps_epi32(_mm512_mul_ps(saturated, steps));
  const __m512i code = _mm512_add_epi32(whole, _mm512_srli_epi32(_mm512_sub_epi32(reached, one), 22));
  const __m512i sign = _mm512_srli_epi32(bits, 28);
  const __m512i both = _mm512_ternarylogic_epi32(code, sign, _mm512_set1_epi32(8), 0xf8);  // a | (b & c)
  const __mmask16 nan = _mm512_cmpgt_epi32_mask(full, exponent);
  return _mm512_cvtepi32_epi8(_mm512_mask_mov_epi32(both, nan, _mm512_set1_epi32(7)));
}

#endif

#endif

// Codes of `count` values (a multiple of 16), a byte each: every `Block` of them have one multiplier, 16 along rows
// and 1 across columns. `random` holds a byte for each value, or is null: to nearest.
template <int Block>
NEMO_FP8_INLINE void encode_fp4(const float* __restrict x, const float* __restrict multiplier,
                       const uint8_t* __restrict random, int64_t count, uint8_t* __restrict codes) {
  if (!random) {
    if constexpr (Block == 1) {
      encode_row<E2M1>(x, count, multiplier, codes);
    } else {
      encode_blocks<E2M1, Block>(x, count, multiplier, codes);
    }
    return;
  }
  int64_t i = 0;
#ifdef NEMO_FP8_AVX512
  for (; i + 16 <= count; i += 16) {
    const __m512 scale = Block == 1 ? _mm512_loadu_ps(multiplier + i) : _mm512_set1_ps(multiplier[i / Block]);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(random + i));
    const __m128i sixteen =
        encode_stochastically(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale), _mm512_cvtepu8_epi32(bytes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), sixteen);
  }
#elif defined(NEMO_FP8_AVX2)
  const auto lanes = [&](int64_t at) __attribute__((always_inline)) {
    const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(x + at), Block == 1 ? _mm256_loadu_ps(multiplier + at) : _mm256_set1_ps(multiplier[at / Block]));
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(random + at));
    return encode_stochastically(value, _mm256_cvtepu8_epi32(bytes));
  };
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (; i + 32 <= count; i += 32) {
    const __m256i low = _mm256_packus_epi32(lanes(i), lanes(i + 8));
    const __m256i high = _mm256_packus_epi32(lanes(i + 16), lanes(i + 24));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i),
                        _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
  }
#endif
  for (; i < count; ++i) codes[i] = uint8_t(encode_stochastically(x[i] * multiplier[i / Block], random[i]));
}

// Two codes a byte, the first in the low half.
NEMO_FP8_INLINE void pack_pairs(const uint8_t* __restrict codes, int64_t count, uint8_t* __restrict packed) {
  int64_t i = 0;
#ifdef NEMO_FP8_AVX2
  for (; i + 32 <= count; i += 32) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    const __m256i sums = _mm256_maddubs_epi16(both, _mm256_set1_epi16(0x1001));
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(sums, sums), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), _mm256_castsi256_si128(bytes));
  }
#endif
  for (; i < count; i += 2) packed[i / 2] = uint8_t(codes[i] | codes[i + 1] << 4);
}

}  // namespace fp8
