// FP8 block scaling.
#include "blocks.hpp"
#include "interface.hpp"

using namespace fp8;

// Rowwise scales are stored [ceil(k / 128), row_scale_stride] in 1D and [ceil(m / 128), row_scale_stride] in
// 2D; columnwise codes are [k, m] and their scales those of that matrix.
KERNEL void nemo_fp8_blockwise(const void* x, int32_t input, int64_t m, int64_t k, int32_t format, float epsilon,
                               int32_t power_of_two, int32_t square, uint8_t* row_codes, float* row_scales,
                               int64_t row_scale_stride, uint8_t* column_codes, float* column_scales,
                               int64_t column_scale_stride, int32_t threads) {
  const ScalePlace rows = square ? ScalePlace{row_scale_stride, 1, 0} : ScalePlace{1, row_scale_stride, 0};
  const ScalePlace columns =
      square ? ScalePlace{column_scale_stride, 1, 0} : ScalePlace{1, column_scale_stride, 0};
  const Input in{x, input};
  with_format(format, [&](auto out) {
    using Out = decltype(out);
    quantize_blocks<128, 128, true, Out>(in, m, k, square != 0,
                                         Quotient<Out>{epsilon, in.max(), power_of_two != 0},
                                         {row_codes, row_scales, rows}, {column_codes, column_scales, columns},
                                         threads);
  });
}

KERNEL void nemo_fp8_decode_blockwise(const uint8_t* codes, int64_t m, int64_t k, int32_t format, int32_t square,
                               const float* scales, int64_t scale_stride, float* out, int32_t threads) {
  const ScalePlace place = square ? ScalePlace{scale_stride, 1, 0} : ScalePlace{1, scale_stride, 0};
  const auto scale_of = [&](int64_t row, int64_t block) { return scales[place.at(row, block)]; };
  with_format(format, [&](auto in) {
    decode_blocks<128, decltype(in)>(codes, m, k, false, square != 0, scale_of, out, threads);
  });
}
