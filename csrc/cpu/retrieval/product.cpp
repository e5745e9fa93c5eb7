#include "product.h"

#if GAITFAST_X86
#include <immintrin.h>

#include <algorithm>

namespace gaitfast::retrieval {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

constexpr int64_t kValues = 1024, kStride = 64;
constexpr int64_t kLinesFetched = 2;  // cache lines per four products
constexpr int64_t kVectors = 64;      // of 16 sums each: those of 32 x 32 products

GAITFAST_TARGET_AMX void configure() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.bytes_per_row[i] = 64, config.rows[i] = 16;
  asm volatile("" : : "r"(&config) : "memory");  // the intrinsic tells the compiler of its first bytes only
  _tile_loadconfig(&config);
}

GAITFAST_TARGET_AMX void release() { _tile_release(); }

// Sums of 32 x 32 products that wait to be added to `out`, 16 at a time between the products of the next ones: the tile
// unit and the vector units work side by side.
struct Pending {
  alignas(64) int32_t cross[4][256], high[4][256];
  float* out;
  int64_t columns, done = kVectors;
  bool again;  // whether out holds the sums of earlier depths

  GAITFAST_TARGET_AMX GAITFAST_INLINE void add(int64_t count) {
    const __m512 low_step = _mm512_set1_ps(1.0f / 254.0f);
    for (const int64_t end = std::min(kVectors, done + count); done < end; ++done) {
      const int64_t block = done / 16, row = done % 16;
      float* line = out + (block / 2 * 16 + row) * columns + block % 2 * 16;
      __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(cross[block] + row * 16)), low_step,
                                   _mm512_cvtepi32_ps(_mm512_load_si512(high[block] + row * 16)));
      if (again) sum = _mm512_add_ps(sum, _mm512_loadu_ps(line));
      _mm512_storeu_ps(line, sum);
    }
  }
};

// Adds 32 x 32 products to tiles 0 to 3: four products on four loads. `soon`: what is needed after the next ones, fetched
// into the second-level cache meanwhile.
GAITFAST_TARGET_AMX GAITFAST_INLINE void add_products(const int8_t* a, const int8_t* b, int64_t tiles, int64_t next,
                                                      const int8_t* soon, Pending& before, int64_t vectors) {
  for (int64_t k = 0; k < tiles; ++k) {
    for (int64_t line = 0; line < kLinesFetched; ++line) {
      __builtin_prefetch(soon + (k * kLinesFetched + line) * kStride, 0, 2);
    }
    _tile_loadd(4, a + k * kValues, kStride);
    _tile_loadd(6, b + k * kValues, kStride);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, b + next + k * kValues, kStride);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, a + next + k * kValues, kStride);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
    before.add(vectors);
  }
}

GAITFAST_TARGET_AMX GAITFAST_INLINE void clear_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

GAITFAST_TARGET_AMX GAITFAST_INLINE void store_tiles(int32_t (*sums)[256]) {
  _tile_stored(0, sums[0], kStride);
  _tile_stored(1, sums[1], kStride);
  _tile_stored(2, sums[2], kStride);
  _tile_stored(3, sums[3], kStride);
}

}  // namespace

TileUnit::TileUnit() { configure(); }
TileUnit::~TileUnit() { release(); }

GAITFAST_TARGET_AMX void tile_product(Planes gallery, Planes query, float* out, int64_t rows, int64_t columns,
                                      int64_t tiles, int64_t stride) {
  Pending pending[2];
  int64_t turn = 0;
  const int64_t next = stride * kValues;  // from a group of 16 rows to the next
  for (int64_t first = 0; first < tiles; first += kTilesOfStep) {
    const int64_t length = std::min(kTilesOfStep, tiles - first);
    const int64_t vectors = (kVectors + 2 * length - 1) / (2 * length);
    for (int64_t i = 0; i < rows; i += 32) {
      const int64_t item = (i / 16 * stride + first) * kValues;
      int64_t fetched = 0;  // of the next 32 rows: runs of `length` tiles, two of each plane
      const auto soon = [&] {
        const int64_t run = fetched / (length * kValues), ahead = item + (2 + run % 2) * next + fetched % (length * kValues);
        const bool more = run < 4 && i + 32 < rows;
        fetched += length * kLinesFetched * kStride;
        return more ? (run < 2 ? gallery.high : gallery.low) + ahead : query.high;
      };
      for (int64_t j = 0; j < columns; j += 32) {
        const int64_t column = (j / 16 * stride + first) * kValues;
        Pending &before = pending[turn], &now = pending[turn ^= 1];
        clear_tiles();
        add_products(gallery.high + item, query.low + column, length, next, soon(), before, vectors);
        add_products(gallery.low + item, query.high + column, length, next, soon(), before, vectors);
        store_tiles(now.cross);
        clear_tiles();
        add_products(gallery.high + item, query.high + column, length, next, soon(), before, 0);
        store_tiles(now.high);
        asm volatile("" : : "r"(&now) : "memory");  // the stores above are invisible to the compiler
        now.out = out + i * columns + j;
        now.columns = columns;
        now.again = first > 0;
        now.done = 0;
      }
    }
  }
  pending[turn].add(kVectors);
}

}  // namespace gaitfast::retrieval
#else
namespace gaitfast::retrieval {
TileUnit::TileUnit() = default;
TileUnit::~TileUnit() = default;
void tile_product(Planes, Planes, float*, int64_t, int64_t, int64_t, int64_t) { __builtin_unreachable(); }  // simd() is never amx
}  // namespace gaitfast::retrieval
#endif
