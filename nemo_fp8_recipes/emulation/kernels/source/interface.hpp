// How the C interface is written: plain pointers and numbers, called through ctypes. Matrices are contiguous and
// row-major; a null pointer means that the output is not asked for. A family of functions is a file, so that they
// are compiled side by side.
#pragma once

#define KERNEL extern "C" __attribute__((visibility("default")))
