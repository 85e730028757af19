// What telemetry reads of block scales: a histogram of their codes for every operand, and from it the
// distribution. Reference: telemetry/probes/scale_codes.py, telemetry/probes/blocks.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "elements.hpp"
#include "scale_place.hpp"

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

// Counts of codes. Where these are few different ones, as in most tensors, they are looked for one after the
// other, at many positions at once. Else each is added where it belongs. Neighbouring scales are alike, and adding
// to one place twice in a row waits for the first: so neighbours are counted in different copies.
class Histogram {
 public:
  void add(const uint8_t* codes, int64_t count) {
    for (int64_t begin = 0; begin < count; begin += kPart) add_part(codes + begin, std::min(kPart, count - begin));
  }

  void add(uint8_t code, int64_t position) { ++copies_[position % 8][code]; }

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
    if (highest - lowest >= kFew) return add_each(codes, count);
    int64_t rest = whole;
    for (int code = lowest; code <= highest; ++code) {
      const int64_t found = count_equal(codes, whole, uint8_t(code));
      copies_[0][code] += uint32_t(found);
      rest -= found;
    }
    copies_[0][0] += uint32_t(rest);
    add_each(codes + whole, count - whole);
  }

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
        for (int64_t i = begin; i < begin + length; ++i) {
          found.add(values[i]);
          histogram.add(uint8_t(as_bits(values[i]) >> 23 & 0xff), i);
        }
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
