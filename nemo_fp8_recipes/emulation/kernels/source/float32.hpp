// FP8 codes of fp32 values under one scale, without multiplying them.
#pragma once

#include "encode.hpp"

#ifdef NEMO_FP8_AVX512

namespace fp8 {

// A code is a whole number of steps of the format, and grows with the value: between two powers of two there are as many
// values at which it grows as there are significands, and these are the same ones between any two where products are
// normal numbers. A sixteenth of such a range has one of them at most. So adding a number that depends on the four bits
// after the exponent puts the code into a value's upper bits: it is the next code exactly from that value on.
template <class Out>
class Float32Codes {
 public:
  // Not usable where the scale is no ordinary number.
  explicit Float32Codes(float scale) : scale_(scale) {
    const int32_t exponent = 254 - (as_bits(scale) >> 23);  // of values whose products are from 1 on and below 4
    usable_ = exponent >= 1 && exponent <= 253;
    for (int32_t part = 0; part < 16 && usable_; ++part) {
      const int32_t begin = exponent << 23 | part << kPartShift, last = begin + (1 << kPartShift) - 1;
      const int32_t code = code_of(begin);
      const int32_t addend = code_of(last) == code ? (code << Out::kShift) - begin
                                                   : ((code + 1) << Out::kShift) - first_above(code);
      addend_[part] = addend;
      // Neither an infinity or a NaN may come into the codes' range, nor a subnormal value, nor what falls below zero.
      usable_ = addend <= 0 && addend >= kEndOfCodes - kInfinity;
    }
  }

  bool usable() const { return usable_; }

  // codes[i] = encode(x[i] * scale); all whole 64s. Adds to `missed` those in which some code is not that of a normal
  // number.
  NEMO_FP8_CALLED int64_t encode(const float* __restrict x, int64_t count, uint8_t* __restrict codes,
                                 int64_t& missed) const {
    constexpr __mmask32 kSecond = 0xaaaaaaaa;
    constexpr int kDrop = Out::kShift - 16;  // bits of an upper half below its code
    constexpr int16_t kLeast = int16_t(Out::kLeastNormalCode << kDrop);
    constexpr int16_t kCodes = int16_t((Out::kMaxCode + 1 - Out::kLeastNormalCode) << kDrop);
    const __m512i addends = _mm512_load_si512(addend_), magnitude = _mm512_set1_epi16(0x7fff);
    const __m512i least = _mm512_set1_epi16(kLeast), range = _mm512_set1_epi16(kCodes);
    const auto sum = [&](int64_t at) __attribute__((always_inline)) {
      const __m512i value = _mm512_loadu_si512(x + at);
      const __m512i part = _mm512_srli_epi32(value, kPartShift);  // of its bits four count
      return _mm512_add_epi32(value, _mm512_permutexvar_epi32(part, addends));
    };
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
      __m512i high[2], code[2];
      __mmask32 outside[2];
      for (int half = 0; half < 2; ++half) {
        const __m512i a = sum(i + 32 * half), b = sum(i + 32 * half + 16);
        high[half] = _mm512_mask_blend_epi16(kSecond, _mm512_srli_epi32(a, 16), b);
        const __m512i full = _mm512_and_si512(high[half], magnitude);
        outside[half] = _mm512_cmpge_epu16_mask(_mm512_sub_epi16(full, least), range);
        code[half] = _mm512_srli_epi16(full, kDrop);
      }
      if (__builtin_expect(_kortestz_mask32_u8(outside[0], outside[1]), 1)) {
        const __m512i magnitudes = _mm512_packus_epi16(code[0], code[1]);
        const __m512i signs = _mm512_packs_epi16(high[0], high[1]);
        const __m512i sign = _mm512_set1_epi8(int8_t(0x80));
        const __m512i bytes = _mm512_ternarylogic_epi32(magnitudes, signs, sign, 0xf8);  // a | (b & c)
        _mm512_storeu_si512(codes + i, in_order(bytes));
      } else {
        encode_row<Out>(x + i, 64, scale_, codes + i);
        ++missed;
      }
    }
    return i;
  }

 private:
  static constexpr int kPartShift = 19;
  static constexpr int32_t kEndOfCodes = (Out::kMaxCode + 1) << Out::kShift;

  int32_t code_of(int32_t value) const { return Out::encode(as_float(value) * scale_); }

  // The first value, as bits, whose code is above `code`.
  int32_t first_above(int32_t code) const {
    const float between = as_float(((code + Out::kBiasInCodes) << Out::kShift) + (1 << (Out::kShift - 1)));
    int32_t first = as_bits(float(double(between) / scale_));
    while (code_of(first) <= code) ++first;
    while (code_of(first - 1) > code) --first;
    return first;
  }

  float scale_;
  bool usable_;
  alignas(64) int32_t addend_[16] = {};
};

}  // namespace fp8

#endif
