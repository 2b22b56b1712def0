#include "baseline.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")  // up to the end of the file
#endif
#define SPARK_SET avx512
#define SPARK_WIDTH 16
#include "entry_points.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
