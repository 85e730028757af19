// Splitting work over threads, and transposing tiles of bytes.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace fp8 {

// `GOMP_parallel(function, argument, threads, flags)` of an OpenMP runtime: calls function(argument) on a team
// of threads that it keeps. GNU's, LLVM's and Intel's runtimes all have it.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The team of torch's own runtime, where there is one. Its threads wait for work by spinning for a while: a
// thread of our own beside them would only find the core taken.
inline std::atomic<Team>& team() {
  static std::atomic<Team> shared{nullptr};
  return shared;
}

inline void use_team(Team parallel) {
  // A forked child has none of its parent's threads, and OpenMP runtimes wait for them for ever.
  static const int watched = pthread_atfork(nullptr, nullptr, [] { team().store(nullptr); });
  if (watched == 0) team().store(parallel);
}

// A range of work that any number of threads take their next part from.
template <class Work>
struct Shared {
  Work& work;
  int64_t count, parts;
  std::atomic<int64_t> next{0};

  void run() {
    for (int64_t part = next++; part < parts; part = next++) {
      work(count * part / parts, count * (part + 1) / parts);
    }
  }
};

// Calls work(first, last) for parts that cover [0, count), on up to `threads` threads: those of the team, else
// new ones that end with the call. Whatever number of threads is really given, all of it is done.
template <class Work>
void parallel(int64_t count, int32_t threads, Work&& work) {
  const int64_t wanted = std::max<int64_t>(1, std::min<int64_t>(threads, count));
  if (wanted == 1) {
    work(int64_t(0), count);
    return;
  }
  // Twice as many parts as threads: one that starts late does less.
  Shared<Work> shared{work, count, std::min(2 * wanted, count)};
  if (const Team run_on_team = team().load()) {
    run_on_team([](void* job) { static_cast<Shared<Work>*>(job)->run(); }, &shared, unsigned(wanted), 0);
    return;
  }
  std::vector<std::thread> others;
  try {
    for (int64_t begun = 1; begun < wanted; ++begun) others.emplace_back([&] { shared.run(); });
  } catch (const std::system_error&) {
    // No more threads to be had: those that there are do it.
  }
  shared.run();
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
inline void transpose(const uint8_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint8_t* out,
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
