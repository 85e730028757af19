// What is done to a row of values: its largest magnitude, its codes, and back. Written out for AVX2, 32 values at a
// time; elsewhere (and with NEMO_FP8_PORTABLE) the compiler vectorises. Both are the same arithmetic.
#pragma once

#include "elements.hpp"

#if defined(__AVX2__) && defined(__F16C__) && !defined(NEMO_FP8_PORTABLE)
#define NEMO_FP8_AVX2
#include <immintrin.h>
#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    !defined(NEMO_FP8_NO_AVX512)
#define NEMO_FP8_AVX512
#endif
#endif

// What loops written out for AVX2 leave over: compiled once, and called. Elsewhere it is the loop.
#ifdef NEMO_FP8_AVX2
#define NEMO_FP8_REST NEMO_FP8_CALLED
#else
#define NEMO_FP8_REST inline
#endif

namespace fp8 {

#ifdef NEMO_FP8_AVX2

#ifdef NEMO_FP8_AVX512

// Places of the lower or upper halves of 32 words.
struct Halves {
  int16_t place[32];
};
constexpr Halves every_other_half(int16_t first) {
  Halves halves{};
  for (int16_t i = 0; i < 32; ++i) halves.place[i] = int16_t(2 * i + first);
  return halves;
}

#endif

// `Element::encode` of 32 values in four registers, as codes of a byte in order.
//
// The rounding is done on the upper halves of the fp32 numbers, whose last bit is set where the lower half is
// not zero: a format that keeps three bits or fewer rounds them the same way. `kSubnormals` off leaves wrong the
// codes of numbers between half the smallest subnormal and the smallest normal number, and `odd` says whether
// there are any.
template <class Out, bool kSubnormals>
NEMO_FP8_INLINE __m256i encode_32(const __m256 (&value)[4], bool& odd) {
  constexpr int kDrop = Out::kShift - 16;  // bits of an upper half that the format has not
  constexpr int16_t kMax = Out::kMaxBits >> 16, kLeast = Out::kSmallestNormal >> 16;
  constexpr int16_t kBias = int16_t((kLeast >> kDrop) - (1 << (7 - kDrop))) << kDrop;
  constexpr int16_t kHalfOfSubnormal = kLeast - ((8 - kDrop) << 7);
  __m256i code[2], sign[2], nan[2], outside[2];
  for (int half = 0; half < 2; ++half) {
    const __m256i a = _mm256_castps_si256(value[2 * half]), b = _mm256_castps_si256(value[2 * half + 1]);
    const __m256i low = _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
    const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa);
    const __m256i all = _mm256_or_si256(high, _mm256_min_epu16(low, _mm256_set1_epi16(1)));
    const __m256i full = _mm256_and_si256(all, _mm256_set1_epi16(0x7fff));
    const __m256i magnitude = _mm256_min_epi16(full, _mm256_set1_epi16(kMax));
    const __m256i odd_code = _mm256_and_si256(_mm256_srli_epi16(magnitude, kDrop), _mm256_set1_epi16(1));
    const __m256i nearly = _mm256_add_epi16(magnitude, _mm256_set1_epi16((1 << (kDrop - 1)) - 1 - kBias));
    code[half] = _mm256_srai_epi16(_mm256_add_epi16(nearly, odd_code), kDrop);
    if (kSubnormals) {
      // Adding a power of two whose last place is the smallest subnormal rounds to a count of those.
      const __m256 least = _mm256_castsi256_ps(_mm256_set1_epi32(Out::kSmallestNormal));
      const __m256 adder = _mm256_castsi256_ps(_mm256_set1_epi32(Out::kSmallestNormal + (Out::kShift << 23)));
      const __m256 bits = _mm256_castsi256_ps(_mm256_set1_epi32(kMagnitude));
      const auto count = [&](__m256 of) {
        return _mm256_castps_si256(_mm256_add_ps(_mm256_min_ps(_mm256_and_ps(of, bits), least), adder));
      };
      const __m256i counts = _mm256_blend_epi16(count(value[2 * half]),
                                                _mm256_slli_epi32(count(value[2 * half + 1]), 16), 0xaa);
      code[half] = _mm256_max_epi16(code[half], counts);
    } else {
      outside[half] = _mm256_sub_epi16(full, _mm256_set1_epi16(kHalfOfSubnormal + 1));
    }
    sign[half] = all;
    nan[half] = _mm256_cmpgt_epi16(full, _mm256_set1_epi16(kInfinity >> 16));
  }
  if (!kSubnormals) {
    const __m256i nearest = _mm256_min_epu16(outside[0], outside[1]);
    const __m256i last = _mm256_set1_epi16(kLeast - kHalfOfSubnormal - 2);
    odd = _mm256_movemask_epi8(_mm256_cmpeq_epi16(_mm256_min_epu16(nearest, last), nearest)) != 0;
  }
  // Packing saturates: what is below zero there has the code 0.
  const __m256i codes = _mm256_packus_epi16(code[0], code[1]);
  __m256i signs = _mm256_and_si256(_mm256_packs_epi16(sign[0], sign[1]), _mm256_set1_epi8(char(0x80)));
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

// FP8 codes of 32 values, in the way of `encode_32` and with all of them in one register. `outside` says whether there
// are numbers that become subnormal, whose codes are wrong.
template <class Out>
NEMO_FP8_INLINE __m256i encode_32_wide(__m512 first, __m512 second, bool& outside) {
  constexpr int kDrop = Out::kShift - 16;
  constexpr int16_t kMax = Out::kMaxBits >> 16, kLeast = Out::kSmallestNormal >> 16;
  constexpr int16_t kBias = int16_t((kLeast >> kDrop) - (1 << (7 - kDrop))) << kDrop;
  constexpr int16_t kHalfOfSubnormal = kLeast - ((8 - kDrop) << 7);
  alignas(64) static constexpr Halves kUpper = every_other_half(1), kLower = every_other_half(0);
  const __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(second);
  const __m512i low = _mm512_permutex2var_epi16(a, _mm512_load_si512(&kLower), b);
  const __m512i high = _mm512_permutex2var_epi16(a, _mm512_load_si512(&kUpper), b);
  const __m512i all = _mm512_or_si512(high, _mm512_min_epu16(low, _mm512_set1_epi16(1)));
  const __m512i full = _mm512_and_si512(all, _mm512_set1_epi16(0x7fff));
  const __m512i magnitude = _mm512_min_epi16(full, _mm512_set1_epi16(kMax));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(magnitude, kDrop), _mm512_set1_epi16(1));
  const __m512i nearly = _mm512_add_epi16(magnitude, _mm512_set1_epi16((1 << (kDrop - 1)) - 1 - kBias));
  const __m512i rounded = _mm512_srai_epi16(_mm512_add_epi16(nearly, odd), kDrop);
  const __m512i code = _mm512_max_epi16(rounded, _mm512_setzero_si512());
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi16(all, 8), _mm512_set1_epi16(0x80));
  const __mmask32 nan = _mm512_cmpgt_epi16_mask(full, _mm512_set1_epi16(kInfinity >> 16));
  const __m512i above = _mm512_sub_epi16(full, _mm512_set1_epi16(kHalfOfSubnormal + 1));
  outside = _mm512_cmple_epu16_mask(above, _mm512_set1_epi16(kLeast - kHalfOfSubnormal - 2)) != 0;
  return _mm512_cvtepi16_epi8(
      _mm512_mask_mov_epi16(_mm512_or_si512(code, sign), nan, _mm512_set1_epi16(Out::kNanCode)));
}

#endif

// `encode_32` where some of the numbers become subnormal: rare in FP8, so it is not written out in every loop.
template <class Out>
__attribute__((noinline, cold)) __m256i encode_32_with_subnormals(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 value[4] = {a, b, c, d};
  bool odd;
  return encode_32<Out, true>(value, odd);
}

// FP8 codes of x[i] * scale_at(i), where `scale_at` gives the factors of eight values; all whole 32s.
template <class Out, class ScaleAt>
NEMO_FP8_INLINE int64_t encode_whole(const float* x, int64_t count, ScaleAt scale_at, uint8_t* codes) {
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const auto scaled = [&](int64_t at) __attribute__((always_inline)) {
      return _mm256_mul_ps(_mm256_loadu_ps(x + at), scale_at(at));
    };
    __m256i result;
    if (Out::kSignShift != 24) {  // FP4 has nothing but subnormal numbers below 1
      const __m256 value[4] = {scaled(i), scaled(i + 8), scaled(i + 16), scaled(i + 24)};
      bool odd;
      result = encode_32<Out, true>(value, odd);
    } else {
      bool subnormals;
#ifdef NEMO_FP8_AVX512
      const auto wide = [&](int64_t at) __attribute__((always_inline)) {
        const __m512 scale = _mm512_insertf32x8(_mm512_castps256_ps512(scale_at(at)), scale_at(at + 8), 1);
        return _mm512_mul_ps(_mm512_loadu_ps(x + at), scale);
      };
      result = encode_32_wide<Out>(wide(i), wide(i + 16), subnormals);
#else
      const __m256 value[4] = {scaled(i), scaled(i + 8), scaled(i + 16), scaled(i + 24)};
      result = encode_32<Out, false>(value, subnormals);
#endif
      if (__builtin_expect(subnormals, 0)) {
        result = encode_32_with_subnormals<Out>(scaled(i), scaled(i + 8), scaled(i + 16), scaled(i + 24));
      }
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), result);
  }
  return i;
}

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

// largest[b] = largest magnitude of x[b * Block] and the Block - 1 values after it; Block is a multiple of 8.
template <int Block>
inline void block_maxima(const float* __restrict x, int64_t blocks, int32_t* __restrict largest) {
  for (int64_t b = 0; b < blocks; ++b, x += Block) {
#ifdef NEMO_FP8_AVX2
    __m256 seen = _mm256_setzero_ps();
    for (int t = 0; t < Block; t += 8) seen = larger(_mm256_loadu_ps(x + t), seen);
    largest[b] = largest_lane(seen);
#else
    int32_t magnitude = 0;
    for (int t = 0; t < Block; ++t) magnitude = std::max(magnitude, magnitude_bits(x[t]));
    largest[b] = magnitude;
#endif
  }
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
  const __m256 factor = _mm256_set1_ps(scale);
  i = encode_whole<Out>(x, count, [&](int64_t) { return factor; }, codes);
#endif
  if (i < count) encode_rest<Out>(x, i, count, &scale, 63, codes);
}

// codes[i] = encode(x[i] * scale[i])
template <class Out>
NEMO_FP8_CALLED void encode_row(const float* __restrict x, int64_t count, const float* __restrict scale,
                       uint8_t* __restrict codes) {
  int64_t i = 0;
#ifdef NEMO_FP8_AVX2
  i = encode_whole<Out>(x, count, [&](int64_t at) { return _mm256_loadu_ps(scale + at); }, codes);
#endif
  if (i < count) encode_rest<Out>(x, i, count, scale, 0, codes);
}

// codes[i] = encode(x[i] * scale[i / Block]); Block is a power of two.
template <class Out, int Block>
NEMO_FP8_CALLED void encode_blocks(const float* __restrict x, int64_t count, const float* __restrict scale,
                          uint8_t* __restrict codes) {
  int64_t i = 0;
#ifdef NEMO_FP8_AVX2
  i = encode_whole<Out>(x, count, [&](int64_t at) { return _mm256_set1_ps(scale[at / Block]); }, codes);
#endif
  if (i < count) encode_rest<Out>(x, i, count, scale, __builtin_ctz(Block), codes);
}

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
#ifdef NEMO_FP8_AVX2
  for (; i + 16 <= count; i += 16) {
    const DecodeLanes<In> lanes(codes + i);
    _mm256_storeu_ps(values + i, lanes.low);
    _mm256_storeu_ps(values + i + 8, lanes.high);
  }
#endif
  constexpr float kOne = 1.0f;
  if (i < count) decode_rest<In>(codes, i, count, &kOne, 63, values);
}

// values[i] = decode(codes[i]) * scale[i]
template <class In>
NEMO_FP8_CALLED void decode_row(const uint8_t* __restrict codes, int64_t count, const float* __restrict scale,
                       float* __restrict values) {
  int64_t i = 0;
#ifdef NEMO_FP8_AVX2
  for (; i + 16 <= count; i += 16) {
    const DecodeLanes<In> lanes(codes + i);
    _mm256_storeu_ps(values + i, _mm256_mul_ps(lanes.low, _mm256_loadu_ps(scale + i)));
    _mm256_storeu_ps(values + i + 8, _mm256_mul_ps(lanes.high, _mm256_loadu_ps(scale + i + 8)));
  }
#endif
  if (i < count) decode_rest<In>(codes, i, count, scale, 0, values);
}

// values[i] = decode(codes[i]) * scale[i / Block]; Block is a power of two.
template <class In, int Block>
NEMO_FP8_CALLED void decode_row_blocks(const uint8_t* __restrict codes, int64_t count, const float* __restrict scale,
                              float* __restrict values) {
  int64_t i = 0;
#ifdef NEMO_FP8_AVX2
  for (; i + 16 <= count; i += 16) {
    const DecodeLanes<In> lanes(codes + i);
    const __m256 factor = _mm256_set1_ps(scale[i / Block]);
    _mm256_storeu_ps(values + i, _mm256_mul_ps(lanes.low, factor));
    _mm256_storeu_ps(values + i + 8, _mm256_mul_ps(lanes.high, factor));
  }
#endif
  if (i < count) decode_rest<In>(codes, i, count, scale, __builtin_ctz(Block), values);
}

}  // namespace fp8
