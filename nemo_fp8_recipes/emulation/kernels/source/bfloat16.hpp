// FP8 codes of bf16 values under one scale.
#pragma once

#include "encode.hpp"

#ifdef NEMO_FP8_AVX512

namespace fp8 {

// codes[i] = encode(x[i] * scale); all whole 64s.
template <class Out>
NEMO_FP8_CALLED int64_t encode_bfloat16(const uint16_t* __restrict x, int64_t count, float scale,
                                        uint8_t* __restrict codes) {
  const __m512 factor = _mm512_set1_ps(scale);
  const __m512i by_words = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    __m512i code[2], high[2];
    bool nan[2];
    for (int half = 0; half < 2; ++half) {
      // A bf16 value is the upper half of an fp32 one.
      const __m512i both = _mm512_loadu_si512(x + i + 32 * half);
      const __m512i even = _mm512_slli_epi32(both, 16);
      const __m512i odd = _mm512_and_si512(both, _mm512_set1_epi32(int32_t(0xffff0000)));
      code[half] = encode_words<Out>(_mm512_mul_ps(_mm512_castsi512_ps(even), factor),
                                     _mm512_mul_ps(_mm512_castsi512_ps(odd), factor), high[half], nan[half]);
    }
    const __m512i bytes = encoded_bytes<Out>(code[0], code[1], high[0], high[1]);
    _mm512_storeu_si512(codes + i, _mm512_permutexvar_epi64(by_words, bytes));
    if (__builtin_expect(nan[0] || nan[1], 0)) {
      alignas(64) float values[64];
      widen(x + i, kBFloat16, 64, values);
      encode_row<Out>(values, 64, scale, codes + i);
    }
  }
  return i;
}

#ifdef __AVX512VBMI__
#define NEMO_FP8_TABLE

// The same with a table. Of a product's significand only a few bits are left, and which they are depends on the seven
// bits of the value's alone: with their 128 outcomes at hand a code is a look-up and an addition.
template <class Out>
class Bfloat16Codes {
 public:
  // Not usable where the scale is no ordinary number.
  explicit Bfloat16Codes(float scale) : scale_(scale) {
    const int32_t exponent = 254 - (as_bits(scale) >> 23);  // of values whose products are from 1 on and below 4
    if (exponent < 1 || exponent > 253) return;
    for (int32_t bits = 0; bits < 128; ++bits) {
      const int32_t code = Out::encode(as_float(exponent << 23 | bits << 16) * scale);
      table_[bits] = uint8_t(code - (exponent << kMantissaBits));
    }
    first_ = first_where([&](int32_t bits) { return product(bits) >= Out::kSmallestNormal; });
    end_ = first_where([&](int32_t bits) { return product(bits) >= Out::kMaxBits + (1 << (Out::kShift - 1)); });
  }

  bool usable() const { return end_ > first_; }

  // codes[i] = encode(x[i] * scale); all whole 64s. Adds to `missed` those in which something could not be looked up.
  NEMO_FP8_CALLED int64_t encode(const uint16_t* __restrict x, int64_t count, uint8_t* __restrict codes,
                                 int64_t& missed) const {
    constexpr int kDrop = 7 - kMantissaBits;
    constexpr __mmask64 kOdd = 0xaaaaaaaaaaaaaaaa;
    alignas(64) uint8_t order[64];
    for (int i = 0; i < 64; ++i) order[i] = uint8_t(i < 32 ? 2 * i : 2 * (i - 32) + 1);
    const __m512i in_order = _mm512_load_si512(order);
    const __m512i low_table = _mm512_load_si512(table_), high_table = _mm512_load_si512(table_ + 64);
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), sign = _mm512_set1_epi8(int8_t(0x80));
    const __m512i exponent = _mm512_set1_epi8(int8_t(uint8_t(0xff << kMantissaBits)));
    const __m512i first = _mm512_set1_epi16(int16_t(first_)), range = _mm512_set1_epi16(int16_t(end_ - first_));
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
      // Bytes of two registers, in turn.
      const __m512i a = _mm512_loadu_si512(x + i), b = _mm512_loadu_si512(x + i + 32);
      const auto bytes = [&](__m512i even, __m512i odd) { return _mm512_mask_blend_epi8(kOdd, even, odd); };
      const __m512i significands = bytes(a, _mm512_slli_epi16(b, 8));
      const __m512i exponents = bytes(_mm512_srli_epi16(a, kDrop), _mm512_slli_epi16(b, 8 - kDrop));
      const __m512i signs = bytes(_mm512_srli_epi16(a, 8), b);
      const __m512i rounded = _mm512_permutex2var_epi8(low_table, significands, high_table);
      const __m512i code = _mm512_add_epi8(_mm512_and_si512(exponents, exponent), rounded);
      const __m512i with_sign = _mm512_ternarylogic_epi32(code, signs, sign, 0xf8);  // a | (b & c)
      _mm512_storeu_si512(codes + i, _mm512_permutexvar_epi8(in_order, with_sign));
      const auto outside = [&](__m512i values) {
        const __m512i above = _mm512_sub_epi16(_mm512_and_si512(values, magnitude), first);
        return _mm512_cmpge_epu16_mask(above, range);
      };
      const __mmask32 a_outside = outside(a), b_outside = outside(b);
      if (!_kortestz_mask32_u8(a_outside, b_outside)) {
        encode_bfloat16<Out>(x + i, 64, scale_, codes + i);
        ++missed;
      }
    }
    return i;
  }

 private:
  static constexpr int kMantissaBits = 23 - Out::kShift;

  int32_t product(int32_t bits) const { return as_bits(as_float(bits << 16) * scale_); }

  // The first magnitude that is as wanted, as bits, of normal numbers and infinity; those after it are too.
  template <class Wanted>
  static int32_t first_where(Wanted&& wanted) {
    int32_t first = 0x0080, end = 0x7f80;
    while (first < end) {
      const int32_t middle = (first + end) / 2;
      wanted(middle) ? end = middle : first = middle + 1;
    }
    return first;
  }

  float scale_;
  int32_t first_ = 0, end_ = 0;  // magnitudes, as bits, whose codes are those of normal numbers
  alignas(64) uint8_t table_[128] = {};
};

#endif

}  // namespace fp8

#endif
