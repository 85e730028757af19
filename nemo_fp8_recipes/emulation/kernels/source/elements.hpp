// Element formats: reading fp32, bf16 and fp16, and converting between fp32 and FP8 or FP4 codes.
//
// Everything is branchless integer and fp32 arithmetic, so that compilers vectorise the loops around it. The
// reference is nemo_fp8_recipes/numerics (cast.py, fp4.py): the bits are the same for every input. That needs
// IEEE arithmetic: no -ffast-math, no contraction to fused multiply-add.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#define NEMO_FP8_INLINE __attribute__((always_inline)) inline
// For what has much to do and is called in many places: compiled once.
#define NEMO_FP8_CALLED __attribute__((noinline))

namespace fp8 {

template <class To, class From>
inline To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline float as_float(int32_t bits) { return bit_cast<float>(bits); }
inline int32_t as_bits(float value) { return bit_cast<int32_t>(value); }

constexpr int32_t kMagnitude = 0x7fffffff;
constexpr int32_t kInfinity = 0x7f800000;
constexpr float kFloatMax = 3.4028234663852886e38f;

// 2^exponent as fp32 bits, for normal numbers.
constexpr int32_t power_bits(int exponent) { return (127 + exponent) << 23; }

// What torch calls fp32, bf16 and fp16.
enum InputType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline float from_float16(uint16_t value) {
  const int32_t magnitude = value & 0x7fff;
  const int32_t sign = (int32_t(value) & 0x8000) << 16;
  const int32_t normal = (magnitude << 13) + ((127 - 15) << 23);
  const int32_t special = (magnitude << 13) | kInfinity;
  const int32_t subnormal = as_bits(float(magnitude) * as_float(power_bits(-24)));
  const int32_t finite = magnitude < 0x400 ? subnormal : normal;
  return as_float((magnitude >= 0x7c00 ? special : finite) | sign);
}

// fp32 values of bf16 or fp16 ones.
NEMO_FP8_CALLED inline void widen(const uint16_t* __restrict half, int32_t type, int64_t count,
                                            float* __restrict values) {
  if (type == kBFloat16) {
    for (int64_t i = 0; i < count; ++i) values[i] = as_float(int32_t(half[i]) << 16);
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = from_float16(half[i]);
  }
}

// A contiguous tensor of one of the input types, read as fp32.
struct Input {
  const void* data;
  int32_t type;

  // `count` values from `offset`: in place where they are fp32, else in `buffer`.
  inline const float* read(int64_t offset, int64_t count, float* buffer) const {
    if (type == kFloat32) return static_cast<const float*>(data) + offset;
    copy(offset, count, buffer);
    return buffer;
  }

  NEMO_FP8_INLINE void copy(int64_t offset, int64_t count, float* __restrict buffer) const {
    if (type == kFloat32) {
      std::memcpy(buffer, static_cast<const float*>(data) + offset, size_t(count) * sizeof(float));
    } else {
      widen(static_cast<const uint16_t*>(data) + offset, type, count, buffer);
    }
  }

  // Asks for the lines of `count` values from `offset`.
  inline void prefetch(int64_t offset, int64_t count) const {
    const int64_t size = type == kFloat32 ? 4 : 2;
    for (int64_t at = 0; at < count * size; at += 64) {
      __builtin_prefetch(static_cast<const char*>(data) + offset * size + at);
    }
  }

  // Largest finite value of the type.
  float max() const {
    return type == kFloat32 ? kFloatMax : type == kBFloat16 ? 3.3895313892515355e38f : 65504.0f;
  }
};

// Magnitude of a value as integer bits, NaN as zero: the integer maximum of these is the amax.
inline int32_t magnitude_bits(float value) {
  const int32_t magnitude = as_bits(value) & kMagnitude;
  return magnitude > kInfinity ? 0 : magnitude;
}

// Round to nearest even, saturate, every NaN becomes `NanCode` with no sign.
template <int MantissaBits, int Bias, int32_t MaxBits, int32_t NanCode, int SignShift>
struct Element {
  static constexpr int kShift = 23 - MantissaBits, kSignShift = SignShift;
  static constexpr int32_t kMaxBits = MaxBits, kNanCode = NanCode;
  static constexpr int32_t kSmallestNormal = power_bits(1 - Bias);
  // A normal number's code and this are the upper bits of the fp32 one.
  static constexpr int32_t kBiasInCodes = power_bits(-Bias) >> kShift;
  static constexpr int32_t kLeastNormalCode = 1 << MantissaBits;
  static constexpr int32_t kMaxCode = (MaxBits >> kShift) - kBiasInCodes;

  static inline int32_t encode(float value) {
    const int32_t bits = as_bits(value);
    const int32_t full = bits & kMagnitude;
    const int32_t sign = int32_t(uint32_t(bits) >> SignShift) & (1 << (31 - SignShift));
    const int32_t magnitude = std::min(full, MaxBits);
    // Its binade; everything below the normal numbers has the step of the lowest one.
    const int32_t binade = std::max(magnitude & kInfinity, kSmallestNormal);
    // An fp32 number whose last place is the format's step there: adding it rounds to that step.
    const int32_t rounder = binade + (kShift << 23);
    const int32_t steps = as_bits(as_float(magnitude) + as_float(rounder)) - rounder;
    const int32_t code = ((binade - kSmallestNormal) >> kShift) + steps;
    return full > kInfinity ? NanCode : code | sign;
  }
};

// FP8: the code's sign is in bit 7. FP4: in bit 3.
struct E4M3 : Element<3, 7, 0x43e00000 /* 448 */, 0x7f, 24> {
  static constexpr float max = 448.0f;
  static inline float decode(uint8_t code) {
    const int32_t magnitude = code & 0x7f;
    const int32_t sign = int32_t(code & 0x80) << 24;
    const int32_t normal = (magnitude << 20) + (120 << 23);
    const int32_t subnormal = as_bits(float(magnitude) * as_float(power_bits(-9)));
    const int32_t finite = magnitude < 8 ? subnormal : normal;
    return as_float((magnitude == 0x7f ? 0x7fc00000 : finite) | sign);
  }
};

struct E5M2 : Element<2, 15, 0x47600000 /* 57344 */, 0x7f, 24> {
  static constexpr float max = 57344.0f;
  static inline float decode(uint8_t code) {
    const int32_t magnitude = code & 0x7f;
    const int32_t sign = int32_t(code & 0x80) << 24;
    const int32_t normal = (magnitude << 21) + (112 << 23);
    const int32_t subnormal = as_bits(float(magnitude) * as_float(power_bits(-16)));
    const int32_t special = kInfinity | ((magnitude & 3) << 21);
    const int32_t finite = magnitude < 4 ? subnormal : normal;
    return as_float((magnitude >= 0x7c ? special : finite) | sign);
  }
};

struct E2M1 : Element<1, 1, 0x40c00000 /* 6 */, 0x7, 28> {
  static constexpr float max = 6.0f;
  static inline float decode(uint8_t code) {
    const int32_t magnitude = code & 7;
    const int32_t normal = (magnitude << 22) + power_bits(-1);
    const int32_t subnormal = as_bits(float(magnitude) * 0.5f);
    return as_float((magnitude < 2 ? subnormal : normal) | int32_t(code & 8) << 28);
  }
};

// The scale that an E8M0 code is.
inline float e8m0_value(uint8_t code) {
  if (code == 255) return as_float(0x7fc00000);
  return code == 0 ? as_float(0x00400000) : as_float(int32_t(code) << 23);
}

enum Format : int32_t { kE4M3 = 0, kE5M2 = 1 };

// Calls `use` with the element type that the tag names.
template <class Use>
inline void with_format(int32_t format, Use&& use) {
  if (format == kE4M3) {
    use(E4M3{});
  } else {
    use(E5M2{});
  }
}

}  // namespace fp8
