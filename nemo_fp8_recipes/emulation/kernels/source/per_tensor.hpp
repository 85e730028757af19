// Per-tensor FP8: amax, and the cast under a given scale, with the transposed codes on the way.
// Reference: numerics/tensorwise.py, numerics/delayed.py.
#pragma once

#include <atomic>
#include <optional>

#include "bfloat16.hpp"
#include "elements.hpp"
#include "encode.hpp"
#include "float32.hpp"
#include "largest.hpp"
#include "loops.hpp"

namespace fp8 {

constexpr int64_t kPiece = 2048;  // elements of a contiguous piece, small enough for the first-level cache
constexpr int64_t kTile = 64;     // rows that are transposed together

inline void raise_to(std::atomic<int32_t>& largest, int32_t candidate) {
  int32_t seen = largest.load();
  while (candidate > seen && !largest.compare_exchange_weak(seen, candidate)) {
  }
}

// From the end to the beginning: the end is what a producer wrote last, and the beginning is what a cast reads first;
// both are then in a core's caches as far as they have room.
inline float amax(Input x, int64_t count, int32_t threads) {
  constexpr int64_t kChunk = 32 * kPiece;
  std::atomic<int32_t> largest{0};
  parallel((count + kPiece - 1) / kPiece, threads, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kPiece;
    int64_t end = std::min(last * kPiece, count);
    int32_t seen = 0;
    while (end > begin) {
      const int64_t length = std::min(kChunk, end - begin);
      end -= length;
      seen = std::max(seen, largest_magnitude(x, end, length));
    }
    raise_to(largest, seen);
  });
  return as_float(largest.load());
}

// Codes of a tensor of `count` values under one scale, a piece at a time.
template <class Out>
class Encoder {
 public:
  Encoder(Input x, int64_t count, float scale) : x_(x), scale_(scale), far_(count > kFar) {
    if (count < kWorthTable) return;
#ifdef NEMO_FP8_AVX512
    if (x.type == kFloat32) addends_.emplace(scale);
#endif
#ifdef NEMO_FP8_TABLE
    if (x.type == kBFloat16) table_.emplace(scale);
#endif
  }

  // Codes of `count` values from `offset`; returns their amax where `observe` is set.
  int32_t encode(int64_t offset, int64_t count, uint8_t* codes, bool observe) const {
    int32_t seen = 0;
    Lookups lookups;
    for (int64_t begin = offset; begin < offset + count; begin += kPiece) {
      const int64_t end = std::min(begin + kPiece, offset + count);
      if (observe) seen = std::max(seen, largest_magnitude(x_, begin, end - begin));
      for (int64_t at = begin; at < end; at += kStep) {
        // What is observed next, else what is encoded next.
        if (far_) x_.prefetch(at + (observe ? kPiece : kAhead), kStep);
        encode_step(at, std::min(kStep, end - at), codes + at, lookups);
      }
    }
    return seen;
  }

 private:
  static constexpr int64_t kStep = 256, kAhead = 512;

  struct Lookups {
    int64_t done = 0, missed = 0;  // values, and 64s of them
    bool worthwhile() const { return 4 * 64 * missed <= done + kPiece; }
  };

  void encode_step(int64_t begin, int64_t length, uint8_t* codes, Lookups& lookups) const {
    int64_t done = 0;
#ifdef NEMO_FP8_AVX512
    if (x_.type == kBFloat16) {
      done = encode_halves(static_cast<const uint16_t*>(x_.data) + begin, length, codes, lookups);
    } else if (addends_ && addends_->usable() && lookups.worthwhile()) {
      done = addends_->encode(static_cast<const float*>(x_.data) + begin, length, codes, lookups.missed);
      lookups.done += done;
    }
    if (done == length) return;
#endif
    alignas(64) float buffer[kStep];
    encode_row<Out>(x_.read(begin + done, length - done, buffer), length - done, scale_, codes + done);
  }

#ifdef NEMO_FP8_AVX512
  int64_t encode_halves(const uint16_t* x, int64_t count, uint8_t* codes, Lookups& lookups) const {
#ifdef NEMO_FP8_TABLE
    if (table_ && table_->usable() && lookups.worthwhile()) {
      const int64_t done = table_->encode(x, count, codes, lookups.missed);
      lookups.done += done;
      return done;
    }
#endif
    return encode_bfloat16<Out>(x, count, scale_, codes);
  }
#endif

  Input x_;
  float scale_;
  bool far_;  // the tensor is too large for the caches of a core
  static constexpr int64_t kWorthTable = 4096;
#ifdef NEMO_FP8_AVX512
  std::optional<Float32Codes<Out>> addends_;
#endif
#ifdef NEMO_FP8_TABLE
  std::optional<Bfloat16Codes<Out>> table_;
#endif
};

// Codes of x [m, k] under `scale`; their transpose [k, m] where `transposed` is not null; the amax of x on the
// way where `observe` is set (else 0).
template <class Out>
float cast(Input x, int64_t m, int64_t k, float scale, uint8_t* codes, uint8_t* transposed, bool observe,
           int32_t threads) {
  const Encoder<Out> encoder(x, m * k, scale);
  std::atomic<int32_t> largest{0};
  if (!transposed) {
    const int64_t count = m * k;
    parallel((count + kPiece - 1) / kPiece, threads, [&](int64_t first, int64_t last) {
      const int64_t begin = first * kPiece, end = std::min(last * kPiece, count);
      raise_to(largest, encoder.encode(begin, end - begin, codes, observe));
    });
    return as_float(largest.load());
  }
  parallel((m + kTile - 1) / kTile, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first * kTile; i < std::min(last * kTile, m); i += kTile) {
      const int64_t rows = std::min(kTile, m - i);
      raise_to(largest, encoder.encode(i * k, rows * k, codes, observe));
      for (int64_t j = 0; j < k; j += kTile) {
        transpose(codes + i * k + j, k, rows, std::min(kTile, k - j), transposed + j * m + i, m);
      }
    }
  });
  return as_float(largest.load());
}

}  // namespace fp8
