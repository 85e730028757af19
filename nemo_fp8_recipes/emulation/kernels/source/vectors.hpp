// 32-bit values side by side, as many as a register holds, in the vector types that GCC and Clang have for every machine.
#pragma once

#include "elements.hpp"
#include "instructions.hpp"

namespace fp8 {

#ifdef NEMO_FP8_AVX512
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Bytes = uint8_t __attribute__((vector_size(kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));

template <class Vector, class Value>
inline Vector load_lanes(const Value* from) {
  Vector lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

template <class Vector, class Value>
inline void store_lanes(const Vector& lanes, Value* to) {
  std::memcpy(to, &lanes, sizeof(lanes));
}

inline Floats load_bfloat16(const uint16_t* from) {
  alignas(64) int32_t bits[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) bits[lane] = int32_t(from[lane]) << 16;
  return load_lanes<Floats>(bits);
}

// Magnitudes as integer bits, NaN as zero.
inline Ints magnitude_bits(Floats value) {
  const Ints magnitude = Ints(value) & kMagnitude;
  return magnitude > kInfinity ? Ints{} : magnitude;
}

inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

inline Ints smaller(Ints a, Ints b) { return a < b ? a : b; }

inline int32_t largest_lane(Ints lanes) {
  int32_t largest = lanes[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = std::max(largest, int32_t(lanes[lane]));
  return largest;
}

// Rounded to bfloat16, to nearest even, and back; a NaN stays one.
inline Floats round_to_bfloat16(Floats value) {
  const Ints bits = Ints(value);
  const Ints rounded = (bits + 0x7fff + (bits >> 16 & 1)) & int32_t(0xffff0000);
  const Ints quiet = Ints{} + 0x7fc00000;
  return Floats((bits & kMagnitude) > kInfinity ? quiet : rounded);
}

// Halves of the 64-bit products with a factor of 32 bits.
inline void multiply(Words a, uint32_t factor, Words& low, Words& high) {
#ifdef NEMO_FP8_AVX512
  const __m512i all = __m512i(a), by = _mm512_set1_epi32(int32_t(factor));
  const __m512i even = _mm512_mul_epu32(all, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(all, 32), by);
  low = Words(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
  high = Words(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
#elif defined(NEMO_FP8_AVX2)
  const __m256i all = __m256i(a), by = _mm256_set1_epi32(int32_t(factor));
  const __m256i even = _mm256_mul_epu32(all, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(all, 32), by);
  low = Words(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
  high = Words(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t product = uint64_t(a[lane]) * factor;
    low[lane] = uint32_t(product), high[lane] = uint32_t(product >> 32);
  }
#endif
}

// `Element::encode` and `E4M3::decode`.
template <class Out>
inline Ints encode(Floats value) {
  const Ints bits = Ints(value), full = bits & kMagnitude;
  const Ints magnitude = smaller(full, Ints{} + Out::kMaxBits);
  const Ints binade = larger(magnitude & kInfinity, Ints{} + Out::kSmallestNormal);
  const Ints rounder = binade + (Out::kShift << 23);
  const Ints steps = Ints(Floats(magnitude) + Floats(rounder)) - rounder;
  const Ints sign = Ints(Words(bits) >> Out::kSignShift) & (1 << (31 - Out::kSignShift));
  const Ints code = (((binade - Out::kSmallestNormal) >> Out::kShift) + steps) | sign;
  return full > kInfinity ? Ints{} + Out::kNanCode : code;
}

inline Floats decode_e4m3(Ints code) {
  const Ints magnitude = code & 0x7f, sign = (code & 0x80) << 24;
  const Ints normal = (magnitude << 20) + (120 << 23);
  const Ints subnormal = Ints(__builtin_convertvector(magnitude, Floats) * as_float(power_bits(-9)));
  const Ints finite = magnitude < 8 ? subnormal : normal;
  return Floats((magnitude == 0x7f ? Ints{} + 0x7fc00000 : finite) | sign);
}

}  // namespace fp8
