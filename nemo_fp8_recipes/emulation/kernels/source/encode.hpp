// The codes of a row of values. Reference: numerics/cast.py, fp4.py.
#pragma once

#include "elements.hpp"
#include "instructions.hpp"
#include "row_scales.hpp"

namespace fp8 {

#ifdef NEMO_FP8_AVX2

// Counts of the format's smallest subnormal in 8 fp32 numbers, up to the smallest normal one, in the lower halves.
template <class Out>
NEMO_FP8_INLINE __m256i subnormal_counts(__m256 value) {
  // Adding a power of two whose last place is the smallest subnormal rounds to a count of those.
  const __m256 least = _mm256_castsi256_ps(_mm256_set1_epi32(Out::kSmallestNormal));
  const __m256 adder = _mm256_castsi256_ps(_mm256_set1_epi32(Out::kSmallestNormal + (Out::kShift << 23)));
  const __m256 full = _mm256_and_ps(value, _mm256_castsi256_ps(_mm256_set1_epi32(kMagnitude)));
  return _mm256_castps_si256(_mm256_add_ps(_mm256_min_ps(full, least), adder));
}

// `Element::encode` of 32 values in four registers, as codes of a byte in order.
//
// The rounding is done on the upper halves of the fp32 numbers: a format that keeps three bits or fewer rounds them
// the same way where their last bit says whether anything was below it. That bit is set too where the last kept one
// is: then adding just less than a half rounds a half to even.
template <class Out>
NEMO_FP8_INLINE __m256i encode_32(const __m256 (&value)[4]) {
  constexpr int kDrop = Out::kShift - 16;  // bits of an upper half that the format has not
  constexpr int16_t kLeast = Out::kSmallestNormal >> 16;
  constexpr int16_t kBias = int16_t((kLeast >> kDrop) - (1 << (7 - kDrop))) << kDrop;
  __m256i code[2], high[2], nan[2];
  for (int half = 0; half < 2; ++half) {
    const __m256i a = _mm256_castps_si256(value[2 * half]), b = _mm256_castps_si256(value[2 * half + 1]);
    const __m256i low = _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
    high[half] = _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa);
    const __m256i up = _mm256_or_si256(low, _mm256_and_si256(high[half], _mm256_set1_epi16(1 << kDrop)));
    const __m256i all = _mm256_or_si256(high[half], _mm256_min_epu16(up, _mm256_set1_epi16(1)));
    const __m256i full = _mm256_and_si256(all, _mm256_set1_epi16(0x7fff));
    const __m256i nearly = _mm256_add_epi16(full, _mm256_set1_epi16((1 << (kDrop - 1)) - 1 - kBias));
    const __m256i counts =
        _mm256_blend_epi16(subnormal_counts<Out>(value[2 * half]),
                           _mm256_slli_epi32(subnormal_counts<Out>(value[2 * half + 1]), 16), 0xaa);
    code[half] = _mm256_max_epi16(_mm256_srai_epi16(nearly, kDrop), counts);
    nan[half] = _mm256_cmpgt_epi16(full, _mm256_set1_epi16(kInfinity >> 16));
  }
  const __m256i codes = _mm256_min_epu8(_mm256_packus_epi16(code[0], code[1]), _mm256_set1_epi8(Out::kMaxCode));
  __m256i signs = _mm256_and_si256(_mm256_packs_epi16(high[0], high[1]), _mm256_set1_epi8(char(0x80)));
  signs = _mm256_srli_epi16(signs, Out::kSignShift - 24);
  const __m256i is_nan = _mm256_packs_epi16(nan[0], nan[1]);
  const __m256i mixed =
      _mm256_blendv_epi8(_mm256_or_si256(codes, signs), _mm256_set1_epi8(Out::kNanCode), is_nan);
  const __m256i together = _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15,  //
                                            0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(mixed, together), order);
}

#ifdef NEMO_FP8_AVX512

// Counts of the format's smallest subnormal in 32 fp32 numbers, up to the smallest normal one, a word each: those of
// `first` in the even ones.
template <class Out>
NEMO_FP8_INLINE __m512i subnormal_words(__m512 first, __m512 second) {
  // Adding a power of two whose last place is the smallest subnormal rounds to a count of those.
  const __m512 least = _mm512_castsi512_ps(_mm512_set1_epi32(Out::kSmallestNormal));
  const __m512 adder = _mm512_castsi512_ps(_mm512_set1_epi32(Out::kSmallestNormal + (Out::kShift << 23)));
  const auto count = [&](__m512 of) __attribute__((always_inline)) {
    return _mm512_castps_si512(_mm512_add_ps(_mm512_min_ps(_mm512_abs_ps(of), least), adder));
  };
  return _mm512_mask_blend_epi16(0xaaaaaaaa, count(first), _mm512_slli_epi32(count(second), 16));
}

// FP8 codes in the way of `encode_32`, a word each, of 32 numbers: those of `first` in the even ones. Without signs;
// beyond the format's largest number they are too large. `high` becomes the numbers' upper halves, of which the
// signs are left. `nan` says whether there are NaN, whose codes are wrong.
template <class Out>
NEMO_FP8_INLINE __m512i encode_words(__m512 first, __m512 second, __m512i& high, bool& nan) {
  constexpr int kDrop = Out::kShift - 16;
  constexpr int16_t kLeast = Out::kSmallestNormal >> 16;
  constexpr int16_t kBias = int16_t((kLeast >> kDrop) - (1 << (7 - kDrop))) << kDrop;
  constexpr __mmask32 kSecond = 0xaaaaaaaa;
  const __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(second);
  high = _mm512_mask_blend_epi16(kSecond, _mm512_srli_epi32(a, 16), b);
  const __m512i low = _mm512_mask_blend_epi16(kSecond, a, _mm512_slli_epi32(b, 16));
  const __m512i up = _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi16(1 << kDrop), 0xf8);  // a | (b & c)
  const __m512i last = _mm512_min_epu16(up, _mm512_set1_epi16(1));
  const __m512i full = _mm512_ternarylogic_epi32(high, last, _mm512_set1_epi16(0x7fff), 0xa8);  // (a | b) & c
  nan = _mm512_cmpgt_epi16_mask(full, _mm512_set1_epi16(kInfinity >> 16)) != 0;
  const __m512i nearly = _mm512_add_epi16(full, _mm512_set1_epi16((1 << (kDrop - 1)) - 1 - kBias));
  return _mm512_max_epi16(_mm512_srai_epi16(nearly, kDrop), subnormal_words<Out>(first, second));
}

// Codes of 64 values, a byte each, from two registers of `encode_words` and the upper halves that it gave.
template <class Out>
NEMO_FP8_INLINE __m512i encoded_bytes(__m512i first, __m512i second, __m512i first_high, __m512i second_high) {
  const __m512i magnitudes = _mm512_min_epu8(_mm512_packus_epi16(first, second), _mm512_set1_epi8(Out::kMaxCode));
  const __m512i signs = _mm512_packs_epi16(first_high, second_high);
  return _mm512_ternarylogic_epi32(magnitudes, signs, _mm512_set1_epi8(int8_t(0x80)), 0xf8);  // a | (b & c)
}

// Codes of 64 values, NaN among them: rare.
template <class Out>
__attribute__((noinline, cold)) void encode_any(const __m512 (&value)[4], uint8_t* codes) {
  for (int half = 0; half < 2; ++half) {
    const __m512 a = value[2 * half], b = value[2 * half + 1];
    const __m256 parts[4] = {_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1), _mm512_castps512_ps256(b),
                             _mm512_extractf32x8_ps(b, 1)};
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 32 * half), encode_32<Out>(parts));
  }
}

// 64 bytes in the order of their values, packed from two registers with 32 of them each in the way of `encode_words`.
NEMO_FP8_INLINE __m512i in_order(__m512i packed) {
#ifdef __AVX512VBMI__
  alignas(64) static constexpr uint8_t kFrom[64] = {
      0, 2, 4, 6, 16, 18, 20, 22, 32, 34, 36, 38, 48, 50, 52, 54, 1, 3, 5, 7, 17, 19, 21, 23, 33, 35, 37, 39, 49, 51, 53, 55,
      8, 10, 12, 14, 24, 26, 28, 30, 40, 42, 44, 46, 56, 58, 60, 62, 9, 11, 13, 15, 25, 27, 29, 31, 41, 43, 45, 47, 57, 59,
      61, 63};
  return _mm512_permutexvar_epi8(_mm512_load_si512(kFrom), packed);
#else
  const __m128i by_source = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const __m512i across = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(across, _mm512_shuffle_epi8(packed, _mm512_broadcast_i32x4(by_source)));
#endif
}

#endif

// Codes of x[i] times its scale; all whole 32s.
template <class Out, class Scales>
NEMO_FP8_INLINE int64_t encode_whole(const float* x, int64_t count, const Scales& scales, uint8_t* codes) {
  int64_t i = 0;
#ifdef NEMO_FP8_AVX512
  constexpr bool kFp8 = Out::kSignShift == 24;
  const auto scaled = [&](int64_t at) __attribute__((always_inline)) {
    return _mm512_mul_ps(_mm512_loadu_ps(x + at), scales.sixteen(at));
  };
  for (; kFp8 && i + 64 <= count; i += 64) {
    const __m512 value[4] = {scaled(i), scaled(i + 16), scaled(i + 32), scaled(i + 48)};
    __m512i high[2];
    bool nan[2];
    const __m512i first = encode_words<Out>(value[0], value[1], high[0], nan[0]);
    const __m512i second = encode_words<Out>(value[2], value[3], high[1], nan[1]);
    _mm512_storeu_si512(codes + i, in_order(encoded_bytes<Out>(first, second, high[0], high[1])));
    if (__builtin_expect(nan[0] || nan[1], 0)) encode_any<Out>(value, codes + i);
  }
#endif
  const auto eight = [&](int64_t at) __attribute__((always_inline)) {
    return _mm256_mul_ps(_mm256_loadu_ps(x + at), scales.eight(at));
  };
  for (; i + 32 <= count; i += 32) {
    const __m256 value[4] = {eight(i), eight(i + 8), eight(i + 16), eight(i + 24)};
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), encode_32<Out>(value));
  }
  return i;
}

#endif

// codes[i] = encode(x[i] * scale[i >> shift]) for those from `i` on.
template <class Out>
NEMO_FP8_REST void encode_rest(const float* __restrict x, int64_t i, int64_t count, const float* __restrict scale,
                               int shift, uint8_t* __restrict codes) {
  for (; i < count; ++i) codes[i] = uint8_t(Out::encode(x[i] * scale[i >> shift]));
}

// codes[i] = encode(x[i] * scale)
template <class Out>
NEMO_FP8_CALLED void encode_row(const float* __restrict x, int64_t count, float scale, uint8_t* __restrict codes) {
  int64_t i = 0;
#ifdef NEMO_FP8_AVX2
  i = encode_whole<Out>(x, count, OneScale{scale}, codes);
#endif
  if (i < count) encode_rest<Out>(x, i, count, &scale, 63, codes);
}

// codes[i] = encode(x[i] * scale[i])
template <class Out>
NEMO_FP8_CALLED void encode_row(const float* __restrict x, int64_t count, const float* __restrict scale,
                       uint8_t* __restrict codes) {
  int64_t i = 0;
#ifdef NEMO_FP8_AVX2
  i = encode_whole<Out>(x, count, OwnScales{scale}, codes);
#endif
  if (i < count) encode_rest<Out>(x, i, count, scale, 0, codes);
}

// codes[i] = encode(x[i] * scale[i / Block]); Block is a power of two.
template <class Out, int Block>
NEMO_FP8_CALLED void encode_blocks(const float* __restrict x, int64_t count, const float* __restrict scale,
                          uint8_t* __restrict codes) {
  int64_t i = 0;
#ifdef NEMO_FP8_AVX2
  i = encode_whole<Out>(x, count, BlockScales<Block>{scale}, codes);
#endif
  if (i < count) encode_rest<Out>(x, i, count, scale, __builtin_ctz(Block), codes);
}

}  // namespace fp8
