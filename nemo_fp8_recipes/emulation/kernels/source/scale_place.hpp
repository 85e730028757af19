// Where the scales of blocks are stored.
#pragma once

#include "elements.hpp"

namespace fp8 {

// Where the scale of (row, block) of a direction lies, for scales in natural order or in the tiles of 128 x 4
// that the GEMM reads. `row` counts along the direction that is not blocked.
struct ScalePlace {
  int64_t row_stride, block_stride;
  int64_t tiles;  // tiles of 4 blocks in a row of tiles; 0: natural order

  NEMO_FP8_INLINE int64_t at(int64_t row, int64_t block) const {
    if (!tiles) return row * row_stride + block * block_stride;
    return ((row / 128) * tiles + block / 4) * 512 + (row % 32) * 16 + (row % 128) / 32 * 4 + block % 4;
  }
};

// Scales of rows, padded to `stride` columns.
inline ScalePlace row_place(bool swizzled, int64_t stride) {
  return swizzled ? ScalePlace{0, 0, stride / 4} : ScalePlace{stride, 1, 0};
}

}  // namespace fp8
