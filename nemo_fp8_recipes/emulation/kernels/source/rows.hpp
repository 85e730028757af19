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

// `encode_32` where some of the numbers become subnormal: rare in FP8, so it is not written out in every loop.
template <class Out>
__attribute__((noinline, cold)) __m256i encode_32_with_subnormals(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 value[4] = {a, b, c, d};
  bool odd;
  return encode_32<Out, true>(value, odd);
}

#ifdef NEMO_FP8_AVX512

// FP8 codes of 32 values in the way of `encode_32`, a code in each word, those of `first` in the even ones. `special`
// says whether there are numbers that become subnormal, or NaN, whose codes are wrong.
template <class Out>
NEMO_FP8_INLINE __m512i encode_words(__m512 first, __m512 second, bool& special) {
  constexpr int kDrop = Out::kShift - 16;
  constexpr int16_t kMax = Out::kMaxBits >> 16, kLeast = Out::kSmallestNormal >> 16;
  constexpr int16_t kBias = int16_t((kLeast >> kDrop) - (1 << (7 - kDrop))) << kDrop;
  constexpr int16_t kHalfOfSubnormal = kLeast - ((8 - kDrop) << 7);
  constexpr __mmask32 kSecond = 0xaaaaaaaa;
  const __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(second);
  const __m512i high = _mm512_mask_blend_epi16(kSecond, _mm512_srli_epi32(a, 16), b);
  const __m512i low = _mm512_mask_blend_epi16(kSecond, a, _mm512_slli_epi32(b, 16));
  const __m512i odd_low = _mm512_min_epu16(low, _mm512_set1_epi16(1));
  const __m512i full = _mm512_ternarylogic_epi32(high, odd_low, _mm512_set1_epi16(0x7fff), 0xa8);  // (a | b) & c
  const __m512i magnitude = _mm512_min_epi16(full, _mm512_set1_epi16(kMax));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(magnitude, kDrop), _mm512_set1_epi16(1));
  const __m512i nearly = _mm512_add_epi16(magnitude, _mm512_set1_epi16((1 << (kDrop - 1)) - 1 - kBias));
  const __m512i rounded = _mm512_srai_epi16(_mm512_add_epi16(nearly, odd), kDrop);
  const __m512i code = _mm512_max_epi16(rounded, _mm512_setzero_si512());
  const __mmask32 nan = _mm512_cmpgt_epi16_mask(full, _mm512_set1_epi16(kInfinity >> 16));
  const __m512i above = _mm512_sub_epi16(full, _mm512_set1_epi16(kHalfOfSubnormal + 1));
  const __mmask32 small = _mm512_cmple_epu16_mask(above, _mm512_set1_epi16(kLeast - kHalfOfSubnormal - 2));
  special = !_kortestz_mask32_u8(nan, small);
  const __m512i sign = _mm512_srli_epi16(high, 8);
  return _mm512_ternarylogic_epi32(code, sign, _mm512_set1_epi16(0x80), 0xf8);  // a | (b & c)
}

// 64 bytes in the order of their values, packed from two registers with 32 of them each in the way of `encode_words`.
NEMO_FP8_INLINE __m512i in_order(__m512i packed) {
  const __m128i by_source = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const __m512i across = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(across, _mm512_shuffle_epi8(packed, _mm512_broadcast_i32x4(by_source)));
}

#endif

// What values are multiplied with: all with one number, each with its own, or every `Block` of them with one.
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

// Codes of x[i] times its scale; all whole 32s.
template <class Out, class Scales>
NEMO_FP8_INLINE int64_t encode_whole(const float* x, int64_t count, const Scales& scales, uint8_t* codes) {
  constexpr bool kFp8 = Out::kSignShift == 24;
  int64_t i = 0;
  const auto scaled = [&](int64_t at) __attribute__((always_inline)) {
    return _mm256_mul_ps(_mm256_loadu_ps(x + at), scales.eight(at));
  };
  const auto with_subnormals = [&](int64_t at) __attribute__((always_inline)) {
    const __m256i result =
        encode_32_with_subnormals<Out>(scaled(at), scaled(at + 8), scaled(at + 16), scaled(at + 24));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + at), result);
  };
#ifdef NEMO_FP8_AVX512
  const auto wide = [&](int64_t at) __attribute__((always_inline)) {
    return _mm512_mul_ps(_mm512_loadu_ps(x + at), scales.sixteen(at));
  };
  for (; kFp8 && i + 64 <= count; i += 64) {
    bool special[2];
    const __m512i first = encode_words<Out>(wide(i), wide(i + 16), special[0]);
    const __m512i second = encode_words<Out>(wide(i + 32), wide(i + 48), special[1]);
    _mm512_storeu_si512(codes + i, in_order(_mm512_packus_epi16(first, second)));
    if (__builtin_expect(special[0], 0)) with_subnormals(i);
    if (__builtin_expect(special[1], 0)) with_subnormals(i + 32);
  }
#endif
  for (; i + 32 <= count; i += 32) {
    const __m256 value[4] = {scaled(i), scaled(i + 8), scaled(i + 16), scaled(i + 24)};
    // FP8 has few subnormal numbers, FP4 nothing else below 1.
    bool subnormals = false;
    const __m256i result = encode_32<Out, !kFp8>(value, subnormals);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), result);
    if (kFp8 && __builtin_expect(subnormals, 0)) with_subnormals(i);
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
