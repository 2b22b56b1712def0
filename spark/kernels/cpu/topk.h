// Statistical top-k: a threshold theta = mean + std * Q(1 - k / n) of n scores, and the scores that reach it.
//
// `compact` is the only data-dependent step. It writes the survivors and their indices densely, a vector at a time.
#pragma once

#include "vec.h"

namespace spark::SPARK_SET {
namespace {

struct Moments { float mean, std; };

// In two passes, of which the second is cheap because the scores are in cache; the variance is over n - ddof.
INLINE Moments moments(const float* s, int n, int ddof = 1) {
  VecF total = {};
  int i = 0;
  for (; i + W <= n; i += W) total += load(s + i);
  float mean = horizontal_sum(total);
  for (; i < n; ++i) mean += s[i];
  mean /= n;
  VecF squares = {};
  for (i = 0; i + W <= n; i += W) {
    VecF d = load(s + i) - mean;
    squares += d * d;
  }
  float variance = horizontal_sum(squares);
  for (; i < n; ++i) variance += (s[i] - mean) * (s[i] - mean);
  return {mean, std::sqrt(variance / max(n - ddof, 1))};
}

INLINE float maximum(const float* s, int n) {
  if (n < W) {
    float m = s[0];
    for (int i = 1; i < n; ++i) m = s[i] > m ? s[i] : m;
    return m;
  }
  VecF m = load(s);
  for (int i = W; i + W <= n; i += W) m = max(m, load(s + i));
  m = max(m, load(s + n - W));
  float most = m[0];
  for (int i = 1; i < W; ++i) most = m[i] > most ? m[i] : most;
  return most;
}

#if SPARK_WIDTH == 8
constexpr auto SET_LANES = [] {  // the indices of each mask's set bits, densely
  struct { uint8_t lanes[256][8]; } table{};
  for (int mask = 0; mask < 256; ++mask)
    for (int lane = 0, n = 0; lane < 8; ++lane)
      if (mask >> lane & 1) table.lanes[mask][n++] = lane;
  return table;
}();
#endif
// Writes the scores s[0..n) >= theta densely to `kept` and their indices to `list`; returns how many. Both need room for n + W.
INLINE int compact(const float* s, int n, float theta, int* list, float* kept) {
  int count = 0, i = 0;
#if SPARK_WIDTH == 16
  __m512i indices = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + W <= n; i += W) {
    const __m512 v = _mm512_loadu_ps(s + i);
    const __mmask16 mask = _mm512_cmp_ps_mask(v, _mm512_set1_ps(theta), _CMP_GE_OQ);
    _mm512_storeu_ps(kept + count, _mm512_maskz_compress_ps(mask, v));
    _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32(mask, indices));
    indices = _mm512_add_epi32(indices, _mm512_set1_epi32(W));
    count += __builtin_popcount(mask);
  }
#elif SPARK_WIDTH == 8
  for (; i + W <= n; i += W) {
    const __m256 v = _mm256_loadu_ps(s + i);
    const int mask = _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(theta), _CMP_GE_OQ));
    const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)SET_LANES.lanes[mask]));
    _mm256_storeu_ps(kept + count, _mm256_permutevar8x32_ps(v, order));
    _mm256_storeu_si256((__m256i*)(list + count), _mm256_add_epi32(order, _mm256_set1_epi32(i)));
    count += __builtin_popcount(mask);
  }
#endif
  for (; i < n; ++i) {
    list[count] = i;
    kept[count] = s[i];
    count += s[i] >= theta;
  }
  return count;
}

}  // namespace
}  // namespace spark::SPARK_SET
