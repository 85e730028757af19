// Per-tensor FP8.
#include "decode.hpp"
#include "interface.hpp"
#include "per_tensor.hpp"

using namespace fp8;

KERNEL float nemo_fp8_amax(const void* x, int32_t input, int64_t count, int32_t threads) {
  return amax({x, input}, count, threads);
}

KERNEL float nemo_fp8_cast(const void* x, int32_t input, int64_t m, int64_t k, int32_t format, float scale,
                           uint8_t* codes, uint8_t* transposed, int32_t observe, int32_t threads) {
  float result = 0.0f;
  with_format(format, [&](auto out) {
    result = cast<decltype(out)>({x, input}, m, k, scale, codes, transposed, observe != 0, threads);
  });
  return result;
}

KERNEL void nemo_fp8_decode(const uint8_t* codes, int64_t count, int32_t format, float* out, int32_t threads) {
  with_format(format, [&](auto in) {
    using In = decltype(in);
    parallel((count + kPiece - 1) / kPiece, threads, [&](int64_t first, int64_t last) {
      const int64_t begin = first * kPiece, end = std::min(last * kPiece, count);
      decode_row<In>(codes + begin, end - begin, out + begin);
    });
  });
}
