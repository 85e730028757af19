// NVFP4: E2M1 codes in pairs, an E4M3 scale for 16 of them, along rows and along columns. A tile of 16 rows is read
// once for both directions; columnwise data, which is that of the transposed matrix, never needs the transposed
// values. Reference: numerics/nvfp4.py.
#pragma once

#include "hadamard.hpp"
#include "largest.hpp"
#include "loops.hpp"
#include "nvfp4_codes.hpp"
#include "philox.hpp"
#include "scale_place.hpp"

namespace fp8 {

constexpr float kSixth = 1.0f / 6.0f;

// `compute_global_encode_scaling_factor_FP4`.
inline float nvfp4_global_scale(float amax) {
  float scale = 2688.0f / amax;
  if (scale > kFloatMax) scale = kFloatMax;
  return amax == 0.0f || scale == 0.0f ? 1.0f : scale;
}

// E4M3 scales of a vector of blocks and what their values are multiplied with. `divided`: as Transformer Engine found
// them up to 2.13.
inline Ints nvfp4_scales(Floats encode_scale, Floats amax, bool divided, Floats& multiplier) {
  const Ints code = encode<E4M3>(divided ? amax / 6.0f * encode_scale : amax * (encode_scale * kSixth));
  const Floats inverse = 1.0f / (decode_e4m3(code) * (1.0f / encode_scale));
  multiplier = inverse > kFloatMax ? Floats{} + kFloatMax : inverse;
  return code;
}

// What is made of one direction; packed null: not asked for. `amax` has one element, or with `each` one for every
// row of what is quantised. `key` is that of the random bits.
struct Nvfp4Direction {
  uint8_t* packed;
  uint8_t* scales;
  ScalePlace place;
  const float* amax;
  bool each;
  uint64_t key;
};

struct Nvfp4Options {
  bool square;      // blocks of 16x16
  bool stochastic;  // rounding
  bool transform;   // columns by the random Hadamard transform
  int32_t signs;    // of that
  bool divided;     // scales as in `nvfp4_scales`
};

// Sixteen rows of a matrix [m, k], 64 columns at a time.
struct Nvfp4Tiles {
  static constexpr int kBlock = 16, kWidth = 64, kBlocks = kWidth / kBlock;
  static constexpr int kStrip = 64;  // rows whose columnwise codes are written one after the other

  Input x;
  int64_t m, k;
  Nvfp4Options options;
  Nvfp4Direction rowwise, columnwise;
  bool same_codes;  // in both directions: squares under one amax, unless chance decides

  alignas(64) float tile[kBlock][kWidth];
  alignas(64) int32_t largest[kWidth];
  alignas(64) int32_t row_largest[kBlock][kBlocks];
  alignas(64) float row_scale[kWidth];  // global scale of each block of a tile
  alignas(64) float column_scale[kWidth];
  alignas(64) float multiplier[kWidth];
  alignas(64) uint8_t kept[kWidth];
  alignas(64) uint8_t codes[kBlock][kWidth];
  alignas(64) uint8_t packed[kBlock / 2][kWidth];
  alignas(64) uint8_t random[kBlock][kWidth];

  Nvfp4Tiles(Input x, int64_t m, int64_t k, const Nvfp4Options& options, const Nvfp4Direction& rowwise,
             const Nvfp4Direction& columnwise)
      : x(x), m(m), k(k), options(options), rowwise(rowwise), columnwise(columnwise) {
    const auto scale = [](const Nvfp4Direction& out) { return out.packed ? nvfp4_global_scale(out.amax[0]) : 1.0f; };
    std::fill(row_scale, row_scale + kWidth, scale(rowwise));
    std::fill(column_scale, column_scale + kWidth, scale(columnwise));
    same_codes = options.square && !options.stochastic && rowwise.packed && row_scale[0] == column_scale[0];
  }

  void strip(int64_t number) {
    const int64_t begin = number * kStrip, end = std::min(begin + kStrip, m);
    for (int64_t j0 = 0; j0 < k; j0 += kWidth) {
      const int64_t columns = std::min<int64_t>(kWidth, k - j0);
      for (int64_t i0 = begin; i0 < end; i0 += kBlock) {
        const int64_t rows = std::min<int64_t>(kBlock, end - i0);
        bring(i0, rows, j0, columns);
        observe_rows();
        if (rowwise.packed) encode_rows(i0, rows, j0, columns);
        if (columnwise.packed) encode_columns(i0, j0, columns);
      }
    }
  }

  void bring(int64_t i0, int64_t rows, int64_t j0, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) {
      if (columns == kWidth) {
        x.copy((i0 + i) * k + j0, kWidth, tile[i]);
      } else {
        x.copy((i0 + i) * k + j0, columns, tile[i]);
        std::fill(tile[i] + columns, tile[i] + kWidth, 0.0f);
      }
    }
    for (int64_t i = rows; i < kBlock; ++i) std::fill(tile[i], tile[i] + kWidth, 0.0f);
  }

  void observe_rows() {
    if (!rowwise.packed && !options.square) return;
    block_maxima<kBlock>(tile[0], kBlock * kBlocks, row_largest[0]);
    if (!options.square) return;
    for (int b = 0; b < kBlocks; ++b) {
      int32_t most = 0;
      for (int i = 0; i < kBlock; ++i) most = std::max(most, row_largest[i][b]);
      for (int i = 0; i < kBlock; ++i) row_largest[i][b] = most;
    }
  }

  void find_scales(const float* encode_scale, const int32_t* amax) {
    for (int b = 0; b < kWidth; b += kLanes) {
      Floats factor;
      const Floats scale = load_lanes<Floats>(encode_scale + b);
      const Ints code = nvfp4_scales(scale, load_lanes<Floats>(amax + b), options.divided, factor);
      store_lanes(factor, multiplier + b);
      for (int lane = 0; lane < kLanes; ++lane) kept[b + lane] = uint8_t(code[lane]);
    }
  }

  void encode_rows(int64_t i0, int64_t rows, int64_t j0, int64_t columns) {
    const Nvfp4Direction& out = rowwise;
    if (out.each) {
      for (int64_t i = 0; i < kWidth; ++i) row_scale[i] = nvfp4_global_scale(out.amax[std::min(i0 + i / kBlocks, m - 1)]);
    }
    find_scales(row_scale, row_largest[0]);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t b = 0; b * kBlock < columns; ++b) {
        out.scales[out.place.at(i0 + i, j0 / kBlock + b)] = kept[i * kBlocks + b];
      }
    }
    if (options.stochastic) draw_for_rows(i0, j0);
    encode_fp4<kBlock>(tile[0], multiplier, options.stochastic ? random[0] : nullptr, rows * kWidth, codes[0]);
    for (int64_t i = 0; i < rows; ++i) {
      if (columns == kWidth) {
        pack_pairs(codes[i], kWidth, out.packed + ((i0 + i) * k + j0) / 2);
      } else {
        pack_pairs(codes[i], columns, out.packed + ((i0 + i) * k + j0) / 2);
      }
    }
  }

  void encode_columns(int64_t i0, int64_t j0, int64_t columns) {
    const Nvfp4Direction& out = columnwise;
    if (!same_codes) {
      observe_columns();
      if (out.each) {
        for (int64_t j = 0; j < kWidth; ++j) column_scale[j] = nvfp4_global_scale(out.amax[std::min(j0 + j, k - 1)]);
      }
      find_scales(column_scale, largest);
      if (options.stochastic) draw_for_columns(i0, j0);
      for (int i = 0; i < kBlock; ++i) {
        encode_fp4<1>(tile[i], multiplier, options.stochastic ? random[i] : nullptr, kWidth, codes[i]);
      }
      for (int64_t j = 0; j < columns; ++j) out.scales[out.place.at(j0 + j, i0 / kBlock)] = kept[j];
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        out.scales[out.place.at(j0 + j, i0 / kBlock)] = kept[j / kBlock];
      }
    }
    for (int pair = 0; pair < kBlock / 2; ++pair) {
      for (int j = 0; j < kWidth; ++j) packed[pair][j] = uint8_t(codes[2 * pair][j] | codes[2 * pair + 1][j] << 4);
    }
    transpose(packed[0], kWidth, kBlock / 2, columns, out.packed + (j0 * m + i0) / 2, m / 2);
  }

  void observe_columns() {
    if (options.square) {
      for (int j = 0; j < kWidth; ++j) largest[j] = row_largest[0][j / kBlock];
      return;
    }
    for (int j = 0; j < kWidth; j += kLanes) {
      Ints seen{};
      if (options.transform) {
        Floats row[kBlock];
#pragma GCC unroll 16
        for (int i = 0; i < kBlock; ++i) row[i] = load_lanes<Floats>(&tile[i][j]);
        hadamard(row, options.signs);
#pragma GCC unroll 16
        for (int i = 0; i < kBlock; ++i) store_lanes(round_to_bfloat16(row[i]), &tile[i][j]);
      }
      for (int i = 0; i < kBlock; ++i) seen = larger(magnitude_bits(load_lanes<Floats>(&tile[i][j])), seen);
      store_lanes(seen, &largest[j]);
    }
  }

  // Sixteen bytes of a block come from one counter: the block's number in the direction's own order.
  void draw_for_rows(int64_t i0, int64_t j0) {
    constexpr int kRows = kCounters / kBlocks;
    for (int i = 0; i < kBlock; i += kRows) {
      uint64_t counter[kCounters];
      for (int c = 0; c < kCounters; ++c) {
        counter[c] = (uint64_t(i0 + i + c / kBlocks) * uint64_t(k) + uint64_t(j0)) / kBlock + uint64_t(c % kBlocks);
      }
      uint32_t word[4][kCounters];
      philox(counter, rowwise.key, word);
      for (int c = 0; c < kCounters; ++c) {
        const uint32_t bytes[4] = {word[0][c], word[1][c], word[2][c], word[3][c]};
        std::memcpy(&random[i + c / kBlocks][c % kBlocks * kBlock], bytes, kBlock);
      }
    }
  }

  void draw_for_columns(int64_t i0, int64_t j0) {
    for (int j = 0; j < kWidth; j += kCounters) {
      uint64_t counter[kCounters];
      for (int c = 0; c < kCounters; ++c) counter[c] = (uint64_t(j0 + j + c) * uint64_t(m) + uint64_t(i0)) / kBlock;
      uint32_t word[4][kCounters];
      philox(counter, columnwise.key, word);
      for (int i = 0; i < kBlock; ++i) {
        for (int c = 0; c < kCounters; ++c) random[i][j + c] = uint8_t(word[i / 4][c] >> (8 * (i % 4)));
      }
    }
  }
};

// Both directions of x [m, k], multiples of 16 (m any number where columns are not asked for).
inline void quantize_nvfp4(Input x, int64_t m, int64_t k, const Nvfp4Options& options, const Nvfp4Direction& rowwise,
                           const Nvfp4Direction& columnwise, int32_t threads) {
  constexpr int64_t kStrip = Nvfp4Tiles::kStrip;
  parallel((m + kStrip - 1) / kStrip, threads, [&](int64_t first, int64_t last) {
    Nvfp4Tiles tiles(x, m, k, options, rowwise, columnwise);
    for (int64_t number = first; number < last; ++number) tiles.strip(number);
  });
}

// code * block scale of packed codes [m, k / 2] with a scale for every 1x16.
inline void decode_nvfp4(const uint8_t* packed, int64_t m, int64_t k, const uint8_t* scales,
                         const ScalePlace& place, float* out, int32_t threads) {
  static const float values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                   -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
  parallel(m, threads, [&](int64_t first, int64_t last) {
#ifdef NEMO_FP8_AVX2
    const __m256 magnitudes = _mm256_loadu_ps(values);
    const auto decode = [&](__m128i codes, __m256 scale) {
      const __m256i lanes = _mm256_cvtepu8_epi32(codes);
      const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(lanes, _mm256_set1_epi32(8)), 28);
      const __m256 magnitude = _mm256_permutevar8x32_ps(magnitudes, lanes);
      return _mm256_mul_ps(_mm256_or_ps(magnitude, _mm256_castsi256_ps(sign)), scale);
    };
#endif
    for (int64_t i = first; i < last; ++i) {
      alignas(64) float scale_of[kLanes];
      for (int64_t b = 0; b < k / 16; ++b) {
        if (b % kLanes == 0) {
          Ints code{};
          for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, k / 16 - b); ++lane) {
            code[lane] = scales[place.at(i, b + lane)];
          }
          store_lanes(decode_e4m3(code), scale_of);
        }
        const float scale = scale_of[b % kLanes];
        const uint8_t* pair = packed + (i * k + b * 16) / 2;
        float* value = out + i * k + b * 16;
#ifdef NEMO_FP8_AVX2
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pair));
        const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
        const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
        const __m128i codes = _mm_unpacklo_epi8(low, high);
        _mm256_storeu_ps(value, decode(codes, _mm256_set1_ps(scale)));
        _mm256_storeu_ps(value + 8, decode(_mm_unpackhi_epi64(codes, codes), _mm256_set1_ps(scale)));
#else
        for (int t = 0; t < 8; ++t) {
          value[2 * t] = values[pair[t] & 15] * scale;
          value[2 * t + 1] = values[pair[t] >> 4] * scale;
        }
#endif
      }
    }
  });
}

}  // namespace fp8
