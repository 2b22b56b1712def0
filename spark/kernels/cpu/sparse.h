// Products with a sparse matrix, whose rows are tokens (queries) and whose columns are neurons (keys), at the entries that survive top-k:
//
//   sampled    values[t, f] = a[t] . b[f]                       (for surviving entries only)
//   weighted   out[t] = sum over f of values[t, f] b[f]
//
// and `weighted` with the transposed matrix, out[f] = sum over t of values[t, f] a[t]. The forward and the backward pass of a Spark
// lookup are such products, and elementwise functions of the values.
//
// Blocking: the columns are cut into blocks, and the rows of b into tiles. All rows of the sparse matrix pass a tile of a block's rows
// of b while it is in the second-level cache, so b is read from memory once. The order of every sum depends on the shapes only.
#pragma once

#include "product.h"
#include "topk.h"

namespace spark::SPARK_SET {
namespace {

constexpr int BLOCK_COLUMNS = 512;                          // columns of the sparse matrix in a block
constexpr int DOT_TILE = 256;                               // floats of a row of b that `sampled` takes at a time
constexpr int SUM_VECTORS = 8, SUM_TILE = SUM_VECTORS * W;  // those of a row of out that `weighted` keeps in registers
constexpr int SUM_BLOCKS = 2;                               // blocks of which it adds before it writes

// (n, width), a row every `stride` floats
struct Table {
  const float* rows;
  int width, stride;
  Table(const float* rows, int width, int stride = 0) : rows(rows), width(width), stride(stride ? stride : width) {}
};

// Which entries of a sparse matrix there are: those of a block are contiguous, row by row.
class Pattern {
 public:
  const int rows, columns, blocks;

  Pattern(int rows, int columns)
      : rows(rows), columns(columns), blocks((columns + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS), starts_(size_t(blocks) * (rows + 1)) {}

  int* starts(int block) const { return starts_ + size_t(block) * (rows + 1); }  // (rows + 1) the first entry of each row
  int width(int block) const { return min(BLOCK_COLUMNS, columns - block * BLOCK_COLUMNS); }

  // Turns counts into starts: that of row t is at starts(block)[t + 1]. Returns the room that entries need: a block's last row may be
  // written by whole vectors.
  int sum_counts() const {
    int next = 0;
    for (int b = 0; b < blocks; ++b, next += W) {
      int* start = starts(b);
      start[0] = next;
      for (int t = 0; t < rows; ++t) next = start[t + 1] += next;
    }
    return next;
  }

 private:
  Scratch<int> starts_;
};

// f(block or tile, first row, last row + 1), for pieces of the rows that keep all threads busy.
template <class F>
void parallel_pieces(Pool& pool, int outer, int rows, F f) {
  if (!outer) return;
  const int pieces = max(1, min((rows + 63) / 64, (4 * pool.threads() + outer - 1) / outer));
  parallel(pool, outer * pieces, [&](int i) {
    const int piece = i % pieces;
    f(i / pieces, int(int64_t(rows) * piece / pieces), int(int64_t(rows) * (piece + 1) / pieces));
  });
}

// values[p] = a[t] . b[f] for every entry p in row t and column f. `columns` counts from the first column of the block.
void sampled(Pool& pool, const Pattern& pattern, const int* columns, Table a, Table b, float* values) {
  parallel_pieces(pool, pattern.blocks, pattern.rows, [&](int block, int lo, int hi) {
    const int* start = pattern.starts(block);
    const float* first = b.rows + size_t(block) * BLOCK_COLUMNS * b.stride;
    for (int at = 0; at < b.width; at += DOT_TILE) {
      const int n = min(DOT_TILE, b.width - at);
      for (int t = lo; t < hi; ++t) {
        const float* query = a.rows + size_t(t) * a.stride + at;
        groups_of_four(start[t + 1] - start[t], [&](auto size, int i) {
          constexpr int R = decltype(size)::value;
          const int p = start[t] + i;
          const float* keys[R];
          float out[R][1];
          for (int c = 0; c < R; ++c) keys[c] = first + size_t(columns[p + c]) * b.stride + at;
          dots<R, 1>(keys, &query, n, out);
          for (int c = 0; c < R; ++c) values[p + c] = at ? values[p + c] + out[c][0] : out[c][0];
        });
      }
    }
  });
}

// out[t] = sum over the entries p of row t of values[p] b[f], for all rows of the pattern; `add`: out[t] += ...
void weighted(Pool& pool, const Pattern& pattern, const int* columns, const float* values, Table b, float* out, int out_stride = 0,
              bool add = false) {
  if (!out_stride) out_stride = b.width;
  const int tiles = (b.width + SUM_TILE - 1) / SUM_TILE;
  parallel_pieces(pool, tiles, pattern.rows, [&](int tile, int lo, int hi) {
    const int at = tile * SUM_TILE, n = min(SUM_TILE, b.width - at);
    Scratch<float> packed(SUM_BLOCKS * BLOCK_COLUMNS * SUM_TILE);  // where rows lie a power of two apart, few of them fit in a cache
    for (int block = 0; block < pattern.blocks; block += SUM_BLOCKS) {
      const int end = min(block + SUM_BLOCKS, pattern.blocks), first = block * BLOCK_COLUMNS;
      const float* from = b.rows + size_t(first) * b.stride + at;
      for (int f = 0; f < min(end * BLOCK_COLUMNS, pattern.columns) - first; ++f) {
        float* row = packed + f * SUM_TILE;
        std::memcpy(row, from + size_t(f) * b.stride, sizeof(float) * n);
        std::memset(row + n, 0, sizeof(float) * (SUM_TILE - n));
      }
      for (int t = lo; t < hi; ++t) {
        VecF sums[SUM_VECTORS] = {};
        int entries = 0;
        for (int g = block; g < end; ++g) {
          const float* rows = packed + (g - block) * BLOCK_COLUMNS * SUM_TILE;
          const int* start = pattern.starts(g) + t;
          entries += start[1] - start[0];
          for (int p = start[0]; p < start[1]; ++p) {
            const float* row = rows + columns[p] * SUM_TILE;
#pragma GCC unroll 8
            for (int c = 0; c < SUM_VECTORS; ++c) sums[c] += values[p] * load(row + c * W);
          }
        }
        if (add && !entries) continue;
        float* to = out + size_t(t) * out_stride + at;
        if (n == SUM_TILE) {
#pragma GCC unroll 8
          for (int c = 0; c < SUM_VECTORS; ++c) store(to + c * W, block || add ? load(to + c * W) + sums[c] : sums[c]);
        } else {
          float tail[SUM_TILE];
#pragma GCC unroll 8
          for (int c = 0; c < SUM_VECTORS; ++c) store(tail + c * W, sums[c]);
          for (int c = 0; c < n; ++c) to[c] = block || add ? to[c] + tail[c] : tail[c];
        }
      }
    }
  });
}

// The entries of a pattern in the order of the transposed matrix, whose rows are the pattern's columns.
class Transposed {
 public:
  const Pattern pattern;

  Transposed(Pool& pool, const Pattern& original, const int* columns)
      : pattern(original.columns, original.rows), room_(count(pool, original, columns)), from_(room_), columns_(room_) {
    fill(pool, original, columns);
  }

  // out[f] = sum over the entries p of column f of values[p] a[t]
  void weighted(Pool& pool, const float* values, Table a, float* out, int out_stride = 0, bool add = false) const {
    Scratch<float> permuted(room_);
    parallel(pool, pattern.blocks, [&](int b) {
      for (int p = pattern.starts(b)[0], end = pattern.starts(b)[pattern.rows]; p < end; ++p) permuted[p] = values[from_[p]];
    });
    SPARK_SET::weighted(pool, pattern, columns_, permuted, a, out, out_stride, add);
  }

 private:
  const int room_;
  const Scratch<int> from_, columns_;  // each entry's number in the original, and its column, counted from the first of its block

  // f(entry, row, column) for the entries of a block of each.
  template <class F>
  static void each(const Pattern& original, const int* columns, int row_block, int column_block, F f) {
    const int* start = original.starts(column_block);
    const int lo = row_block * BLOCK_COLUMNS, hi = min(original.rows, lo + BLOCK_COLUMNS), first = column_block * BLOCK_COLUMNS;
    for (int t = lo; t < hi; ++t)
      for (int p = start[t]; p < start[t + 1]; ++p) f(p, t - lo, first + columns[p]);
  }

  int count(Pool& pool, const Pattern& original, const int* columns) const {
    parallel(pool, pattern.blocks * original.blocks, [&](int i) {
      const int row_block = i / original.blocks, column_block = i % original.blocks;
      int* counts = pattern.starts(row_block) + 1;
      std::memset(counts + column_block * BLOCK_COLUMNS, 0, sizeof(int) * original.width(column_block));
      each(original, columns, row_block, column_block, [&](int, int, int f) { ++counts[f]; });
    });
    return pattern.sum_counts();
  }

  void fill(Pool& pool, const Pattern& original, const int* columns) const {
    parallel(pool, pattern.blocks * original.blocks, [&](int i) {
      const int row_block = i / original.blocks, column_block = i % original.blocks, first = column_block * BLOCK_COLUMNS;
      int next[BLOCK_COLUMNS];
      std::memcpy(next, pattern.starts(row_block) + first, sizeof(int) * original.width(column_block));
      each(original, columns, row_block, column_block, [&](int p, int t, int f) {
        const int q = next[f - first]++;
        from_[q] = p;
        columns_[q] = t;
      });
    });
  }
};

// put(j, i, values, n) for every column j of a matrix, n rows i, i + 1, ... at a time: by tiles of whole cache lines that stay in the
// first-level cache.
template <class F>
void by_columns(Pool& pool, int rows, int columns, const float* from, F put) {
  constexpr int ROWS_IN = 32, COLUMNS_IN = 128, STRIDE = COLUMNS_IN + 1;  // columns of a power of two would share few sets of the cache
  parallel(pool, (columns + COLUMNS_IN - 1) / COLUMNS_IN, [&](int block) {
    const int lo = block * COLUMNS_IN, n = min(COLUMNS_IN, columns - lo);
    float tile[ROWS_IN][STRIDE], column[ROWS_IN];
    for (int i = 0; i < rows; i += ROWS_IN) {
      const int m = min(ROWS_IN, rows - i);
      for (int k = 0; k < m; ++k) std::memcpy(tile[k], from + size_t(i + k) * columns + lo, sizeof(float) * n);
      for (int j = 0; j < n; ++j) {
        for (int k = 0; k < m; ++k) column[k] = tile[k][j];
        put(lo + j, i, column, m);
      }
    }
  });
}

// to[j, i] = from[i, j]
void transpose(Pool& pool, int rows, int columns, const float* from, float* to) {
  by_columns(pool, rows, columns, from, [&](int j, int i, const float* x, int n) {
    std::memcpy(to + size_t(j) * rows + i, x, sizeof(float) * n);
  });
}

void add_transposed(const AddTransposed& m, Pool& pool) {
  by_columns(pool, m.rows, m.columns, m.x, [&](int j, int i, const float* x, int n) {
    float* y = m.y + size_t(j) * m.rows + i;
    for (int k = 0; k < n; ++k) y[k] += x[k] + m.bias[j];
  });
}

}  // namespace
}  // namespace spark::SPARK_SET
