// Products of int16 with AVX-512 VNNI: twice the multiplications of float32 per instruction.
#include "product.h"

#if GAITFAST_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace gaitfast::retrieval {
namespace {

constexpr int64_t kLine = 64, kTile = 1024, kLanesOfLine = 16;  // bytes, and int32 of a line
constexpr int64_t kRows = 8;                                    // of one kernel: 16 sums in flight hide the latency
constexpr int64_t kLinesFetched = 2;                            // cache lines per tile of 8 rows

// Adds to `out` the products of 8 gallery rows and 32 queries over `tiles` tiles. `next`: bytes between groups of 16
// queries. `soon`: what is needed after this, fetched into the second-level cache meanwhile.
GAITFAST_TARGET_VNNI void add_products(const char* items, const char* queries, int64_t next, int64_t tiles, bool again,
                                       float* out, int64_t columns, const char* soon) {
  __m512i sums[kRows][2];
#pragma GCC unroll 8
  for (auto& row : sums) row[0] = row[1] = _mm512_setzero_si512();
  for (int64_t tile = 0; tile < tiles; ++tile, items += kTile, queries += kTile) {
    for (int64_t line = 0; line < kLinesFetched; ++line, soon += kLine) __builtin_prefetch(soon, 0, 2);
#pragma GCC unroll 4
    for (int64_t k = 0; k < kLine; k += 4) {
      const __m512i left = _mm512_loadu_si512(queries + k * kLanesOfLine);
      const __m512i right = _mm512_loadu_si512(queries + next + k * kLanesOfLine);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, items + r * kLine + k, sizeof pair);
        const __m512i item = _mm512_set1_epi32(pair);
        // Not the intrinsic: GCC 12 copies the sums back and forth.
        asm("vpdpwssd %2, %1, %0" : "+v"(sums[r][0]) : "v"(item), "v"(left));
        asm("vpdpwssd %2, %1, %0" : "+v"(sums[r][1]) : "v"(item), "v"(right));
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {
      float* to = out + r * columns + half * kLanesOfLine;
      __m512 sum = _mm512_cvtepi32_ps(sums[r][half]);
      if (again) sum = _mm512_add_ps(sum, _mm512_loadu_ps(to));
      _mm512_storeu_ps(to, sum);
    }
  }
}

}  // namespace

void word_product(const int16_t* gallery, const int16_t* query, float* out, int64_t rows, int64_t columns, int64_t tiles,
                  int64_t stride) {
  const char *items = reinterpret_cast<const char*>(gallery), *queries = reinterpret_cast<const char*>(query);
  constexpr int64_t kPanel = 2 * kLanesOfLine;  // rows, and columns, of which the products are taken together
  const int64_t next = stride * kTile;          // from a group of 16 rows to the next
  for (int64_t first = 0; first < tiles; first += kWordTilesOfStep) {
    const int64_t length = std::min(kWordTilesOfStep, tiles - first), bytes = length * kTile;
    for (int64_t i = 0; i < rows; i += kPanel) {
      const char* panel = items + i / kLanesOfLine * next + first * kTile;
      int64_t fetched = 0;  // of the next panel: two runs of `length` tiles
      for (int64_t j = 0; j < columns; j += kPanel) {
        const char* column = queries + j / kLanesOfLine * next + first * kTile;
        for (int64_t r = 0; r < kPanel; r += kRows) {
          const char* soon = column;
          if (fetched < 2 * bytes && i + kPanel < rows) soon = panel + (2 + fetched / bytes) * next + fetched % bytes;
          fetched += length * kLinesFetched * kLine;
          add_products(panel + r / kLanesOfLine * next + r % kLanesOfLine * kLine, column, next, length, first > 0,
                       out + (i + r) * columns + j, columns, soon);
        }
      }
    }
  }
}

}  // namespace gaitfast::retrieval
#else
namespace gaitfast::retrieval {
void word_product(const int16_t*, const int16_t*, float*, int64_t, int64_t, int64_t, int64_t) { __builtin_unreachable(); }
}  // namespace gaitfast::retrieval
#endif
