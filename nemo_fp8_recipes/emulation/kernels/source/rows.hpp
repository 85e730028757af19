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
    // Adding a power of two whose last place is the smallest subnormal rounds to a count of those.
    const __m256 least = _mm256_castsi256_ps(_mm256_set1_epi32(Out::kSmallestNormal));
    const __m256 adder = _mm256_castsi256_ps(_mm256_set1_epi32(Out::kSmallestNormal + (Out::kShift << 23)));
    const __m256 bits = _mm256_castsi256_ps(_mm256_set1_epi32(kMagnitude));
    const auto count = [&](__m256 of) {
      return _mm256_castps_si256(_mm256_add_ps(_mm256_min_ps(_mm256_and_ps(of, bits), least), adder));
    };
    const __m256i counts = _mm256_blend_epi16(count(value[2 * half]),
                                              _mm256_slli_epi32(count(value[2 * half + 1]), 16), 0xaa);
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
