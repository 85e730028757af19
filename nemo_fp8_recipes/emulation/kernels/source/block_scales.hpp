// What telemetry reads of block scales: a histogram of their codes for every operand, and from it the
// distribution. Reference: telemetry/probes/scale_codes.py, telemetry/probes/blocks.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "elements.hpp"
#include "instructions.hpp"
#include "scale_place.hpp"

#if defined(NEMO_FP8_AVX512) && defined(__AVX512VPOPCNTDQ__)
#define NEMO_FP8_CODE_PLANES
#endif

namespace fp8 {

constexpr int64_t kCodes = 256;

// How one tensor's scales lie in memory: rows and columns in use and allocated; `swizzle` is 1 for tiles of the
// array, 2 for tiles of the transposed one.
struct ScaleGrid {
  int64_t rows, columns, all_rows, all_columns, swizzle;

  bool whole() const { return rows * columns == all_rows * all_columns; }

  // Calls `visit(position, length)` for pieces in use that are contiguous. Their order is that of the memory
  // only where nothing is swizzled, which no histogram depends on.
  template <class Visit>
  void pieces(Visit visit) const {
    if (whole()) return visit(int64_t(0), rows * columns);
    if (!swizzle) {
      for (int64_t row = 0; row < rows; ++row) visit(row * all_columns, columns);
      return;
    }
    const bool transposed = swizzle == 2;
    const ScalePlace place{0, 0, (transposed ? all_rows : all_columns) / 4};
    const int64_t outer = transposed ? columns : rows, blocks = transposed ? rows : columns;
    for (int64_t row = 0; row < outer; ++row)
      for (int64_t block = 0; block < blocks; block += 4)
        visit(place.at(row, block), std::min<int64_t>(4, blocks - block));
  }
};

typedef uint8_t CodeLanes __attribute__((vector_size(64)));
constexpr int64_t kCodeLanes = sizeof(CodeLanes);

inline CodeLanes code_lanes_at(const uint8_t* codes) {
  CodeLanes lanes;
  std::memcpy(&lanes, codes, sizeof lanes);
  return lanes;
}

// How many of `count` codes, of whole lanes, are `code`.
inline int64_t count_equal(const uint8_t* codes, int64_t count, uint8_t code) {
  int64_t found = 0;
  for (int64_t begin = 0; begin < count;) {
    const int64_t end = std::min(count, begin + 255 * kCodeLanes);  // a lane counts to 255
    CodeLanes lanes = {};
    for (; begin < end; begin += kCodeLanes) lanes -= CodeLanes(code_lanes_at(codes + begin) == code);
    uint8_t each[kCodeLanes];
    std::memcpy(each, &lanes, sizeof each);
    for (uint8_t lane : each) found += lane;
  }
  return found;
}

#ifdef NEMO_FP8_CODE_PLANES
// The bits of codes, each of the eight by itself: 512 of a kind are one register. Codes that are alike in their
// upper four bits are counted together, sixteen in as many registers.
class CodePlanes {
 public:
  static constexpr int64_t kCodes = 512, kMost = 1 << 14;

  // Takes `count` codes, of whole planes.
  void take(const uint8_t* codes, int64_t count) {
    planes_ = count / kCodes;
    for (int64_t plane = 0; plane < planes_; ++plane)
      for (int word = 0; word < 8; ++word) {
        const __m512i lanes = _mm512_loadu_si512(codes + plane * kCodes + 64 * word);
        for (int bit = 0; bit < 8; ++bit)
          bits_[plane][bit][word] = _mm512_test_epi8_mask(lanes, _mm512_set1_epi8(char(1 << bit)));
      }
  }

  // Adds the numbers of the codes from 16 * `upper` on to `counts`.
  void count(int upper, uint32_t* counts) const {
    __m512i sums[16];
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    for (int64_t plane = 0; plane < planes_; ++plane) {
      const auto bits = [&](int bit) { return _mm512_load_si512(bits_[plane][bit]); };
      const auto alike = [&](int bit) {
        const bool set = upper >> (bit - 4) & 1;
        return set ? bits(bit) : _mm512_andnot_si512(bits(bit), _mm512_set1_epi64(-1));
      };
      const __m512i those = _mm512_and_si512(_mm512_and_si512(alike(4), alike(5)), _mm512_and_si512(alike(6), alike(7)));
      __m512i low[4], high[4];  // by two bits
      pairs(bits(0), bits(1), _mm512_set1_epi64(-1), low);
      pairs(bits(2), bits(3), those, high);
      for (int code = 0; code < 16; ++code)
        sums[code] = _mm512_add_epi64(sums[code], _mm512_popcnt_epi64(_mm512_and_si512(high[code / 4], low[code % 4])));
    }
    for (int code = 0; code < 16; ++code) counts[16 * upper + code] += uint32_t(_mm512_reduce_add_epi64(sums[code]));
  }

 private:
  static void pairs(__m512i first, __m512i second, __m512i among, __m512i (&found)[4]) {
    found[0] = _mm512_andnot_si512(_mm512_or_si512(first, second), among);
    found[1] = _mm512_and_si512(_mm512_andnot_si512(second, first), among);
    found[2] = _mm512_and_si512(_mm512_andnot_si512(first, second), among);
    found[3] = _mm512_and_si512(_mm512_and_si512(first, second), among);
  }

  alignas(64) uint64_t bits_[kMost / kCodes][8][8];
  int64_t planes_ = 0;
};
#endif

// Counts of codes. Where these are few different ones, as in most tensors, they are looked for one after the
// other, at many positions at once. Else each is added where it belongs. Neighbouring scales are alike, and adding
// to one place twice in a row waits for the first: so neighbours are counted in different copies.
class Histogram {
 public:
  void add(const uint8_t* codes, int64_t count) {
    for (int64_t begin = 0; begin < count; begin += kPart) add_part(codes + begin, std::min(kPart, count - begin));
  }

  // Counts the exponents of fp32 numbers.
  void add_exponents(const float* values, int64_t count) {
    uint8_t codes[kPart];
    for (int64_t begin = 0; begin < count; begin += kPart) {
      const int64_t length = std::min(kPart, count - begin);
      for (int64_t i = 0; i < length; ++i) codes[i] = uint8_t(as_bits(values[begin + i]) >> 23 & 0xff);
      add(codes, length);
    }
  }

  // Adds what was counted to `counts` and forgets it.
  void move_to(int64_t* counts) {
    for (int64_t code = 0; code < kCodes; ++code) {
      uint64_t sum = 0;
      for (auto& copy : copies_) sum += copy[code];
      counts[code] += int64_t(sum);
    }
    std::memset(copies_, 0, sizeof copies_);
  }

 private:
  static constexpr int64_t kPart = 1 << 14;  // small enough for the first-level cache
  static constexpr int kFew = 24;            // different codes for which looking for each is faster

  void add_part(const uint8_t* codes, int64_t count) {
    const int64_t whole = count / kCodeLanes * kCodeLanes;
    CodeLanes least = ~CodeLanes{}, most = {};  // of those that are not 0, which stands apart
    for (int64_t i = 0; i < whole; i += kCodeLanes) {
      const CodeLanes lanes = code_lanes_at(codes + i), lifted = lanes - 1;  // 0 becomes 255
      least = lifted < least ? lifted : least;
      most = lanes > most ? lanes : most;
    }
    int lowest = 255, highest = 0;
    for (int64_t lane = 0; lane < kCodeLanes; ++lane) {
      lowest = std::min(lowest, least[lane] + 1);
      highest = std::max(highest, int(most[lane]));
    }
    count_between(codes, whole, lowest, highest);
    add_each(codes + whole, count - whole);
  }

#ifdef NEMO_FP8_CODE_PLANES
  // Counts codes that are 0 or from `lowest` to `highest`.
  void count_between(const uint8_t* codes, int64_t count, int lowest, int highest) {
    const int64_t whole = count / CodePlanes::kCodes * CodePlanes::kCodes;
    planes_.take(codes, whole);
    if (lowest >= 16) planes_.count(0, copies_[0]);
    for (int upper = lowest / 16; upper <= highest / 16; ++upper) planes_.count(upper, copies_[0]);
    add_each(codes + whole, count - whole);
  }

  CodePlanes planes_;
#else
  void count_between(const uint8_t* codes, int64_t count, int lowest, int highest) {
    if (highest - lowest >= kFew) return add_each(codes, count);
    int64_t rest = count;
    for (int code = lowest; code <= highest; ++code) {
      const int64_t found = count_equal(codes, count, uint8_t(code));
      copies_[0][code] += uint32_t(found);
      rest -= found;
    }
    copies_[0][0] += uint32_t(rest);
  }
#endif

  void add_each(const uint8_t* codes, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, codes + i, 8);
      for (int copy = 0; copy < 8; ++copy) ++copies_[copy][eight >> (8 * copy) & 0xff];
    }
    for (; i < count; ++i) ++copies_[0][codes[i]];
  }

  uint32_t copies_[8][kCodes] = {};
};

// What fp32 scales have beyond their exponents. A NaN wins both extremes, as torch has it.
struct ExactScales {
  double largest = -std::numeric_limits<double>::infinity();
  double smallest = std::numeric_limits<double>::infinity();
  double sum = 0, squares = 0, number = 0;

  void add(float scale) {
    const double value = scale;
    if (value > largest || value != value) largest = value;
    if (value < smallest || value != value) smallest = value;
    sum += value;
    squares += value * value;
    number += 1;
  }

  // Many at once, in sums that do not wait for each other.
  void add(const float* values, int64_t count) {
    constexpr int kLanes = 16;
    const float infinity = std::numeric_limits<float>::infinity();
    float most[kLanes], least[kLanes];
    double sums[kLanes] = {}, products[kLanes] = {};
    int32_t unknown[kLanes] = {};
    std::fill(most, most + kLanes, -infinity);
    std::fill(least, least + kLanes, infinity);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) {
        const float value = values[i + lane];
        most[lane] = value > most[lane] ? value : most[lane];
        least[lane] = value < least[lane] ? value : least[lane];
        unknown[lane] |= value != value;
        sums[lane] += double(value);
        products[lane] += double(value) * double(value);
      }
    ExactScales found;
    for (int lane = 0; lane < kLanes && i; ++lane) {
      found.add(unknown[lane] ? std::numeric_limits<float>::quiet_NaN() : most[lane]);
      found.add(least[lane]);
    }
    found.sum = std::accumulate(sums, sums + kLanes, 0.0);
    found.squares = std::accumulate(products, products + kLanes, 0.0);
    found.number = double(i);
    add(found);
    for (; i < count; ++i) add(values[i]);
  }

  void add(const ExactScales& other) {
    if (other.largest > largest || other.largest != other.largest) largest = other.largest;
    if (other.smallest < smallest || other.smallest != other.smallest) smallest = other.smallest;
    sum += other.sum;
    squares += other.squares;
    number += other.number;
  }
};

// Counts of the codes of `tensors` scale arrays, added to row `slots[i]` of `counts`. fp32 scales are counted by
// their exponents, and described in `exact`, one entry a tensor.
inline void scale_counts(int64_t tensors, const void* const* scales, const ScaleGrid* grids, const int64_t* slots,
                         bool fp32, int64_t* counts, ExactScales* exact) {
  Histogram histogram;
  for (int64_t tensor = 0; tensor < tensors; ++tensor) {
    if (fp32) {
      const float* values = static_cast<const float*>(scales[tensor]);
      ExactScales found;
      grids[tensor].pieces([&](int64_t begin, int64_t length) {
        found.add(values + begin, length);
        histogram.add_exponents(values + begin, length);
      });
      exact[tensor] = found;
    } else {
      const uint8_t* codes = static_cast<const uint8_t*>(scales[tensor]);
      grids[tensor].pieces([&](int64_t begin, int64_t length) { histogram.add(codes + begin, length); });
    }
    histogram.move_to(counts + slots[tensor] * kCodes);
  }
}

// How block scales are stored: what each code stands for, ascending, Inf for those that are no number; the code
// of the largest scale; whether code 0 says that the block has nothing to scale.
struct ScaleCodes {
  const double* values;
  int64_t largest;
  bool zero_is_empty;
};

// The rows of the distribution, each of `operands` numbers `stride` apart, for the operand with these counts.
inline void describe_scales(const int64_t* counts, const ScaleCodes& format, const int64_t* percentiles,
                            int64_t percentile_count, const ExactScales* exact, double blocks, float* out,
                            int64_t stride) {
  int64_t cumulative[kCodes], total = 0;
  for (int64_t code = 0; code < kCodes; ++code) cumulative[code] = total += counts[code];
  const int64_t lowest = cumulative[0], number = format.zero_is_empty ? total - lowest : total;
  const int64_t behind = format.zero_is_empty ? lowest : 0;
  const auto at_rank = [&](int64_t rank) {
    if (format.zero_is_empty && number == 0) return 0.0;
    const int64_t place = std::lower_bound(cumulative, cumulative + kCodes, rank + behind) - cumulative;
    return format.values[std::min(place, kCodes - 1)];
  };
  double largest = at_rank(number), smallest = at_rank(1), mean, rms;
  if (exact) {
    largest = exact->largest;
    smallest = exact->smallest;
    mean = exact->sum / exact->number;
    rms = std::sqrt(exact->squares / exact->number);
  } else if (std::isinf(largest)) {
    mean = rms = std::numeric_limits<double>::infinity();
  } else {
    double sum = 0, squares = 0;
    for (int64_t code = format.zero_is_empty ? 1 : 0; code < kCodes; ++code) {
      if (!counts[code]) continue;
      sum += double(counts[code]) * format.values[code];
      squares += double(counts[code]) * (format.values[code] * format.values[code]);
    }
    const double among = double(std::max<int64_t>(number, 1));
    mean = sum / among;
    rms = std::sqrt(squares / among);
  }
  const auto put = [&](double value) {
    *out = float(value);
    out += stride;
  };
  put(largest);
  put(smallest);
  put(mean);
  put(rms);
  for (int64_t i = 0; i < percentile_count; ++i) put(at_rank((number * percentiles[i] + 99) / 100));
  // Integers divide in fp32, as in torch.
  put(float(lowest) / float(total));
  put(float(total - cumulative[format.largest - 1]) / float(total));
  put(blocks);
  put(double(number));
}

}  // namespace fp8
