// What telemetry measures of quantised tensors, block scales and amax histories.
#include "block_scales.hpp"
#include "history.hpp"
#include "interface.hpp"
#include "measure.hpp"

using namespace fp8;

// x is the elements `first` to `last` of a matrix whose rows have k. `limit` is the bulk's, or null: then `stride`
// and `top` say how it is found in x. `out` has room for what `MEASURED` of telemetry/elements.py lists.
KERNEL void nemo_fp8_measure(const void* x, int32_t input, int64_t k, int64_t first, int64_t last,
                             const uint8_t* codes, int32_t format, const void* scales, int32_t scale_format,
                             int64_t block_rows, int64_t block_columns, int64_t row_stride, int64_t block_stride,
                             int64_t tiles, int32_t swapped, const float* amax, int32_t row_scaled,
                             const float* limit, int64_t stride, int64_t top, double* out, int32_t threads) {
  const ScalePlace place{row_stride, block_stride, tiles};
  const Coded coded{codes,         format,       scales, scale_format, block_rows,
                    block_columns, swapped != 0, place,  amax,         row_scaled != 0};
  const int64_t elements = last - first;
  const int32_t limit_bits = limit ? as_bits(*limit) : bulk_limit({x, input}, elements, stride, top);
  const Measured sums = measure({x, input}, k, {first, last}, coded, limit_bits, threads);
  const double number[] = {double(elements),
                           double(sums.finite - sums.nonzero),
                           double(sums.nonzero - sums.kept),
                           double(sums.saturated),
                           double(elements - sums.finite),
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

// Row `row` of each matrix of `widths` columns, one after the other.
KERNEL void nemo_fp8_stacked_rows(int64_t count, const float* const* matrices, const int64_t* widths, int64_t row,
                                  float* out) {
  for (int64_t i = 0; i < count; out += widths[i++])
    std::copy_n(matrices[i] + row * widths[i], widths[i], out);
}
