// NVFP4: E2M1 codes in pairs, an E4M3 scale for 16 of them. Reference: numerics/nvfp4.py, fp4.py.
#pragma once

#include "elements.hpp"
#include "loops.hpp"
#include "rows.hpp"

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

inline void scale_blocks(const float* __restrict x, const float* __restrict multiplier, int64_t blocks,
                         float* __restrict scaled) {
  for (int64_t b = 0; b < blocks; ++b) {
    for (int t = 0; t < 16; ++t) scaled[b * 16 + t] = x[b * 16 + t] * multiplier[b];
  }
}

inline void encode_pairs(const float* __restrict scaled, const uint8_t* __restrict random, int64_t count,
                         uint8_t* __restrict codes, uint8_t* __restrict packed) {
  if (random) {
    for (int64_t t = 0; t < count; ++t) codes[t] = uint8_t(encode_stochastically(scaled[t], random[t]));
  } else {
    encode_row<E2M1>(scaled, count, 1.0f, codes);
  }
  for (int64_t t = 0; t < count / 2; ++t) packed[t] = uint8_t(codes[2 * t] | codes[2 * t + 1] << 4);
}

// A direction of a matrix [m, k]: blocks of 1x16, or with `square` of 16x16. `amax` has one element, or m with
// `row_scaled`. `random` holds a byte an element for stochastic rounding, or is null. Scales are kept for
// every row, in natural order.
inline void quantize_nvfp4(Input x, int64_t m, int64_t k, const float* amax, bool row_scaled, bool square,
                           const uint8_t* random, uint8_t* packed, uint8_t* scales, int64_t scale_stride,
                           int32_t threads) {
  constexpr int64_t kBlock = 16;
  const int64_t blocks = k / kBlock;
  parallel((m + kBlock - 1) / kBlock, threads, [&](int64_t first, int64_t last) {
    std::vector<float> buffer(static_cast<size_t>(k)), scaled(buffer), multiplier(static_cast<size_t>(blocks));
    std::vector<uint8_t> codes(static_cast<size_t>(k));
    std::vector<int32_t> largest(static_cast<size_t>(blocks));
    const auto observe = [&](const float* values, bool restart) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int32_t here = largest_magnitude(values + b * kBlock, kBlock);
        int32_t& kept = largest[static_cast<size_t>(b)];
        kept = restart ? here : std::max(kept, here);
      }
    };
    for (int64_t strip = first; strip < last; ++strip) {
      const int64_t begin = strip * kBlock, end = std::min(begin + kBlock, m);
      if (square) {
        for (int64_t i = begin; i < end; ++i) observe(x.read(i * k, k, buffer.data()), i == begin);
      }
      for (int64_t i = begin; i < end; ++i) {
        const float* values = x.read(i * k, k, buffer.data());
        if (!square) observe(values, true);
        nvfp4_scales(nvfp4_global_scale(amax[row_scaled ? i : 0]), largest.data(), blocks, multiplier.data(),
                     scales + i * scale_stride);
        scale_blocks(values, multiplier.data(), blocks, scaled.data());
        encode_pairs(scaled.data(), random ? random + i * k : nullptr, k, codes.data(), packed + i * k / 2);
      }
    }
  });
}

// code * block scale of packed codes [m, k / 2] with a scale for every 1x16.
inline void decode_nvfp4(const uint8_t* packed, int64_t m, int64_t k, const uint8_t* scales, int64_t scale_stride,
                         float* out, int32_t threads) {
  static const float values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                   -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
  parallel(m, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      for (int64_t b = 0; b < k / 16; ++b) {
        const float scale = E4M3::decode(scales[i * scale_stride + b]);
        const uint8_t* pair = packed + (i * k + b * 16) / 2;
        float* value = out + i * k + b * 16;
        for (int t = 0; t < 8; ++t) {
          value[2 * t] = values[pair[t] & 15] * scale;
          value[2 * t + 1] = values[pair[t] >> 4] * scale;
        }
      }
    }
  });
}

}  // namespace fp8
