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

// Sixteen values from `at`.
NEMO_FP8_INLINE __m512 sixteen(const Input& x, int64_t at) {
  if (x.type == kFloat32) return _mm512_loadu_ps(static_cast<const float*>(x.data) + at);
  const auto* half = static_cast<const uint16_t*>(x.data) + at;
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half));
  if (x.type == kFloat16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
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
  alignas(64) float column_factor[kWidth];
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
    for (int j = 0; j < blocks * kBlock; ++j) column_factor[j] = factor(column_kept[j]);
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

  static float factor(uint8_t kept) { return as_float((254 - kept) << 23); }

#ifdef NEMO_FP8_AVX512
  // Codes of two blocks' rows from words with a magnitude's code each.
  NEMO_FP8_INLINE static __m512i codes_of(__m512i magnitudes, __m512i signs) {
    return in_order(_mm512_ternarylogic_epi32(magnitudes, signs, _mm512_set1_epi8(int8_t(0x80)), 0xf8));  // a | (b & c)
  }

  NEMO_FP8_INLINE static bool none_subnormal(const __m512i (&shifted)[2]) {
    const __m512i end = _mm512_set1_epi16(Shifted<Out>::kSubnormal);
    return _kortestz_mask32_u8(_mm512_cmplt_epu16_mask(shifted[0], end), _mm512_cmplt_epu16_mask(shifted[1], end));
  }

  // Codes of two blocks' rows of which some are subnormal numbers: these are counted in the values themselves.
  // Everything comes in registers: with an address the usual way would have to write it down too.
  NEMO_FP8_CALLED __m512i with_subnormal(int64_t at, int there, __m512i first, __m512i second, __m512i signs, __m512 by0,
                                         __m512 by1, __m512 by2, __m512 by3) {
    const __m512i shifted[2] = {first, second};
    const __m512 factor[4] = {by0, by1, by2, by3};
    __m512i code[2];
    for (int n = 0; n < 2; ++n) {
      const int64_t block = at + (n < there ? n : 0) * kBlock;
      const __m512i count = subnormal_words<Out>(_mm512_mul_ps(sixteen(generic.x, block), factor[2 * n]),
                                                 _mm512_mul_ps(sixteen(generic.x, block + 16), factor[2 * n + 1]));
      code[n] = _mm512_max_epi16(_mm512_sub_epi16(shifted[n], _mm512_set1_epi16(Shifted<Out>::kBelow)), count);
    }
    return codes_of(_mm512_packus_epi16(code[0], code[1]), signs);
  }

  void encode(int64_t i0, int64_t j0, int blocks) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), below = _mm512_set1_epi8(int8_t(Shifted<Out>::kBelow));
    __m512i down[kBlocks];
    for (int b = 0; b < blocks; ++b) {
      down[b] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_load_si512(column_addend + b * kBlock),
                                        _mm512_load_si512(column_addend + b * kBlock + 16));
    }
    uint8_t *row_codes = generic.rowwise.codes, *column_codes = generic.columnwise.codes;
    for (int i = 0; i < kBlock; ++i) {
      for (int b = 0; b < blocks; b += 2) {
        const int64_t at = (i0 + i) * generic.k + j0 + b * kBlock;
        const int there = std::min(2, blocks - b), next = b + there - 1;  // of an odd number the last one twice
        const __mmask64 whole = there == 2 ? ~__mmask64{0} : __mmask64{0xffffffff};
        const __m512i signs = _mm512_packs_epi16(values[i][b], values[i][next]);
        const __m512i bare[2] = {_mm512_and_si512(values[i][b], magnitude),
                                 _mm512_and_si512(values[i][next], magnitude)};
        const auto write = [&](uint8_t* codes, __m512i add, __m512i add_next, auto&& factors)
                               __attribute__((always_inline)) {
          const __m512i shifted[2] = {_mm512_add_epi16(bare[0], add), _mm512_add_epi16(bare[1], add_next)};
          // Packing saturates, and so does subtracting: what is below zero has the code 0.
          __m512i bytes = codes_of(_mm512_subs_epu8(_mm512_packus_epi16(shifted[0], shifted[1]), below), signs);
          if (__builtin_expect(!none_subnormal(shifted), 0)) {
            bytes = with_subnormal(at, there, shifted[0], shifted[1], signs, factors(b, 0), factors(b, 16),
                                   factors(next, 0), factors(next, 16));
          }
          _mm512_mask_storeu_epi8(codes + at, whole, bytes);
        };
        if (row_codes) {
          write(row_codes, _mm512_set1_epi32(row_addend[b][i]), _mm512_set1_epi32(row_addend[next][i]),
                [&](int block, int) { return _mm512_set1_ps(factor(row_kept[block][i])); });
        }
        write(column_codes, down[b], down[next],
              [&](int block, int from) { return _mm512_load_ps(column_factor + block * kBlock + from); });
      }
    }
  }
#else
  // Codes of a block's row from words with a magnitude's code each.
  NEMO_FP8_INLINE static __m256i codes_of(__m256i magnitudes, __m256i signs) {
    const __m256i together = _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15,  //
                                              0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(_mm256_or_si256(magnitudes, signs), together), order);
  }

  NEMO_FP8_INLINE static bool none_subnormal(const __m256i (&shifted)[2]) {
    const __m256i last = _mm256_set1_epi16(Shifted<Out>::kSubnormal - 1);
    const __m256i least = _mm256_min_epu16(shifted[0], shifted[1]);
    return _mm256_movemask_epi8(_mm256_cmpeq_epi16(_mm256_min_epu16(least, last), least)) == 0;
  }

  // Codes of a block's row of which some are subnormal numbers: these are counted in the values themselves.
  // Everything comes in registers: with an address the usual way would have to write it down too.
  NEMO_FP8_CALLED __m256i with_subnormal(int64_t at, __m256i first, __m256i second, __m256i signs, __m256 by0, __m256 by1,
                                         __m256 by2, __m256 by3) {
    const __m256i shifted[2] = {first, second};
    const __m256 factor[4] = {by0, by1, by2, by3};
    const float* value = generic.x.read(at, kBlock, buffer);
    const auto count = [&](int part) {
      return subnormal_counts<Out>(_mm256_mul_ps(_mm256_loadu_ps(value + 8 * part), factor[part]));
    };
    __m256i code[2];
    for (int half = 0; half < 2; ++half) {
      const __m256i counts = _mm256_blend_epi16(count(2 * half), _mm256_slli_epi32(count(2 * half + 1), 16), 0xaa);
      code[half] = _mm256_max_epi16(_mm256_sub_epi16(shifted[half], _mm256_set1_epi16(Shifted<Out>::kBelow)), counts);
    }
    return codes_of(_mm256_packus_epi16(code[0], code[1]), signs);
  }

  void encode(int64_t i0, int64_t j0, int blocks) {
    const __m256i magnitude = _mm256_set1_epi16(0x7fff), sign = _mm256_set1_epi8(char(0x80));
    const __m256i below = _mm256_set1_epi8(char(Shifted<Out>::kBelow));
    __m256i down[2 * kBlocks];
    for (int h = 0; h < 2 * blocks; ++h) {
      const auto* addend = reinterpret_cast<const __m256i*>(column_addend + h * 16);
      down[h] = _mm256_blend_epi16(_mm256_load_si256(addend), _mm256_load_si256(addend + 1), 0xaa);
    }
    uint8_t *row_codes = generic.rowwise.codes, *column_codes = generic.columnwise.codes;
    for (int i = 0; i < kBlock; ++i) {
      for (int b = 0; b < blocks; ++b) {
        const int64_t at = (i0 + i) * generic.k + j0 + b * kBlock;
        const __m256i first = values[i][2 * b], second = values[i][2 * b + 1];
        const __m256i signs = _mm256_and_si256(_mm256_packs_epi16(first, second), sign);
        const __m256i bare[2] = {_mm256_and_si256(first, magnitude), _mm256_and_si256(second, magnitude)};
        const auto write = [&](uint8_t* codes, __m256i add, __m256i add_next, auto&& factors)
                               __attribute__((always_inline)) {
          const __m256i shifted[2] = {_mm256_add_epi16(bare[0], add), _mm256_add_epi16(bare[1], add_next)};
          // Packing saturates, and so does subtracting: what is below zero has the code 0.
          __m256i bytes = codes_of(_mm256_subs_epu8(_mm256_packus_epi16(shifted[0], shifted[1]), below), signs);
          if (__builtin_expect(!none_subnormal(shifted), 0)) {
            bytes = with_subnormal(at, shifted[0], shifted[1], signs, factors(0), factors(8), factors(16), factors(24));
          }
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + at), bytes);
        };
        if (row_codes) {
          const __m256i add = _mm256_set1_epi32(row_addend[b][i]);
          write(row_codes, add, add, [&](int) { return _mm256_set1_ps(factor(row_kept[b][i])); });
        }
        write(column_codes, down[2 * b], down[2 * b + 1],
              [&](int from) { return _mm256_load_ps(column_factor + b * kBlock + from); });
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
