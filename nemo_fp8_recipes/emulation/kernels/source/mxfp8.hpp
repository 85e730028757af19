// MXFP8 of both directions from one tile of 32 rows, for AVX2 and AVX-512; elsewhere it is blocks.hpp's. A scale is a power of
// two: of a scaled value that becomes a normal number only the exponent is another, so that it is rounded once for both
// directions. Reference: numerics/mxfp8.py.
#pragma once

#include "blocks.hpp"
#include "vectors.hpp"

namespace fp8 {

#ifdef NEMO_FP8_AVX2

// What becomes of rounded values: counted in codes they are their codes but for a number that the scale decides. Here
// they are shifted so that those whose code has to be found in another way, because it is that of a subnormal number
// or may be, are from 0 to below `kSubnormal`. Below zero are those whose code is 0.
template <class Out>
struct Shifted {
  static constexpr int kMantissaBits = 23 - Out::kShift;
  static constexpr int16_t kBelow = kMantissaBits << kMantissaBits;  // half the smallest subnormal number
  static constexpr int16_t kSubnormal = kBelow + Out::kLeastNormalCode;
  // To be added under the scale 2^(exponent - 127).
  static constexpr int32_t addend(int32_t exponent) {
    return ((127 - exponent) << kMantissaBits) - Out::kBiasInCodes + kBelow;
  }
};

// The signs of sixteen fp32 numbers and, from the last bit on, their magnitudes rounded to the format's significand with
// all of their exponents. Even lanes hold the first eight numbers, odd lanes the others.
template <class Out>
NEMO_FP8_INLINE __m256i rounded(__m256i a, __m256i b) {
  constexpr int kDrop = Out::kShift - 16;  // bits of an upper half that the format has not
  const __m256i low = _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
  const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa);
  const __m256i up = _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi16(1 << kDrop)));
  const __m256i all = _mm256_or_si256(high, _mm256_min_epu16(up, _mm256_set1_epi16(1)));
  const __m256i full = _mm256_and_si256(all, _mm256_set1_epi16(0x7fff));
  const __m256i nearly = _mm256_add_epi16(full, _mm256_set1_epi16((1 << (kDrop - 1)) - 1));
  const __m256i sign = _mm256_andnot_si256(_mm256_set1_epi16(0x7fff), high);
  return _mm256_or_si256(_mm256_srli_epi16(nearly, kDrop), sign);
}

#ifdef NEMO_FP8_AVX512

// The same of 32 numbers: those of `a` in the even lanes.
template <class Out>
NEMO_FP8_INLINE __m512i rounded(__m512i a, __m512i b) {
  constexpr int kDrop = Out::kShift - 16;
  constexpr __mmask32 kSecond = 0xaaaaaaaa;
  const __m512i low = _mm512_mask_blend_epi16(kSecond, a, _mm512_slli_epi32(b, 16));
  const __m512i high = _mm512_mask_blend_epi16(kSecond, _mm512_srli_epi32(a, 16), b);
  const __m512i up = _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi16(1 << kDrop), 0xf8);  // a | (b & c)
  const __m512i last = _mm512_min_epu16(up, _mm512_set1_epi16(1));
  const __m512i full = _mm512_ternarylogic_epi32(high, last, _mm512_set1_epi16(0x7fff), 0xa8);  // (a | b) & c
  const __m512i nearly = _mm512_add_epi16(full, _mm512_set1_epi16((1 << (kDrop - 1)) - 1));
  const __m512i shifted = _mm512_srli_epi16(nearly, kDrop);
  return _mm512_ternarylogic_epi32(shifted, high, _mm512_set1_epi16(int16_t(0x8000)), 0xf8);  // a | (b & c)
}

#endif

// The largest of each of eight vectors, in their order.
inline __m256i largest_of_each(const int32_t (&row)[8][8]) {
  const auto load = [&](int i) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(row[i])); };
  __m256i pair[4], four[2];
  for (int i = 0; i < 4; ++i) {
    const __m256i a = load(2 * i), b = load(2 * i + 1);
    pair[i] = _mm256_max_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  }
  for (int i = 0; i < 2; ++i) {
    const __m256i a = pair[2 * i], b = pair[2 * i + 1];
    four[i] = _mm256_max_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  }
  return _mm256_max_epi32(_mm256_permute2x128_si256(four[0], four[1], 0x20),
                          _mm256_permute2x128_si256(four[0], four[1], 0x31));
}

// 32 rows of x [m, k], multiples of 32, up to eight blocks of columns at a time.
template <class Out>
struct Mxfp8Tiles {
  static constexpr int kBlock = 32, kBlocks = 8, kWidth = kBlocks * kBlock;
  static constexpr int kVectors = kBlock / 8;  // of a block's row
  using Rule = PowerOfTwoUp<Out>;

  Tiles<kBlock, kWidth, false, Out, Rule> generic;  // what the shortcut is not for

  alignas(64) int32_t along[kBlocks][kBlock / 8][8][8];  // maxima of a row's lanes
  alignas(64) int32_t row_max[kBlocks][kBlock], column_max[kWidth];
  alignas(64) uint8_t row_kept[kBlocks][kBlock], column_kept[kWidth];
  alignas(64) int32_t row_addend[kBlocks][kBlock], column_addend[kWidth];  // twice in a word
#ifdef NEMO_FP8_AVX512
  alignas(64) __m512i values[kBlock][kBlocks];  // rounded
#else
  alignas(64) __m256i values[kBlock][2 * kBlocks];  // rounded; 32 are two of these
#endif
  alignas(64) float buffer[kWidth];

  void strip(int64_t number) {
    for (int64_t j0 = 0; j0 < generic.k; j0 += kWidth) {
      if (!tile(number, j0, int(std::min<int64_t>(kBlocks, (generic.k - j0) / kBlock)))) generic.tile_at(number, j0);
    }
  }

  // False, and nothing written, where the tile has infinite, NaN or very small numbers.
  bool tile(int64_t number, int64_t j0, int blocks) {
    bring(number * kBlock, j0, blocks);
    for (int b = 0; b < blocks; ++b) {
      for (int i = 0; i < kBlock / 8; ++i) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(row_max[b] + 8 * i), largest_of_each(along[b][i]));
      }
      if (!generic.square) continue;
      const int32_t largest = *std::max_element(row_max[b], row_max[b] + kBlock);
      std::fill(row_max[b], row_max[b] + kBlock, largest);
      std::fill(column_max + b * kBlock, column_max + (b + 1) * kBlock, largest);
    }
    bool quick = find_scales(column_max, blocks * kBlock, column_kept, column_addend);
    quick &= find_scales(row_max[0], blocks * kBlock, row_kept[0], row_addend[0]);
    if (!quick) return false;
    keep_scales(number, j0, blocks);
    encode(number * kBlock, j0, blocks);
    return true;
  }

  void bring(int64_t i0, int64_t j0, int blocks) {
    const Input& x = generic.x;
    std::fill(column_max, column_max + kWidth, 0);
    for (int i = 0; i < kBlock; ++i) {
      const int64_t at = (i0 + i) * generic.k + j0;
      // The next tile's part of the row: too short a run for the hardware to see it coming.
      x.prefetch(at + kWidth, kWidth);
      const float* row = x.read(at, blocks * kBlock, buffer);
      for (int b = 0; b < blocks; ++b) observe(i, b, row + b * kBlock, column_max + b * kBlock);
    }
  }

#ifdef NEMO_FP8_AVX512
  // Row i of block b.
  NEMO_FP8_INLINE void observe(int i, int b, const float* row, int32_t* down) {
    const __m512i magnitude = _mm512_set1_epi32(kMagnitude);
    const __m512i first = _mm512_loadu_si512(row), second = _mm512_loadu_si512(row + 16);
    const __m512i full[2] = {_mm512_and_si512(first, magnitude), _mm512_and_si512(second, magnitude)};
    _mm512_store_si512(down, _mm512_max_epi32(_mm512_load_si512(down), full[0]));
    _mm512_store_si512(down + 16, _mm512_max_epi32(_mm512_load_si512(down + 16), full[1]));
    const __m512i seen = _mm512_max_epi32(full[0], full[1]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(along[b][i / 8][i % 8]),
                       _mm256_max_epi32(_mm512_castsi512_si256(seen), _mm512_extracti64x4_epi64(seen, 1)));
    values[i][b] = rounded<Out>(first, second);
  }
#else
  // Row i of block b.
  NEMO_FP8_INLINE void observe(int i, int b, const float* row, int32_t* column) {
    const __m256i magnitude = _mm256_set1_epi32(kMagnitude);
    __m256i seen = _mm256_setzero_si256(), bits[kVectors];
    auto* down = reinterpret_cast<__m256i*>(column);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      bits[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + v * 8));
      const __m256i full = _mm256_and_si256(bits[v], magnitude);
      _mm256_store_si256(down + v, _mm256_max_epi32(_mm256_load_si256(down + v), full));
      seen = _mm256_max_epi32(seen, full);
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(along[b][i / 8][i % 8]), seen);
    values[i][2 * b] = rounded<Out>(bits[0], bits[1]);
    values[i][2 * b + 1] = rounded<Out>(bits[2], bits[3]);
  }
#endif

  // E8M0 scales and `Shifted::addend`, in both halves of a word. False where a number may be infinite, NaN or, scaled,
  // made of a subnormal one.
  bool find_scales(const int32_t* amax, int count, uint8_t* kept, int32_t* addend) {
    constexpr int32_t kSmallest = 32;
    const float reciprocal_of_max = generic.rule.reciprocal_of_max;
    Ints most{}, least = Ints{} + 255;
    for (int i = 0; i < count; i += kLanes) {
      const Ints largest = load_lanes<Ints>(amax + i);
      const Ints wanted = Ints(Floats(largest) * reciprocal_of_max);
      // Unsigned: of a NaN the sum is beyond an int.
      const Ints up = smaller(Ints((Words(wanted) + 0x007fffffu) >> 23), Ints{} + 254);
      const Ints exponent = wanted <= 0x00400000 ? Ints{} : up;
      const Ints zero = largest == 0;  // all bits where it holds
      most = larger(most, largest);
      least = smaller(least, exponent | (zero & 255));
      // Where all are zero: any scale under which zero is far below the subnormal numbers.
      const Ints add = Shifted<Out>::addend(127) + ((127 - exponent) << Shifted<Out>::kMantissaBits & ~zero);
      store_lanes(__builtin_convertvector(exponent, Bytes), kept + i);
      store_lanes((add & 0xffff) | add << 16, addend + i);
    }
    return largest_lane(most) < kInfinity && 255 - largest_lane(255 - least) >= kSmallest;
  }

  void keep_scales(int64_t number, int64_t j0, int blocks) {
    const auto& rows = generic.rowwise;
    const auto& columns = generic.columnwise;
    if (rows.codes && !rows.place.tiles) {
      alignas(64) uint8_t by_row[kBlock][kBlocks];
      transpose(row_kept[0], kBlock, blocks, kBlock, by_row[0], kBlocks);
      for (int i = 0; i < kBlock; ++i) {
        std::memcpy(rows.scales + rows.place.at(number * kBlock + i, j0 / kBlock), by_row[i], size_t(blocks));
      }
    } else if (rows.codes) {
      for (int i = 0; i < kBlock; ++i) {
        for (int b = 0; b < blocks; ++b) {
          rows.scales[rows.place.at(number * kBlock + i, j0 / kBlock + b)] = row_kept[b][i];
        }
      }
    }
    if (columns.codes && !columns.place.tiles) {
      std::memcpy(columns.scales + columns.place.at(j0, number), column_kept, size_t(blocks * kBlock));
    } else if (columns.codes) {
      for (int j = 0; j < blocks * kBlock; ++j) columns.scales[columns.place.at(j0 + j, number)] = column_kept[j];
    }
  }

  // Codes of `count` values from `at`, of which some are subnormal numbers, each under its own scale.
  NEMO_FP8_CALLED void multiply(int64_t at, int count, const uint8_t (&kept)[64], uint8_t* codes) {
    alignas(64) float factor[64];
    for (int c = 0; c < count; ++c) factor[c] = as_float((254 - kept[c]) << 23);
    encode_row<Out>(generic.x.read(at, count, buffer), count, factor, codes + at);
  }

  void multiply_row(int64_t at, int i, int b, int blocks, uint8_t* codes) {
    uint8_t kept[64];
    for (int n = 0; n < blocks; ++n) std::memset(kept + n * kBlock, row_kept[b + n][i], kBlock);
    multiply(at + b * kBlock, blocks * kBlock, kept, codes);
  }

  void multiply_columns(int64_t at, int b, int blocks, uint8_t* codes) {
    uint8_t kept[64];
    std::memcpy(kept, column_kept + b * kBlock, size_t(blocks * kBlock));
    multiply(at + b * kBlock, blocks * kBlock, kept, codes);
  }

#ifdef NEMO_FP8_AVX512
  // Codes of two blocks' rows. False where some are subnormal numbers.
  NEMO_FP8_INLINE static bool codes_of(const __m512i (&bare)[2], __m512i add, __m512i add_next, __m512i signs,
                                       __m512i& codes) {
    const __m512i first = _mm512_add_epi16(bare[0], add), second = _mm512_add_epi16(bare[1], add_next);
    const __m512i end = _mm512_set1_epi16(Shifted<Out>::kSubnormal);
    const __mmask32 low = _mm512_cmplt_epu16_mask(first, end), low_next = _mm512_cmplt_epu16_mask(second, end);
    // Packing saturates, and so does subtracting: what is below zero has the code 0.
    const __m512i magnitudes = _mm512_subs_epu8(_mm512_packus_epi16(first, second),
                                                _mm512_set1_epi8(int8_t(Shifted<Out>::kBelow)));
    const __m512i sign = _mm512_set1_epi8(int8_t(0x80));
    codes = in_order(_mm512_ternarylogic_epi32(magnitudes, signs, sign, 0xf8));  // a | (b & c)
    return _kortestz_mask32_u8(low, low_next);
  }

  void encode(int64_t i0, int64_t j0, int blocks) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i down[kBlocks];
    for (int b = 0; b < blocks; ++b) {
      down[b] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_load_si512(column_addend + b * kBlock),
                                        _mm512_load_si512(column_addend + b * kBlock + 16));
    }
    uint8_t *row_codes = generic.rowwise.codes, *column_codes = generic.columnwise.codes;
    for (int i = 0; i < kBlock; ++i) {
      const int64_t at = (i0 + i) * generic.k + j0;
      for (int b = 0; b < blocks; b += 2) {
        const int there = std::min(2, blocks - b), next = b + there - 1;  // of an odd number the last one twice
        const __mmask64 whole = there == 2 ? ~__mmask64{0} : __mmask64{0xffffffff};
        const __m512i signs = _mm512_packs_epi16(values[i][b], values[i][next]);
        const __m512i bare[2] = {_mm512_and_si512(values[i][b], magnitude),
                                 _mm512_and_si512(values[i][next], magnitude)};
        __m512i codes;
        if (row_codes) {
          const __m512i add = _mm512_set1_epi32(row_addend[b][i]), add_next = _mm512_set1_epi32(row_addend[next][i]);
          const bool done = codes_of(bare, add, add_next, signs, codes);
          _mm512_mask_storeu_epi8(row_codes + at + b * kBlock, whole, codes);
          if (__builtin_expect(!done, 0)) multiply_row(at, i, b, there, row_codes);
        }
        const bool done = codes_of(bare, down[b], down[next], signs, codes);
        _mm512_mask_storeu_epi8(column_codes + at + b * kBlock, whole, codes);
        if (__builtin_expect(!done, 0)) multiply_columns(at, b, there, column_codes);
      }
    }
  }
#else
  // Codes of a block's row. False where some are subnormal numbers.
  NEMO_FP8_INLINE static bool codes_of(const __m256i (&bare)[2], __m256i add, __m256i add_next, __m256i signs,
                                       __m256i& codes) {
    const __m256i first = _mm256_add_epi16(bare[0], add), second = _mm256_add_epi16(bare[1], add_next);
    const __m256i last = _mm256_set1_epi16(Shifted<Out>::kSubnormal - 1);
    const __m256i least = _mm256_min_epu16(first, second);
    // Packing saturates, and so does subtracting: what is below zero has the code 0.
    const __m256i magnitudes = _mm256_subs_epu8(_mm256_packus_epi16(first, second),
                                                _mm256_set1_epi8(char(Shifted<Out>::kBelow)));
    const __m256i together = _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15,  //
                                              0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i mixed = _mm256_or_si256(magnitudes, signs);
    codes = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(mixed, together), order);
    return _mm256_movemask_epi8(_mm256_cmpeq_epi16(_mm256_min_epu16(least, last), least)) == 0;
  }

  void encode(int64_t i0, int64_t j0, int blocks) {
    const __m256i magnitude = _mm256_set1_epi16(0x7fff), sign = _mm256_set1_epi8(char(0x80));
    __m256i down[2 * kBlocks];
    for (int h = 0; h < 2 * blocks; ++h) {
      const auto* addend = reinterpret_cast<const __m256i*>(column_addend + h * 16);
      down[h] = _mm256_blend_epi16(_mm256_load_si256(addend), _mm256_load_si256(addend + 1), 0xaa);
    }
    uint8_t *row_codes = generic.rowwise.codes, *column_codes = generic.columnwise.codes;
    for (int i = 0; i < kBlock; ++i) {
      const int64_t at = (i0 + i) * generic.k + j0;
      for (int b = 0; b < blocks; ++b) {
        const __m256i first = values[i][2 * b], second = values[i][2 * b + 1];
        const __m256i signs = _mm256_and_si256(_mm256_packs_epi16(first, second), sign);
        const __m256i bare[2] = {_mm256_and_si256(first, magnitude), _mm256_and_si256(second, magnitude)};
        __m256i codes;
        if (row_codes) {
          const __m256i add = _mm256_set1_epi32(row_addend[b][i]);
          const bool done = codes_of(bare, add, add, signs, codes);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(row_codes + at + b * kBlock), codes);
          if (__builtin_expect(!done, 0)) multiply_row(at, i, b, 1, row_codes);
        }
        const bool done = codes_of(bare, down[2 * b], down[2 * b + 1], signs, codes);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(column_codes + at + b * kBlock), codes);
        if (__builtin_expect(!done, 0)) multiply_columns(at, b, 1, column_codes);
      }
    }
  }
#endif
};

#endif

template <class Out>
void quantize_mxfp8(Input x, int64_t m, int64_t k, bool square, float reciprocal_of_max,
                    const Direction<uint8_t>& rowwise, const Direction<uint8_t>& columnwise, int32_t threads) {
  const PowerOfTwoUp<Out> rule{reciprocal_of_max};
#ifdef NEMO_FP8_AVX2
  if (columnwise.codes) {
    parallel(m / 32, threads, [&](int64_t first, int64_t last) {
      Mxfp8Tiles<Out> tiles;
      tiles.generic.set(x, m, k, square, rule, rowwise, columnwise);
      for (int64_t number = first; number < last; ++number) tiles.strip(number);
    });
    return;
  }
#endif
  quantize_blocks<32, 256, false, Out>(x, m, k, square, rule, rowwise, columnwise, threads);
}

}  // namespace fp8
