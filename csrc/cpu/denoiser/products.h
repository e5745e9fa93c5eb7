// The small products of attention, 32 features a head, up to 64 rows. A row is kept as two vectors, its even features and
// its odd ones: what a rotation turns, and what the two halves of a bfloat16 pair are.
//
// An engine says how operands lie in memory. Products sum over features or over rows:
//
//   rows      (n, 32), left operand of a sum over features; `put` writes one
//   columns   the transpose of rows, right operand of a sum over features
//   stack     right operand of a sum over rows
//   flank     the transpose of rows, left operand of a sum over rows
//
// A square is a float32 (n, padded) matrix of weights, key row x query lane; it is a left operand as it is or transposed.
// All counts are padded to multiples of 32, and padding is zero wherever a sum runs over it.
#pragma once

#include "vectors.h"

namespace gaitfast::denoiser {
namespace {

constexpr int64_t kHalf = kFeatures / 2;

struct Row {
  Floats even, odd;
};

GAITFAST_INLINE Row load_row(const BFloat16* x) {
  const Words words = load_words(x);
  return {(Floats)(words << 16), (Floats)(words & 0xffff0000u)};
}

GAITFAST_INLINE Row load_row(const float* x) {
  const Floats a = load(x), b = load(x + kLanes);
  return {__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
          __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
}

// Two vectors as bfloat16, the first in the lower halves.
GAITFAST_INLINE Words pairs(Floats low, Floats high) {
#if GAITFAST_LEVEL >= 3
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Words)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
  return (rounded(low) >> 16) | (rounded(high) & 0xffff0000u);
#endif
}

GAITFAST_INLINE void store_row(Row row, BFloat16* x) { store_words(pairs(row.even, row.odd), x); }

GAITFAST_INLINE void store_row(Row row, float* x) {
  store(__builtin_shufflevector(row.even, row.odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), x);
  store(__builtin_shufflevector(row.even, row.odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31),
        x + kLanes);
}

GAITFAST_INLINE Row operator*(Row row, Floats by) { return {row.even * by, row.odd * by}; }

GAITFAST_INLINE Row turned(Row row, Floats cosine, Floats sine) {
  return {fma(row.even, cosine, -(row.odd * sine)), fma(row.odd, cosine, row.even * sine)};
}

// 16 x 16 words from rows of `from` to rows of `to`.
GAITFAST_INLINE void transpose_words(const uint32_t* x, int64_t from, uint32_t* y, int64_t to) {
#if GAITFAST_LEVEL >= 2
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(x + i * from);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(y + i * to, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(y + (i + 8) * to, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
  }
#else
  for (int64_t i = 0; i < 16; ++i) {
    for (int64_t j = 0; j < 16; ++j) y[j * to + i] = x[i * from + j];
  }
#endif
}

// Products in float32 on any CPU.
struct FloatProducts {
  using Cell = float;
  static constexpr int64_t kCells = kFeatures;  // of a row

  struct Left {
    const float* x;
    int64_t row, k;  // strides
  };
  struct Right {
    const float* x;
    int64_t stride;
  };

  static GAITFAST_INLINE void start() {}
  static GAITFAST_INLINE void stop() {}

  static GAITFAST_INLINE void put(Row row, float* rows, int64_t at) {
    store(row.even, rows + at * kCells);
    store(row.odd, rows + at * kCells + kLanes);
  }
  static GAITFAST_INLINE void put(const float* x, float* rows, int64_t at) { put(load_row(x), rows, at); }
  static GAITFAST_INLINE void put(const BFloat16* x, float* rows, int64_t at) { put(load_row(x), rows, at); }
  static GAITFAST_INLINE Row get(const float* rows, int64_t at) {
    return {load(rows + at * kCells), load(rows + at * kCells + kLanes)};
  }

  static GAITFAST_INLINE Left rows(const float* rows) { return {rows, kCells, 1}; }
  static GAITFAST_INLINE Left flank(const float* rows, int64_t, float*) { return {rows, 1, kCells}; }
  static GAITFAST_INLINE Left square(const float* x, int64_t padded, float*) { return {x, padded, 1}; }
  static GAITFAST_INLINE Left square_transposed(const float* x, int64_t padded, float*) { return {x, 1, padded}; }
  static GAITFAST_INLINE Right stack(const float* rows, int64_t, float*) { return {rows, kCells}; }
  static GAITFAST_INLINE Right matrix(const float* x, float*) { return {x, kFeatures}; }
  static GAITFAST_INLINE Right columns(const float* rows, int64_t padded, float* to) {
    for (int64_t i = 0; i < padded; i += kLanes) {
      for (int64_t j = 0; j < kCells; j += kLanes) {
        transpose_words(reinterpret_cast<const uint32_t*>(rows + i * kCells + j), kCells,
                        reinterpret_cast<uint32_t*>(to + j * padded + i), padded);
      }
    }
    return {to, padded};
  }

  // out (m, n) = left (m, k) right (k, n); out has rows of n. m is a multiple of 4, n of 32.
  static GAITFAST_INLINE void product(Left left, Right right, float* out, int64_t m, int64_t n, int64_t k) {
    constexpr int64_t kRows = GAITFAST_LEVEL >= 2 ? 8 : 4;
    int64_t i = 0;
    for (; i + kRows <= m; i += kRows) rows_of_product<kRows>(left, right, out, n, k, i);
    for (; i < m; i += 4) rows_of_product<4>(left, right, out, n, k, i);
  }

 private:
  template <int64_t kRows>
  static GAITFAST_INLINE void rows_of_product(Left left, Right right, float* out, int64_t n, int64_t k, int64_t i) {
    for (int64_t j = 0; j < n; j += 2 * kLanes) {
      Floats sums[kRows][2] = {};
      for (int64_t inner = 0; inner < k; ++inner) {
        const Floats b0 = load(right.x + inner * right.stride + j);
        const Floats b1 = load(right.x + inner * right.stride + j + kLanes);
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRows; ++r) {
          const Floats a = all(left.x[(i + r) * left.row + inner * left.k]);
          sums[r][0] = fma(a, b0, sums[r][0]);
          sums[r][1] = fma(a, b1, sums[r][1]);
        }
      }
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) {
        store(sums[r][0], out + (i + r) * n + j);
        store(sums[r][1], out + (i + r) * n + j + kLanes);
      }
    }
  }
};

#if GAITFAST_LEVEL >= 3
// Products of bfloat16 on the tile unit, sums in float32. A cell is a pair of bfloat16.
struct TileProducts {
  using Cell = uint32_t;
  static constexpr int64_t kCells = kHalf;

  // Left: rows of pairs. Right: a row of pairs for every two rows of the sum. Strides in pairs.
  struct Left {
    const uint32_t* x;
    int64_t row;
  };
  struct Right {
    const uint32_t* x;
    int64_t stride;
  };

  static GAITFAST_INLINE void start() {
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;  // bytes of a row
      config[48 + tile] = 16;      // rows
    }
    barrier(config);
    _tile_loadconfig(config);
  }
  static GAITFAST_INLINE void stop() { _tile_release(); }

  static GAITFAST_INLINE void put(Row row, uint32_t* rows, int64_t at) {
    store_words(pairs(row.even, row.odd), rows + at * kCells);
  }
  static GAITFAST_INLINE void put(const BFloat16* x, uint32_t* rows, int64_t at) {
    store_words(load_words(x), rows + at * kCells);
  }
  static GAITFAST_INLINE Row get(const uint32_t* rows, int64_t at) {
    return load_row(reinterpret_cast<const BFloat16*>(rows + at * kCells));
  }

  static GAITFAST_INLINE Left rows(const uint32_t* rows) { return {rows, kCells}; }

  // Pairs of rows 2r and 2r + 1: even features, then odd ones.
  static GAITFAST_INLINE Right stack(const uint32_t* rows, int64_t padded, uint32_t* to) {
    for (int64_t r = 0; r < padded / 2; ++r) {
      const Words first = load_words(rows + 2 * r * kCells), second = load_words(rows + (2 * r + 1) * kCells);
      store_words((first & 0xffffu) | (second << 16), to + r * kFeatures);
      store_words((first >> 16) | (second & 0xffff0000u), to + r * kFeatures + kLanes);
    }
    return {to, kFeatures};
  }

  static GAITFAST_INLINE Right columns(const uint32_t* rows, int64_t padded, uint32_t* to) {
    for (int64_t i = 0; i < padded; i += kLanes) transpose_words(rows + i * kCells, kCells, to + i, padded);
    return {to, padded};
  }

  static GAITFAST_INLINE Left flank(const uint32_t* rows, int64_t padded, uint32_t* to) {
    alignas(64) uint32_t stacked[kMostRows / 2 * kFeatures];
    stack(rows, padded, stacked);
    // A transposition takes 16 pairs of rows: 32 rows.
    for (int64_t r = 0; r < padded / 2; r += kLanes) {
      transpose_words(stacked + r * kFeatures, kFeatures, to + r, padded / 2);
      transpose_words(stacked + r * kFeatures + kLanes, kFeatures, to + kLanes * (padded / 2) + r, padded / 2);
    }
    return {to, padded / 2};
  }

  static GAITFAST_INLINE Left square(const float* x, int64_t padded, uint32_t* to) {
    for (int64_t i = 0; i < padded * padded; i += 2 * kLanes) {
      store_words((Words)_mm512_cvtne2ps_pbh((__m512)load(x + i + kLanes), (__m512)load(x + i)), to + i / 2);
    }
    return {to, padded / 2};
  }

  static GAITFAST_INLINE Left square_transposed(const float* x, int64_t padded, uint32_t* to) {
    alignas(64) uint32_t block[kLanes * kLanes];
    for (int64_t j = 0; j < padded; j += kLanes) {
      for (int64_t r = 0; r < padded; r += 2 * kLanes) {
        for (int64_t i = 0; i < kLanes; ++i) {
          const float* two = x + (r + 2 * i) * padded + j;
          store_words(pairs(load(two), load(two + padded)), block + i * kLanes);
        }
        transpose_words(block, kLanes, to + j * (padded / 2) + r / 2, padded / 2);
      }
    }
    return {to, padded / 2};
  }

  // A float32 matrix (32, 32), rows in the order of `Row`, as right operand of a sum over features.
  static GAITFAST_INLINE Right matrix(const float* x, uint32_t* to) {
    for (int64_t i = 0; i < kHalf; ++i) {
      for (int64_t j = 0; j < kFeatures; j += kLanes) {
        store_words(pairs(load(x + i * kFeatures + j), load(x + (kHalf + i) * kFeatures + j)), to + i * kFeatures + j);
      }
    }
    return {to, kFeatures};
  }

  // out (m, n) = left (m, k) right (k, n); out has rows of n. All multiples of 32, m padded.
  static GAITFAST_INLINE void product(Left left, Right right, float* out, int64_t m, int64_t n, int64_t k) {
    barrier(out);  // the compiler does not know what tiles read
    for (int64_t i = 0; i < m; i += 32) {
      for (int64_t j = 0; j < n; j += 32) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t inner = 0; inner < k / 2; inner += kLanes) {
          const uint32_t* a = left.x + i * left.row + inner;
          const uint32_t* b = right.x + inner * right.stride + j;
          _tile_loadd(4, a, left.row * 4);
          _tile_loadd(6, b, right.stride * 4);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, b + kLanes, right.stride * 4);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, a + 16 * left.row, left.row * 4);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        float* c = out + i * n + j;
        _tile_stored(0, c, n * 4);
        _tile_stored(1, c + kLanes, n * 4);
        _tile_stored(2, c + 16 * n, n * 4);
        _tile_stored(3, c + 16 * n + kLanes, n * 4);
      }
    }
    barrier(out);
  }

 private:
  static GAITFAST_INLINE void barrier(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }
};
#endif

template <class T>
struct ProductsOf {
  using Type = FloatProducts;
};
#if GAITFAST_LEVEL >= 3
template <>
struct ProductsOf<BFloat16> {
  using Type = TileProducts;
};
#endif

}  // namespace
}  // namespace gaitfast::denoiser
