#include "begin.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#endif
#define SPARK_SET avx512
#define SPARK_WIDTH 16
#include "bodies.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif  // for GCC to the end of the file, where templates are instantiated
#endif
