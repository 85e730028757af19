// Splitting work over threads, and transposing tiles of bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "elements.hpp"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace fp8 {

constexpr int64_t kFar = 1 << 18;  // elements of a tensor that is too large for the caches of a core

// Work on [first, last), whatever it is: compiled once, however it is called.
class Work {
 public:
  template <class Function>
  explicit Work(Function& function)
      : function_(&function), call_([](void* work, int64_t first, int64_t last) {
          (*static_cast<Function*>(work))(first, last);
        }) {}

  void operator()(int64_t first, int64_t last) const { call_(function_, first, last); }

 private:
  void* function_;
  void (*call_)(void*, int64_t, int64_t);
};

// Does all of `work`, [0, count), on up to `threads` threads: in team.cpp.
void run_parts(int64_t count, int64_t threads, Work work);

// Calls function(first, last) for parts that cover [0, count), on up to `threads` threads: those of the team, else
// new ones that end with the call. Whatever number of threads is really given, all of it is done.
template <class Function>
void parallel(int64_t count, int32_t threads, Function&& function) {
  const Work work(function);
  const int64_t wanted = std::max<int64_t>(1, std::min<int64_t>(threads, count));
  if (wanted == 1) {
    work(0, count);
  } else {
    run_parts(count, wanted, work);
  }
}

// Transposes eight rows of eight bytes, a row a word (little endian).
inline void transpose_8x8(uint64_t (&row)[8]) {
  for (int i = 0; i < 4; ++i) {
    const uint64_t swap = (row[i] >> 32 ^ row[i + 4]) & 0x00000000ffffffffull;
    row[i] ^= swap << 32;
    row[i + 4] ^= swap;
  }
  for (int i : {0, 1, 4, 5}) {
    const uint64_t swap = (row[i] >> 16 ^ row[i + 2]) & 0x0000ffff0000ffffull;
    row[i] ^= swap << 16;
    row[i + 2] ^= swap;
  }
  for (int i : {0, 2, 4, 6}) {
    const uint64_t swap = (row[i] >> 8 ^ row[i + 1]) & 0x00ff00ff00ff00ffull;
    row[i] ^= swap << 8;
    row[i + 1] ^= swap;
  }
}

#ifdef __SSE2__
// out[j * out_stride + i] = in[i * in_stride + j] of sixteen rows and columns: four rounds of interleaving.
inline void transpose_16x16(const uint8_t* in, int64_t in_stride, uint8_t* out, int64_t out_stride) {
  __m128i row[16], next[16];
  for (int r = 0; r < 16; ++r) row[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + r * in_stride));
  for (int round = 0; round < 4; ++round) {
    for (int r = 0; r < 8; ++r) {
      next[2 * r] = _mm_unpacklo_epi8(row[r], row[r + 8]);
      next[2 * r + 1] = _mm_unpackhi_epi8(row[r], row[r + 8]);
    }
    for (int r = 0; r < 16; ++r) row[r] = next[r];
  }
  for (int r = 0; r < 16; ++r) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + r * out_stride), row[r]);
}
#endif

// out[j * out_stride + i] = in[i * in_stride + j]
NEMO_FP8_CALLED inline void transpose(const uint8_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint8_t* out,
                      int64_t out_stride) {
  const int64_t whole_rows = rows & ~int64_t(7), whole_columns = columns & ~int64_t(7);
  int64_t wide_rows = 0, wide_columns = 0;
#ifdef __SSE2__
  wide_rows = rows & ~int64_t(15), wide_columns = columns & ~int64_t(15);
  for (int64_t j = 0; j < wide_columns; j += 16) {
    for (int64_t i = 0; i < wide_rows; i += 16) {
      transpose_16x16(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
    }
  }
#endif
  for (int64_t j = 0; j < whole_columns; j += 8) {
    for (int64_t i = j < wide_columns ? wide_rows : 0; i < whole_rows; i += 8) {
      uint64_t block[8];
      for (int r = 0; r < 8; ++r) std::memcpy(&block[r], in + (i + r) * in_stride + j, 8);
      transpose_8x8(block);
      for (int r = 0; r < 8; ++r) std::memcpy(out + (j + r) * out_stride + i, &block[r], 8);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) {
      out[j * out_stride + i] = in[i * in_stride + j];
    }
  }
}

}  // namespace fp8
