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
constexpr int64_t kMostTiles = 1024;  // 2 x 65,536 x 127 x 127 still fits into int32

GAITFAST_TARGET_AMX void configure() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.bytes_per_row[i] = 64, config.rows[i] = 16;
  asm volatile("" : : "r"(&config) : "memory");  // the intrinsic tells the compiler of its first bytes only
  _tile_loadconfig(&config);
}

GAITFAST_TARGET_AMX void release() { _tile_release(); }

// Adds 32 x 32 products to tiles 0 to 3: four products on four loads.
GAITFAST_TARGET_AMX GAITFAST_INLINE void add_products(const int8_t* a, const int8_t* b, int64_t tiles, int64_t next) {
  for (int64_t k = 0; k < tiles; ++k) {
    _tile_loadd(4, a + k * kValues, kStride);
    _tile_loadd(6, b + k * kValues, kStride);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, b + next + k * kValues, kStride);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, a + next + k * kValues, kStride);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
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
  alignas(64) int32_t cross[4][256], high[4][256];
  const int64_t next = stride * kValues;  // from a group of 16 rows to the next
  const __m512 low_step = _mm512_set1_ps(1.0f / 254.0f);
  for (int64_t first = 0; first < tiles; first += kMostTiles) {
    const int64_t length = std::min(kMostTiles, tiles - first);
    for (int64_t i = 0; i < rows; i += 32) {
      const int64_t item = (i / 16 * stride + first) * kValues;
      for (int64_t j = 0; j < columns; j += 32) {
        const int64_t column = (j / 16 * stride + first) * kValues;
        clear_tiles();
        add_products(gallery.high + item, query.low + column, length, next);
        add_products(gallery.low + item, query.high + column, length, next);
        store_tiles(cross);
        clear_tiles();
        add_products(gallery.high + item, query.high + column, length, next);
        store_tiles(high);
        asm volatile("" : : "r"(cross), "r"(high) : "memory");  // the stores above are invisible to the compiler
        for (int64_t block = 0; block < 4; ++block) {
          float* line = out + (i + block / 2 * 16) * columns + j + block % 2 * 16;
          for (int64_t r = 0; r < 16; ++r, line += columns) {
            __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(cross[block] + r * 16)), low_step,
                                         _mm512_cvtepi32_ps(_mm512_load_si512(high[block] + r * 16)));
            if (first > 0) sum = _mm512_add_ps(sum, _mm512_loadu_ps(line));
            _mm512_storeu_ps(line, sum);
          }
        }
      }
    }
  }
}

}  // namespace gaitfast::retrieval
#else
namespace gaitfast::retrieval {
TileUnit::TileUnit() = default;
TileUnit::~TileUnit() = default;
void tile_product(Planes, Planes, float*, int64_t, int64_t, int64_t, int64_t) { __builtin_unreachable(); }  // simd() is never amx
}  // namespace gaitfast::retrieval
#endif
