// NVFP4.
#include "hadamard.hpp"
#include "interface.hpp"
#include "nvfp4.hpp"

using namespace fp8;

// Columnwise data is that of the transposed matrix [k, m]. `each`: one amax for every row of what is quantised.
// `signs` below zero: no Hadamard transform.
KERNEL void nemo_fp8_nvfp4(const void* x, int32_t input, int64_t m, int64_t k, int32_t square, int32_t stochastic,
                           int32_t signs, int32_t each, int32_t swizzled, int32_t divided, uint8_t* row_packed,
                           uint8_t* row_scales, int64_t row_scale_stride, const float* row_amax, uint64_t row_key,
                           uint8_t* column_packed, uint8_t* column_scales, int64_t column_scale_stride,
                           const float* column_amax, uint64_t column_key, int32_t threads) {
  const Nvfp4Options options{square != 0, stochastic != 0, signs >= 0, signs, divided != 0};
  quantize_nvfp4(
      {x, input}, m, k, options,
      {row_packed, row_scales, row_place(swizzled != 0, row_scale_stride), row_amax, each != 0, row_key},
      {column_packed, column_scales, row_place(swizzled != 0, column_scale_stride), column_amax, each != 0, column_key},
      threads);
}

KERNEL void nemo_fp8_amax_with_hadamard(const void* x, int64_t m, int64_t k, int32_t signs, float* plain,
                                        float* transformed, int32_t threads) {
  amax_with_hadamard(static_cast<const uint16_t*>(x), m, k, signs, plain, transformed, threads);
}

KERNEL void nemo_fp8_decode_nvfp4(const uint8_t* packed, int64_t m, int64_t k, int32_t swizzled,
                                  const uint8_t* scales, int64_t scale_stride, float* out, int32_t threads) {
  decode_nvfp4(packed, m, k, scales, row_place(swizzled != 0, scale_stride), out, threads);
}
