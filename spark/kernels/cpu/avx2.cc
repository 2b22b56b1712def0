#include "baseline.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")  // up to the end of the file, where templates are instantiated
#endif
#define SPARK_SET avx2
#define SPARK_WIDTH 8
#include "entry_points.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
