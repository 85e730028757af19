// The values of a row of codes. Reference: numerics/cast.py.
#pragma once

#include "elements.hpp"
#include "instructions.hpp"
#include "row_scales.hpp"

namespace fp8 {

#ifdef NEMO_FP8_AVX2

// The values of sixteen FP8 codes.
template <class In>
struct DecodeLanes {
  __m256 low, high;

  NEMO_FP8_INLINE explicit DecodeLanes(const uint8_t* codes) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    if (In::kShift == 21) {  // E5M2 is the upper half of fp16
      take(_mm256_slli_epi16(wide, 8));
      return;
    }
    // E4M3 shifted is the fp16 number 2^-8 times as large. One added to the magnitude of NaN alone carries into
    // bit 7, which becomes the bit that fp16's exponent lacks.
    const __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
    const __m256i top = _mm256_set1_epi16(0x80);
    const __m256i carry = _mm256_and_si256(_mm256_add_epi16(magnitude, _mm256_set1_epi16(1)), top);
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, top), 8);
    take(_mm256_or_si256(_mm256_slli_epi16(_mm256_or_si256(magnitude, carry), 7), sign));
    low = _mm256_mul_ps(low, _mm256_set1_ps(256.0f));
    high = _mm256_mul_ps(high, _mm256_set1_ps(256.0f));
  }

  NEMO_FP8_INLINE void take(__m256i halves) {
    low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    high = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  }
};

#ifdef NEMO_FP8_AVX512

// The values of 32 FP8 codes.
template <class In>
struct DecodeWide {
  __m512 low, high;

  NEMO_FP8_INLINE explicit DecodeWide(const uint8_t* codes) {
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    if (In::kShift == 21) {
      take(_mm512_slli_epi16(wide, 8));
      return;
    }
    // As in `DecodeLanes`: sign and magnitude in their places, and where NaN carries into bit 14 it is set.
    const __m512i placed = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(int16_t(0xbf80)));
    const __m512i carried = _mm512_add_epi16(placed, _mm512_set1_epi16(0x80));
    take(_mm512_ternarylogic_epi32(placed, carried, _mm512_set1_epi16(0x4000), 0xf8));  // a | (b & c)
    low = _mm512_mul_ps(low, _mm512_set1_ps(256.0f));
    high = _mm512_mul_ps(high, _mm512_set1_ps(256.0f));
  }

  NEMO_FP8_INLINE void take(__m512i halves) {
    low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
  }
};

#endif

// values[i] = decode(codes[i]) times its scale; all whole 16s.
template <class In, class Scales>
NEMO_FP8_INLINE int64_t decode_whole(const uint8_t* codes, int64_t count, const Scales& scales, float* values) {
  int64_t i = 0;
#ifdef NEMO_FP8_AVX512
  for (; i + 32 <= count; i += 32) {
    const DecodeWide<In> lanes(codes + i);
    _mm512_storeu_ps(values + i, _mm512_mul_ps(lanes.low, scales.sixteen(i)));
    _mm512_storeu_ps(values + i + 16, _mm512_mul_ps(lanes.high, scales.sixteen(i + 16)));
  }
#endif
  for (; i + 16 <= count; i += 16) {
    const DecodeLanes<In> lanes(codes + i);
    _mm256_storeu_ps(values + i, _mm256_mul_ps(lanes.low, scales.eight(i)));
    _mm256_storeu_ps(values + i + 8, _mm256_mul_ps(lanes.high, scales.eight(i + 8)));
  }
  return i;
}

#endif

// values[i] = decode(codes[i]) * scale[i >> shift] for those from `i` on.
template <class In>
NEMO_FP8_REST void decode_rest(const uint8_t* __restrict codes, int64_t i, int64_t count,
                               const float* __restrict scale, int shift, float* __restrict values) {
  for (; i < count; ++i) values[i] = In::decode(codes[i]) * scale[i >> shift];
}

// values[i] = decode(codes[i])
template <class In>
NEMO_FP8_CALLED void decode_row(const uint8_t* __restrict codes, int64_t count, float* __restrict values) {
  int64_t i = 0;
  constexpr float kOne = 1.0f;
#ifdef NEMO_FP8_AVX2
  i = decode_whole<In>(codes, count, OneScale{kOne}, values);
#endif
  if (i < count) decode_rest<In>(codes, i, count, &kOne, 63, values);
}

// values[i] = decode(codes[i]) * scale[i]
template <class In>
NEMO_FP8_CALLED void decode_row(const uint8_t* __restrict codes, int64_t count, const float* __restrict scale,
                                float* __restrict values) {
  int64_t i = 0;
#ifdef NEMO_FP8_AVX2
  i = decode_whole<In>(codes, count, OwnScales{scale}, values);
#endif
  if (i < count) decode_rest<In>(codes, i, count, scale, 0, values);
}

// values[i] = decode(codes[i]) * scale[i / Block]; Block is a power of two.
template <class In, int Block>
NEMO_FP8_CALLED void decode_row_blocks(const uint8_t* __restrict codes, int64_t count, const float* __restrict scale,
                                       float* __restrict values) {
  int64_t i = 0;
#ifdef NEMO_FP8_AVX2
  i = decode_whole<In>(codes, count, BlockScales<Block>{scale}, values);
#endif
  if (i < count) decode_rest<In>(codes, i, count, scale, __builtin_ctz(Block), values);
}

}  // namespace fp8
