// Splitting work over threads, and transposing tiles of bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace fp8 {

// Calls work(first, last) over [0, count) on up to `threads` threads. Threads are started for the call and
// joined in it: nothing survives that a fork or an interpreter's end could trip over.
template <class Work>
void parallel(int64_t count, int32_t threads, Work&& work) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, count));
  std::vector<std::thread> others;
  int64_t begun = 1;
  for (; begun < parts; ++begun) {
    try {
      others.emplace_back(work, count * begun / parts, count * (begun + 1) / parts);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: the rest is done here
    }
  }
  work(int64_t(0), count / parts);
  if (begun < parts) work(count * begun / parts, count);
  for (auto& thread : others) thread.join();
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

// out[j * out_stride + i] = in[i * in_stride + j]
inline void transpose(const uint8_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint8_t* out,
                      int64_t out_stride) {
  const int64_t whole_rows = rows & ~int64_t(7), whole_columns = columns & ~int64_t(7);
  for (int64_t j = 0; j < whole_columns; j += 8) {
    for (int64_t i = 0; i < whole_rows; i += 8) {
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
