// MXFP8.
#include "interface.hpp"
#include "mxfp8.hpp"

using namespace fp8;

namespace {

// Columnwise scales are addressed by (column, block): their rows are the blocks; swizzled they are stored as the
// transposed matrix.
ScalePlace mxfp8_place(bool columnwise, bool swizzled, int64_t stride, int64_t padded_blocks) {
  if (swizzled) return {0, 0, padded_blocks / 4};
  return columnwise ? ScalePlace{1, stride, 0} : row_place(false, stride);
}

}  // namespace

KERNEL void nemo_fp8_mxfp8(const void* x, int32_t input, int64_t m, int64_t k, int32_t format,
                           float reciprocal_of_max, int32_t square, int32_t swizzled, uint8_t* row_codes,
                           uint8_t* row_scales, int64_t row_scale_stride, uint8_t* column_codes,
                           uint8_t* column_scales, int64_t column_scale_rows, int64_t column_scale_stride,
                           int32_t threads) {
  with_format(format, [&](auto out) {
    using Out = decltype(out);
    quantize_mxfp8<Out>(
        {x, input}, m, k, square != 0, reciprocal_of_max,
        {row_codes, row_scales, mxfp8_place(false, swizzled != 0, row_scale_stride, row_scale_stride)},
        {column_codes, column_scales, mxfp8_place(true, swizzled != 0, column_scale_stride, column_scale_rows)},
        threads);
  });
}

KERNEL void nemo_fp8_decode_mxfp8(const uint8_t* codes, int64_t m, int64_t k, int32_t format, int32_t columnwise,
                           int32_t swizzled, const uint8_t* scales, int64_t scale_rows, int64_t scale_stride,
                           float* out, int32_t threads) {
  const ScalePlace place =
      mxfp8_place(columnwise != 0, swizzled != 0, scale_stride, columnwise ? scale_rows : scale_stride);
  const auto scale_of = [&](int64_t row, int64_t block) { return e8m0_value(scales[place.at(row, block)]); };
  with_format(format, [&](auto in) {
    decode_blocks<32, decltype(in)>(codes, m, k, columnwise != 0, false, scale_of, out, threads);
  });
}
