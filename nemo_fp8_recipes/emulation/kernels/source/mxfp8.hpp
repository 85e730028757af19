// MXFP8 of both directions from one tile of 32 rows, for AVX2 and AVX-512; elsewhere it is blocks.hpp's. A scale is a power of
// two, so a scaled value has another exponent and the same significand: both directions are encoded from the same
// upper halves of the fp32 numbers by adding to their exponents. Reference: numerics/mxfp8.py.
#pragma once

#include "blocks.hpp"
#include "vectors.hpp"

namespace fp8 {

#ifdef NEMO_FP8_AVX2

// Upper halves of sixteen fp32 numbers, the last bit set where the lower half is not zero. Even lanes hold the first
// eight numbers, odd lanes the others.
NEMO_FP8_INLINE __m256i upper_halves(__m256i a, __m256i b) {
  const __m256i low = _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
  const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa);
  return _mm256_or_si256(high, _mm256_min_epu16(low, _mm256_set1_epi16(1)));
}

// Codes, without signs and in the order of `upper_halves`, of 32 such magnitudes that are not beyond the format's
// largest number; below zero is zero.
template <class Out>
NEMO_FP8_INLINE __m256i encode_halves(__m256i first, __m256i second) {
  constexpr int kDrop = Out::kShift - 16;  // bits of an upper half that the format has not
  constexpr int16_t kLeast = Out::kSmallestNormal >> 16;
  constexpr int16_t kBias = int16_t((kLeast >> kDrop) - (1 << (7 - kDrop))) << kDrop;
  constexpr int16_t kHalfOfSubnormal = kLeast - ((8 - kDrop) << 7);
  const auto round = [](__m256i half) __attribute__((always_inline)) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(half, kDrop), _mm256_set1_epi16(1));
    const __m256i nearly = _mm256_add_epi16(half, _mm256_set1_epi16((1 << (kDrop - 1)) - 1 - kBias));
    return _mm256_srai_epi16(_mm256_add_epi16(nearly, odd), kDrop);
  };
  __m256i code[2] = {round(first), round(second)};
  // Numbers that become subnormal are few.
  const __m256i above = _mm256_set1_epi16(kHalfOfSubnormal + 1);
  const __m256i nearest = _mm256_min_epu16(_mm256_sub_epi16(first, above), _mm256_sub_epi16(second, above));
  const __m256i last = _mm256_set1_epi16(kLeast - kHalfOfSubnormal - 2);
  if (__builtin_expect(_mm256_movemask_epi8(_mm256_cmpeq_epi16(_mm256_min_epu16(nearest, last), nearest)), 0)) {
    const __m256 least = _mm256_castsi256_ps(_mm256_set1_epi32(Out::kSmallestNormal));
    const __m256 adder = _mm256_castsi256_ps(_mm256_set1_epi32(Out::kSmallestNormal + (Out::kShift << 23)));
    // Adding a power of two whose last place is the smallest subnormal rounds to a count of those.
    const auto count = [&](__m256i bits) {
      return _mm256_castps_si256(_mm256_add_ps(_mm256_min_ps(_mm256_castsi256_ps(bits), least), adder));
    };
    const __m256i half[2] = {_mm256_max_epi16(first, _mm256_setzero_si256()),
                             _mm256_max_epi16(second, _mm256_setzero_si256())};
    for (int h = 0; h < 2; ++h) {
      const __m256i even = count(_mm256_slli_epi32(half[h], 16));
      const __m256i odd = count(_mm256_and_si256(half[h], _mm256_set1_epi32(int32_t(0xffff0000))));
      code[h] = _mm256_max_epi16(code[h], _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa));
    }
  }
  return _mm256_packus_epi16(code[0], code[1]);
}

#ifdef NEMO_FP8_AVX512

// `upper_halves` of 32 numbers: those of `a` in the even lanes.
NEMO_FP8_INLINE __m512i upper_halves(__m512i a, __m512i b) {
  constexpr __mmask32 kSecond = 0xaaaaaaaa;
  const __m512i low = _mm512_mask_blend_epi16(kSecond, a, _mm512_slli_epi32(b, 16));
  const __m512i high = _mm512_mask_blend_epi16(kSecond, _mm512_srli_epi32(a, 16), b);
  return _mm512_or_si512(high, _mm512_min_epu16(low, _mm512_set1_epi16(1)));
}

// `encode_halves` of 32 magnitudes, a code in each word.
template <class Out>
NEMO_FP8_INLINE __m512i encode_half_words(__m512i half) {
  constexpr int kDrop = Out::kShift - 16;
  constexpr int16_t kLeast = Out::kSmallestNormal >> 16;
  constexpr int16_t kBias = int16_t((kLeast >> kDrop) - (1 << (7 - kDrop))) << kDrop;
  constexpr int16_t kHalfOfSubnormal = kLeast - ((8 - kDrop) << 7);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(half, kDrop), _mm512_set1_epi16(1));
  const __m512i nearly = _mm512_add_epi16(half, _mm512_set1_epi16((1 << (kDrop - 1)) - 1 - kBias));
  const __m512i code = _mm512_srai_epi16(_mm512_add_epi16(nearly, odd), kDrop);
  const __m512i above = _mm512_sub_epi16(half, _mm512_set1_epi16(kHalfOfSubnormal));
  if (!_mm512_cmplt_epu16_mask(above, _mm512_set1_epi16(kLeast - kHalfOfSubnormal))) return code;
  const __m512i positive = _mm512_max_epi16(half, _mm512_setzero_si512());
  const __m512i even = _mm512_slli_epi32(positive, 16);
  const __m512i odds = _mm512_and_si512(positive, _mm512_set1_epi32(int32_t(0xffff0000)));
  return _mm512_max_epi16(code, subnormal_words<Out>(_mm512_castsi512_ps(even), _mm512_castsi512_ps(odds)));
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
  alignas(64) int32_t row_shift[kBlocks][kBlock], column_shift[kWidth];
#ifdef NEMO_FP8_AVX512
  alignas(64) __m512i halves[kBlock][kBlocks];
#else
  alignas(64) __m256i halves[kBlock][2 * kBlocks];  // 32 values are two of them
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
    bool quick = find_shifts(column_max, blocks * kBlock, column_kept, column_shift);
    quick &= find_shifts(row_max[0], blocks * kBlock, row_kept[0], row_shift[0]);
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
      const float* values = x.read(at, blocks * kBlock, buffer);
      for (int b = 0; b < blocks; ++b) observe(i, b, values + b * kBlock, column_max + b * kBlock);
    }
  }

#ifdef NEMO_FP8_AVX512
  // Row i of block b.
  NEMO_FP8_INLINE void observe(int i, int b, const float* values, int32_t* down) {
    const __m512i magnitude = _mm512_set1_epi32(kMagnitude);
    const __m512i first = _mm512_loadu_si512(values), second = _mm512_loadu_si512(values + 16);
    const __m512i full[2] = {_mm512_and_si512(first, magnitude), _mm512_and_si512(second, magnitude)};
    _mm512_store_si512(down, _mm512_max_epi32(_mm512_load_si512(down), full[0]));
    _mm512_store_si512(down + 16, _mm512_max_epi32(_mm512_load_si512(down + 16), full[1]));
    const __m512i seen = _mm512_max_epi32(full[0], full[1]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(along[b][i / 8][i % 8]),
                       _mm256_max_epi32(_mm512_castsi512_si256(seen), _mm512_extracti64x4_epi64(seen, 1)));
    halves[i][b] = upper_halves(first, second);
  }
#else
  // Row i of block b.
  NEMO_FP8_INLINE void observe(int i, int b, const float* values, int32_t* column) {
    const __m256i magnitude = _mm256_set1_epi32(kMagnitude);
    __m256i seen = _mm256_setzero_si256(), bits[kVectors];
    auto* down = reinterpret_cast<__m256i*>(column);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      bits[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + v * 8));
      const __m256i full = _mm256_and_si256(bits[v], magnitude);
      _mm256_store_si256(down + v, _mm256_max_epi32(_mm256_load_si256(down + v), full));
      seen = _mm256_max_epi32(seen, full);
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(along[b][i / 8][i % 8]), seen);
    halves[i][2 * b] = upper_halves(bits[0], bits[1]);
    halves[i][2 * b + 1] = upper_halves(bits[2], bits[3]);
  }
#endif

  // E8M0 scales and what they add to an upper half, in both halves of a word. False where a number may be infinite,
  // NaN or, scaled, made of a subnormal one.
  bool find_shifts(const int32_t* amax, int count, uint8_t* kept, int32_t* shift) {
    constexpr int32_t kSmallest = 32;
    const float reciprocal_of_max = generic.rule.reciprocal_of_max;
    Ints most{}, least = Ints{} + 255;
    for (int i = 0; i < count; i += kLanes) {
      const Ints largest = load_lanes<Ints>(amax + i);
      const Ints wanted = Ints(Floats(largest) * reciprocal_of_max);
      // Unsigned: of a NaN the sum is beyond an int.
      const Ints rounded = smaller(Ints((Words(wanted) + 0x007fffffu) >> 23), Ints{} + 254);
      const Ints exponent = wanted <= 0x00400000 ? Ints{} : rounded;
      const Ints zero = largest == 0;  // all bits where it holds
      most = larger(most, largest);
      least = smaller(least, exponent | (zero & 255));
      const Ints add = (127 - exponent) * 128 & ~zero;
      store_lanes(__builtin_convertvector(exponent, Bytes), kept + i);
      store_lanes((add & 0xffff) | add << 16, shift + i);
    }
    return largest_lane(most) < kInfinity && 255 - largest_lane(255 - least) >= kSmallest;
  }

  void keep_scales(int64_t number, int64_t j0, int blocks) {
    const auto& rows = generic.rowwise;
    const auto& columns = generic.columnwise;
    if (rows.codes) {
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

#ifdef NEMO_FP8_AVX512
  void encode(int64_t i0, int64_t j0, int blocks) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), sign = _mm512_set1_epi8(char(0x80));
    __m512i down[kBlocks];
    for (int b = 0; b < blocks; ++b) {
      down[b] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_load_si512(column_shift + b * kBlock),
                                        _mm512_load_si512(column_shift + b * kBlock + 16));
    }
    uint8_t *row_codes = generic.rowwise.codes, *column_codes = generic.columnwise.codes;
    for (int i = 0; i < kBlock; ++i) {
      const int64_t at = (i0 + i) * generic.k + j0;
      for (int b = 0; b < blocks; b += 2) {
        const int next = std::min(b + 1, blocks - 1);  // of an odd number the last one twice
        const __m512i first = halves[i][b], second = halves[i][next];
        const __m512i signs = _mm512_packs_epi16(first, second);
        const __m512i bare[2] = {_mm512_and_si512(first, magnitude), _mm512_and_si512(second, magnitude)};
        const auto write = [&](uint8_t* codes, __m512i add, __m512i add_next) __attribute__((always_inline)) {
          // Packing saturates: what is below zero has the code 0.
          const __m512i packed = _mm512_packus_epi16(encode_half_words<Out>(_mm512_add_epi16(bare[0], add)),
                                                     encode_half_words<Out>(_mm512_add_epi16(bare[1], add_next)));
          const __m512i bytes = in_order(_mm512_ternarylogic_epi32(packed, signs, sign, 0xf8));  // a | (b & c)
          if (next > b) {
            _mm512_storeu_si512(codes + at + b * kBlock, bytes);
          } else {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + at + b * kBlock), _mm512_castsi512_si256(bytes));
          }
        };
        if (row_codes) write(row_codes, _mm512_set1_epi32(row_shift[b][i]), _mm512_set1_epi32(row_shift[next][i]));
        if (column_codes) write(column_codes, down[b], down[next]);
      }
    }
  }
#else
  void encode(int64_t i0, int64_t j0, int blocks) {
    const __m256i together = _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15,  //
                                              0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i magnitude = _mm256_set1_epi16(0x7fff), sign = _mm256_set1_epi8(char(0x80));
    __m256i down[2 * kBlocks];
    for (int h = 0; h < 2 * blocks; ++h) {
      const auto* shift = reinterpret_cast<const __m256i*>(column_shift + h * 16);
      down[h] = _mm256_blend_epi16(_mm256_load_si256(shift), _mm256_load_si256(shift + 1), 0xaa);
    }
    uint8_t *row_codes = generic.rowwise.codes, *column_codes = generic.columnwise.codes;
    for (int i = 0; i < kBlock; ++i) {
      const int64_t at = (i0 + i) * generic.k + j0;
      for (int b = 0; b < blocks; ++b) {
        const __m256i first = halves[i][2 * b], second = halves[i][2 * b + 1];
        const __m256i signs = _mm256_and_si256(_mm256_packs_epi16(first, second), sign);
        const __m256i bare[2] = {_mm256_and_si256(first, magnitude), _mm256_and_si256(second, magnitude)};
        const auto write = [&](uint8_t* codes, __m256i add_first, __m256i add_second) __attribute__((always_inline)) {
          const __m256i mixed = _mm256_or_si256(
              encode_halves<Out>(_mm256_add_epi16(bare[0], add_first), _mm256_add_epi16(bare[1], add_second)), signs);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + at + b * kBlock),
                              _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(mixed, together), order));
        };
        if (row_codes) {
          const __m256i along_row = _mm256_set1_epi32(row_shift[b][i]);
          write(row_codes, along_row, along_row);
        }
        if (column_codes) write(column_codes, down[2 * b], down[2 * b + 1]);
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
