// Block scaling: MXFP8 (blocks of 32, E8M0 scales) and FP8 block scaling (128, fp32 scales). The matrix is read
// once for all directions asked for: a tile is brought into a small buffer, its row and column maxima are taken
// on the way, and each direction is encoded from the buffer.
// Reference: numerics/blocks.py, mxfp8.py, blockwise.py, e8m0.py, scale.py.
#pragma once

#include <vector>

#include "decode.hpp"
#include "elements.hpp"
#include "encode.hpp"
#include "largest.hpp"
#include "loops.hpp"
#include "scale_place.hpp"

namespace fp8 {

// The E8M0 rule: amax * fp32(1 / fp8_max), rounded up to a power of two.
template <class Out>
struct PowerOfTwoUp {
  using Kept = uint8_t;
  struct Result {
    float multiplier;
    uint8_t kept;
  };
  float reciprocal_of_max;

  static float multiplier(int32_t exponent) {
    return exponent == 254 ? as_float(0x00400000) : as_float((254 - exponent) << 23);
  }
  Result operator()(int32_t amax) const {
    const int32_t wanted = as_bits(as_float(amax) * reciprocal_of_max);
    int32_t exponent = std::min((wanted + 0x007fffff) >> 23, 254);
    if (wanted <= 0x00400000) exponent = 0;
    return {multiplier(exponent), uint8_t(exponent)};
  }
};

// The fp32 rule: fp8_max / max(amax, epsilon), optionally rounded down to a power of two.
template <class Out>
struct Quotient {
  using Kept = float;
  struct Result {
    float multiplier;
    float kept;
  };
  float epsilon, overflow_value;
  bool power_of_two;

  Result operator()(int32_t amax) const {
    float floored = as_float(amax);
    if (epsilon > 0.0f && floored < epsilon) floored = epsilon;
    float scale = 1.0f;
    if (floored > 0.0f && floored < as_float(kInfinity)) {
      scale = Out::max / floored;
      if (as_bits(scale) == kInfinity) scale = overflow_value;
      if (power_of_two) scale = as_float(as_bits(scale) & int32_t(0xff800000));
    }
    return {scale, 1.0f / scale};
  }
};

// Codes and scales of one direction; codes null: not asked for.
template <class Kept>
struct Direction {
  uint8_t* codes;
  Kept* scales;
  ScalePlace place;
};

// Scales of `count` blocks at once: branchless, so that it is vectorised.
template <class Rule>
inline void apply_rule(const Rule& rule, const int32_t* __restrict amax, int64_t count,
                       float* __restrict multiplier, typename Rule::Kept* __restrict kept) {
  for (int64_t i = 0; i < count; ++i) {
    const auto scale = rule(amax[i]);
    multiplier[i] = scale.multiplier;
    kept[i] = scale.kept;
  }
}

// Rows alone: one row after the other, in pieces that stay in the first-level cache. `far`: the matrix is too large
// for the caches of a core.
template <int Block, class Out, class Rule>
void quantize_rows(Input x, int64_t k, int64_t first, int64_t last, bool far, const Rule& rule,
                   const Direction<typename Rule::Kept>& out) {
  constexpr int64_t kPiece = 2048, kBlocks = kPiece / Block, kAhead = 256;
  alignas(64) float buffer[kPiece];
  alignas(64) int32_t largest[kBlocks];
  alignas(64) float multiplier[kBlocks];
  alignas(64) typename Rule::Kept kept[kBlocks];
  for (int64_t i = first; i < last; ++i) {
    for (int64_t j = 0; j < k; j += kPiece) {
      const int64_t length = std::min(kPiece, k - j), whole = length / Block, rest = length % Block;
      const int64_t blocks = whole + (rest != 0);
      const float* values = x.read(i * k + j, length, buffer);
      uint8_t* codes = out.codes + i * k + j;
      block_maxima<Block>(values, whole, largest);
      if (rest) largest[whole] = largest_magnitude(values + whole * Block, rest);
      apply_rule(rule, largest, blocks, multiplier, kept);
      for (int64_t c = 0; c < length; c += kAhead) {
        // The next piece, while this one keeps the arithmetic busy.
        if (far) x.prefetch(i * k + j + kPiece + c, kAhead);
        encode_blocks<Out, Block>(values + c, std::min(kAhead, length - c), multiplier + c / Block, codes + c);
      }
      for (int64_t b = 0; b < blocks; ++b) out.scales[out.place.at(i, j / Block + b)] = kept[b];
    }
  }
}

// A tile of `Block` rows and `Width` columns (a multiple of Block) and what is made of it.
template <int Block, int Width, bool TransposeColumns, class Out, class Rule>
struct Tiles {
  using Kept = typename Rule::Kept;
  static constexpr int kBlocks = Width / Block;

  Input x;
  int64_t m, k;
  bool square;
  Rule rule;
  Direction<Kept> rowwise, columnwise;

  alignas(64) float tile[Block][Width];
  alignas(64) int32_t column_max[Width];
  alignas(64) int32_t row_max[Block][kBlocks];
  alignas(64) float row_multiplier[Block][kBlocks];
  alignas(64) Kept row_kept[Block][kBlocks];
  alignas(64) float column_multiplier[Width];
  alignas(64) Kept column_kept[Width];
  alignas(64) uint8_t codes[Block][Width];

  void set(Input of, int64_t rows, int64_t columns, bool in_squares, const Rule& by, const Direction<Kept>& along,
           const Direction<Kept>& down) {
    x = of, m = rows, k = columns, square = in_squares, rule = by, rowwise = along, columnwise = down;
  }

  // Row block `number` of the matrix, all columns.
  void strip(int64_t number) {
    for (int64_t j0 = 0; j0 < k; j0 += Width) tile_at(number, j0);
  }

  void tile_at(int64_t number, int64_t j0) {
    const int64_t i0 = number * Block, rows = std::min<int64_t>(Block, m - i0);
    const int64_t columns = std::min<int64_t>(Width, k - j0);
    bring(i0, rows, j0, columns);
    if (square) {
      encode_square(number, i0, rows, j0, columns);
    } else {
      if (rowwise.codes) encode_rows(i0, rows, j0, columns);
      if (columnwise.codes) encode_columns(number, i0, rows, j0, columns);
    }
  }

  void bring(int64_t i0, int64_t rows, int64_t j0, int64_t columns) {
    std::fill(column_max, column_max + Width, 0);
    for (int64_t i = 0; i < rows; ++i) {
      float* row = tile[i];
      // The next tile's part of the row: too short a run for the hardware to see it coming.
      x.prefetch((i0 + i) * k + j0 + Width, std::min<int64_t>(Width, k - j0 - Width));
      x.copy((i0 + i) * k + j0, columns, row);
      std::fill(row + columns, row + Width, 0.0f);
      observe_row<Block>(row, Width, column_max, row_max[i]);
    }
  }

  void encode_rows(int64_t i0, int64_t rows, int64_t j0, int64_t columns) {
    apply_rule(rule, row_max[0], rows * kBlocks, row_multiplier[0], row_kept[0]);
    for (int64_t i = 0; i < rows; ++i) {
      for (int b = 0; b * Block < columns; ++b) {
        rowwise.scales[rowwise.place.at(i0 + i, j0 / Block + b)] = row_kept[i][b];
      }
      encode_blocks<Out, Block>(tile[i], columns, row_multiplier[i], rowwise.codes + (i0 + i) * k + j0);
    }
  }

  void encode_columns(int64_t number, int64_t i0, int64_t rows, int64_t j0, int64_t columns) {
    apply_rule(rule, column_max, Width, column_multiplier, column_kept);
    for (int64_t j = 0; j < columns; ++j) {
      columnwise.scales[columnwise.place.at(j0 + j, number)] = column_kept[j];
    }
    for (int64_t i = 0; i < rows; ++i) {
      uint8_t* out = TransposeColumns ? codes[i] : columnwise.codes + (i0 + i) * k + j0;
      encode_row<Out>(tile[i], columns, column_multiplier, out);
    }
    if (TransposeColumns) {
      transpose(codes[0], Width, rows, columns, columnwise.codes + j0 * m + i0, m);
    }
  }

  // One scale for Block x Block values: the codes of both directions are the same.
  void encode_square(int64_t number, int64_t i0, int64_t rows, int64_t j0, int64_t columns) {
    for (int b = 0; b * Block < columns; ++b) {
      int32_t largest = 0;
      for (int64_t i = 0; i < rows; ++i) largest = std::max(largest, row_max[i][b]);
      const auto scale = rule(largest);
      const int64_t width = std::min<int64_t>(Block, columns - b * Block);
      const int64_t block = j0 / Block + b;
      for (int64_t i = 0; i < rows; ++i) {
        encode_row<Out>(tile[i] + b * Block, width, scale.multiplier, codes[i] + b * Block);
        if (rowwise.codes) {
          std::memcpy(rowwise.codes + (i0 + i) * k + j0 + b * Block, codes[i] + b * Block, size_t(width));
        }
        if (columnwise.codes && !TransposeColumns) {
          std::memcpy(columnwise.codes + (i0 + i) * k + j0 + b * Block, codes[i] + b * Block, size_t(width));
        }
      }
      keep_square(scale.kept, number, block, i0, rows, j0 + b * Block, width);
    }
    if (columnwise.codes && TransposeColumns) {
      transpose(codes[0], Width, rows, columns, columnwise.codes + j0 * m + i0, m);
    }
  }

  // FP8 block scaling keeps one scale a block, MXFP8 repeats it for every row and column of it.
  void keep_square(Kept kept, int64_t number, int64_t block, int64_t i0, int64_t rows, int64_t j, int64_t width) {
    if (TransposeColumns) {
      if (rowwise.codes) rowwise.scales[rowwise.place.at(number, block)] = kept;
      if (columnwise.codes) columnwise.scales[columnwise.place.at(block, number)] = kept;
      return;
    }
    if (rowwise.codes) {
      for (int64_t i = 0; i < rows; ++i) rowwise.scales[rowwise.place.at(i0 + i, block)] = kept;
    }
    if (columnwise.codes) {
      for (int64_t t = 0; t < width; ++t) columnwise.scales[columnwise.place.at(j + t, number)] = kept;
    }
  }
};

template <int Block, int Width, bool TransposeColumns, class Out, class Rule>
void quantize_blocks(Input x, int64_t m, int64_t k, bool square, const Rule& rule,
                     const Direction<typename Rule::Kept>& rowwise,
                     const Direction<typename Rule::Kept>& columnwise, int32_t threads) {
  if (!square && !columnwise.codes) {
    parallel(m, threads, [&](int64_t first, int64_t last) {
      quantize_rows<Block, Out, Rule>(x, k, first, last, m * k > kFar, rule, rowwise);
    });
    return;
  }
  parallel((m + Block - 1) / Block, threads, [&](int64_t first, int64_t last) {
    Tiles<Block, Width, TransposeColumns, Out, Rule> tiles;
    tiles.set(x, m, k, square, rule, rowwise, columnwise);
    for (int64_t number = first; number < last; ++number) tiles.strip(number);
  });
}

// The values of block-scaled codes [m, k]: code * scale. `scale_of` gives the fp32 scale at (row, block);
// with `along_columns` blocks run down the columns and (column, block) is asked for.
template <int Block, class In, class ScaleOf>
void decode_blocks(const uint8_t* codes, int64_t m, int64_t k, bool along_columns, bool square, ScaleOf scale_of,
                   float* out, int32_t threads) {
  parallel((m + Block - 1) / Block, threads, [&](int64_t first, int64_t last) {
    std::vector<float> scales(static_cast<size_t>(along_columns ? k : (k + Block - 1) / Block));
    float* scale = scales.data();
    for (int64_t block = first; block < last; ++block) {
      if (along_columns) {
        for (int64_t j = 0; j < k; ++j) scale[j] = scale_of(j, block);
      }
      for (int64_t i = block * Block; i < std::min<int64_t>((block + 1) * Block, m); ++i) {
        if (along_columns) {
          decode_row<In>(codes + i * k, k, scale, out + i * k);
          continue;
        }
        for (int64_t j = 0; j * Block < k; ++j) scale[j] = scale_of(square ? block : i, j);
        decode_row_blocks<In, Block>(codes + i * k, k, scale, out + i * k);
      }
    }
  });
}

}  // namespace fp8
