// The C interface of the kernels: plain pointers and numbers, called through ctypes. Matrices are contiguous
// and row-major; a null pointer means that the output is not asked for.
#include "block_scales.hpp"
#include "blocks.hpp"
#include "elements.hpp"
#include "hadamard.hpp"
#include "history.hpp"
#include "loops.hpp"
#include "measure.hpp"
#include "mxfp8.hpp"
#include "nvfp4.hpp"
#include "per_tensor.hpp"
#include "rows.hpp"

using namespace fp8;

#define KERNEL __attribute__((visibility("default")))

namespace {

// Scales of rows, padded to `stride` columns.
ScalePlace row_place(bool swizzled, int64_t stride) {
  return swizzled ? ScalePlace{0, 0, stride / 4} : ScalePlace{stride, 1, 0};
}

// Columnwise scales are addressed by (column, block): their rows are the blocks; swizzled they are stored as the
// transposed matrix.
ScalePlace mxfp8_place(bool columnwise, bool swizzled, int64_t stride, int64_t padded_blocks) {
  if (swizzled) return {0, 0, padded_blocks / 4};
  return columnwise ? ScalePlace{1, stride, 0} : row_place(false, stride);
}

}  // namespace

extern "C" {

KERNEL int32_t nemo_fp8_interface() { return 6; }

// Run on the threads of the OpenMP runtime whose `GOMP_parallel` this is; null: on new threads.
KERNEL void nemo_fp8_use_team(void* parallel) { use_team(reinterpret_cast<Team>(parallel)); }

KERNEL int32_t nemo_fp8_has_team() { return team().load() != nullptr; }

KERNEL float nemo_fp8_amax(const void* x, int32_t input, int64_t count, int32_t threads) {
  return amax({x, input}, count, threads);
}

KERNEL float nemo_fp8_cast(const void* x, int32_t input, int64_t m, int64_t k, int32_t format, float scale,
                           uint8_t* codes, uint8_t* transposed, int32_t observe, int32_t threads) {
  float result = 0.0f;
  with_format(format, [&](auto out) {
    result = cast<decltype(out)>({x, input}, m, k, scale, codes, transposed, observe != 0, threads);
  });
  return result;
}

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

KERNEL void nemo_fp8_decode(const uint8_t* codes, int64_t count, int32_t format, float* out, int32_t threads) {
  with_format(format, [&](auto in) {
    using In = decltype(in);
    parallel((count + kPiece - 1) / kPiece, threads, [&](int64_t first, int64_t last) {
      const int64_t begin = first * kPiece, end = std::min(last * kPiece, count);
      decode_row<In>(codes + begin, end - begin, out + begin);
    });
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

KERNEL void nemo_fp8_decode_blockwise(const uint8_t* codes, int64_t m, int64_t k, int32_t format, int32_t square,
                               const float* scales, int64_t scale_stride, float* out, int32_t threads) {
  const ScalePlace place = square ? ScalePlace{scale_stride, 1, 0} : ScalePlace{1, scale_stride, 0};
  const auto scale_of = [&](int64_t row, int64_t block) { return scales[place.at(row, block)]; };
  with_format(format, [&](auto in) {
    decode_blocks<128, decltype(in)>(codes, m, k, false, square != 0, scale_of, out, threads);
  });
}

KERNEL void nemo_fp8_decode_nvfp4(const uint8_t* packed, int64_t m, int64_t k, int32_t swizzled,
                                  const uint8_t* scales, int64_t scale_stride, float* out, int32_t threads) {
  decode_nvfp4(packed, m, k, scales, row_place(swizzled != 0, scale_stride), out, threads);
}

// `out` has room for what `MEASURED` of telemetry/elements.py lists.
KERNEL void nemo_fp8_measure(const void* x, int32_t input, int64_t m, int64_t k, const uint8_t* codes,
                             int32_t format, const void* scales, int32_t scale_format, int64_t block_rows,
                             int64_t block_columns, int64_t row_stride, int64_t block_stride, int64_t tiles,
                             int32_t swapped, const float* amax, int32_t row_scaled, int64_t stride, int64_t top,
                             double* out, int32_t threads) {
  const ScalePlace place{row_stride, block_stride, tiles};
  const Coded coded{codes,         format,       scales, scale_format, block_rows,
                    block_columns, swapped != 0, place,  amax,         row_scaled != 0};
  const Measured sums = measure({x, input}, m, k, coded, stride, top, threads);
  const double number[] = {double(m * k),
                           double(sums.finite - sums.nonzero),
                           double(sums.nonzero - sums.kept),
                           double(sums.saturated),
                           double(m * k - sums.finite),
                           sums.norm,
                           sums.noise,
                           sums.bulk_norm,
                           sums.bulk_noise,
                           as_float(sums.largest)};
  std::copy(std::begin(number), std::end(number), out);
}

// `grids` has five numbers a tensor, see `ScaleGrid`; `exact` five doubles a tensor, see `ExactScales`, where the
// scales are fp32. `counts` is added to.
KERNEL void nemo_fp8_scale_counts(int64_t tensors, const void* const* scales, const int64_t* grids,
                                  const int64_t* slots, int32_t fp32, int64_t* counts, double* exact) {
  scale_counts(tensors, scales, reinterpret_cast<const ScaleGrid*>(grids), slots, fp32 != 0, counts,
               reinterpret_cast<ExactScales*>(exact));
}

// Describes the operands `kept` of `counts`; `exact` is null, or describes `tensors` tensors of the operands
// `slots`. `out` has a row of kept numbers for each statistic.
KERNEL void nemo_fp8_scale_distribution(const int64_t* counts, int64_t operands, const double* values,
                                        int64_t largest, int32_t zero_is_empty, const int64_t* percentiles,
                                        int64_t percentile_count, const double* exact, int64_t tensors,
                                        const int64_t* slots, const double* blocks, const int64_t* kept,
                                        int64_t kept_count, float* out) {
  std::vector<ExactScales> described(exact ? operands : 0);
  for (int64_t tensor = 0; exact && tensor < tensors; ++tensor)
    described[slots[tensor]].add(reinterpret_cast<const ExactScales*>(exact)[tensor]);
  for (int64_t i = 0; i < kept_count; ++i) {
    const int64_t operand = kept[i];
    describe_scales(counts + operand * kCodes, {values, largest, zero_is_empty != 0}, percentiles,
                    percentile_count, exact ? &described[operand] : nullptr, blocks[operand], out + i, kept_count);
  }
}

// `widths` says how many slots each history has; `oldest` and `last` have a number for each slot of all of them.
// `out` has `length` numbers for each of `slots`.
KERNEL void nemo_fp8_history_windows(int64_t modules, const float* const* histories, const int64_t* widths,
                                     int64_t length, const float* oldest, const float* last, int64_t count,
                                     const int64_t* slots, float* out) {
  history_windows(modules, histories, widths, length, oldest, last, count, slots, out);
}

}  // extern "C"
