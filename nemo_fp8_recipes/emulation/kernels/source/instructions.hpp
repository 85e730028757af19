// Which instructions the kernels are written out for. What is written out for AVX2 takes 32 values at a time; elsewhere
// (and with NEMO_FP8_PORTABLE) the compiler vectorises. Both are the same arithmetic.
#pragma once

#if defined(__AVX2__) && defined(__F16C__) && !defined(NEMO_FP8_PORTABLE)
#define NEMO_FP8_AVX2
#include <immintrin.h>
#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    !defined(NEMO_FP8_NO_AVX512)
#define NEMO_FP8_AVX512
#endif
#endif

// What loops written out for AVX2 leave over: compiled once, and called. Elsewhere it is the loop.
#ifdef NEMO_FP8_AVX2
#define NEMO_FP8_REST NEMO_FP8_CALLED
#else
#define NEMO_FP8_REST inline
#endif
