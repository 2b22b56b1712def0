#include "begin.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define SPARK_SET avx2
#define SPARK_WIDTH 8
#include "bodies.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif  // for GCC to the end of the file, where templates are instantiated
#endif
