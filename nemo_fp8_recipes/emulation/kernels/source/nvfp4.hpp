// NVFP4: E2M1 codes in pairs, an E4M3 scale for 16 of them. Reference: numerics/nvfp4.py, fp4.py.
#pragma once

#include "elements.hpp"
#include "loops.hpp"
#include "rows.hpp"
#include "scale_place.hpp"

namespace fp8 {

constexpr float kSixth = 1.0f / 6.0f;

// `compute_global_encode_scaling_factor_FP4`.
inline float nvfp4_global_scale(float amax) {
  float scale = 2688.0f / amax;
  if (scale > kFloatMax) scale = kFloatMax;
  return amax == 0.0f || scale == 0.0f ? 1.0f : scale;
}

// E4M3 scales of `count` blocks and what their values are multiplied with.
inline void nvfp4_scales(float encode_scale, const int32_t* __restrict amax, int64_t count,
                         float* __restrict multiplier, uint8_t* __restrict kept) {
  const float factor = encode_scale * kSixth, decode_factor = 1.0f / encode_scale;
  for (int64_t b = 0; b < count; ++b) {
    const int32_t code = E4M3::encode(as_float(amax[b]) * factor);
    kept[b] = uint8_t(code);
    const float inverse = 1.0f / (E4M3::decode(uint8_t(code)) * decode_factor);
    multiplier[b] = inverse > kFloatMax ? kFloatMax : inverse;
  }
}

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

#endif

// Codes of `count` values (a multiple of 16) scaled by their block's multiplier, a byte each.
inline void encode_fp4(const float* __restrict x, const float* __restrict multiplier,
                       const uint8_t* __restrict random, int64_t count, uint8_t* __restrict codes) {
  if (!random) {
    encode_blocks<E2M1, 16>(x, count, multiplier, codes);
    return;
  }
  int64_t i = 0;
#ifdef NEMO_FP8_AVX2
  const auto lanes = [&](int64_t at) {
    const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(x + at), _mm256_set1_ps(multiplier[at / 16]));
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
  for (; i < count; ++i) codes[i] = uint8_t(encode_stochastically(x[i] * multiplier[i / 16], random[i]));
}

// Two codes a byte, the first in the low half.
inline void pack_pairs(const uint8_t* __restrict codes, int64_t count, uint8_t* __restrict packed) {
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

// A direction of a matrix [m, k]: blocks of 1x16, or with `square` of 16x16. `amax` has one element, or m with
// `row_scaled`. `random` holds a byte an element for stochastic rounding, or is null. Scales are kept for
// every row.
inline void quantize_nvfp4(Input x, int64_t m, int64_t k, const float* amax, bool row_scaled, bool square,
                           const uint8_t* random, uint8_t* packed, uint8_t* scales, const ScalePlace& place,
                           int32_t threads) {
  constexpr int64_t kBlock = 16;
  const int64_t blocks = k / kBlock;
  parallel((m + kBlock - 1) / kBlock, threads, [&](int64_t first, int64_t last) {
    std::vector<float> buffer(static_cast<size_t>(k)), multiplier(static_cast<size_t>(blocks));
    std::vector<uint8_t> codes(static_cast<size_t>(k)), kept(static_cast<size_t>(blocks));
    std::vector<int32_t> largest(static_cast<size_t>(blocks)), of_row(largest);
    for (int64_t strip = first; strip < last; ++strip) {
      const int64_t begin = strip * kBlock, end = std::min(begin + kBlock, m);
      if (square) {
        std::fill(largest.begin(), largest.end(), 0);
        for (int64_t i = begin; i < end; ++i) {
          block_maxima<kBlock>(x.read(i * k, k, buffer.data()), blocks, of_row.data());
          for (size_t b = 0; b < largest.size(); ++b) largest[b] = std::max(largest[b], of_row[b]);
        }
      }
      for (int64_t i = begin; i < end; ++i) {
        const float* values = x.read(i * k, k, buffer.data());
        if (!square) block_maxima<kBlock>(values, blocks, largest.data());
        if (!square || i == begin) {
          const float encode_scale = nvfp4_global_scale(amax[row_scaled ? i : 0]);
          nvfp4_scales(encode_scale, largest.data(), blocks, multiplier.data(), kept.data());
        }
        for (int64_t b = 0; b < blocks; ++b) scales[place.at(i, b)] = kept[static_cast<size_t>(b)];
        encode_fp4(values, multiplier.data(), random ? random + i * k : nullptr, k, codes.data());
        pack_pairs(codes.data(), k, packed + i * k / 2);
      }
    }
  });
}

// code * block scale of packed codes [m, k / 2] with a scale for every 1x16.
inline void decode_nvfp4(const uint8_t* packed, int64_t m, int64_t k, const uint8_t* scales,
                         const ScalePlace& place, float* out, int32_t threads) {
  static const float values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                   -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
  parallel(m, threads, [&](int64_t first, int64_t last) {
#ifdef NEMO_FP8_AVX2
    const __m256 magnitudes = _mm256_loadu_ps(values);
    const auto decode = [&](__m128i codes, __m256 scale) {
      const __m256i lanes = _mm256_cvtepu8_epi32(codes);
      const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(lanes, _mm256_set1_epi32(8)), 28);
      const __m256 magnitude = _mm256_permutevar8x32_ps(magnitudes, lanes);
      return _mm256_mul_ps(_mm256_or_ps(magnitude, _mm256_castsi256_ps(sign)), scale);
    };
#endif
    for (int64_t i = first; i < last; ++i) {
      for (int64_t b = 0; b < k / 16; ++b) {
        const float scale = E4M3::decode(scales[place.at(i, b)]);
        const uint8_t* pair = packed + (i * k + b * 16) / 2;
        float* value = out + i * k + b * 16;
#ifdef NEMO_FP8_AVX2
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pair));
        const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
        const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
        const __m128i codes = _mm_unpacklo_epi8(low, high);
        _mm256_storeu_ps(value, decode(codes, _mm256_set1_ps(scale)));
        _mm256_storeu_ps(value + 8, decode(_mm_unpackhi_epi64(codes, codes), _mm256_set1_ps(scale)));
#else
        for (int t = 0; t < 8; ++t) {
          value[2 * t] = values[pair[t] & 15] * scale;
          value[2 * t + 1] = values[pair[t] >> 4] * scale;
        }
#endif
      }
    }
  });
}

}  // namespace fp8
