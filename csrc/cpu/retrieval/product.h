// Products of planes: of int8 with the tile unit of recent Xeons (AMX), of int16 with AVX-512 VNNI.
#pragma once

#include <cstdint>

#include "simd.h"

namespace gaitfast::retrieval {

// Holds this thread's tile configuration.
class TileUnit {
 public:
  TileUnit();
  ~TileUnit();
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};

// The two planes of one side, each (rows / 16, stride, 1024), rows a multiple of 32 (plane.h).
struct Planes {
  const int8_t *high, *low;
};

// Depth of a step, in tiles. What a step takes of the queries stays in the second-level cache while the gallery passes;
// all of the depth at once would leave room for fewer queries, and the gallery would have to pass more often.
constexpr int64_t kTilesOfStep = 32;
constexpr int64_t kWordTilesOfStep = 16;  // of kWordsOfStep values (plane.h), for the first-level cache

// out (rows, columns) = high x high^T + (high x low^T + low x high^T) / 254, gallery x query. Of each step exact in int32,
// then rounded to float32 three times. The planes begin at multiples of 64 bytes, for speed.
void tile_product(Planes gallery, Planes query, float* out, int64_t rows, int64_t columns, int64_t tiles,
                  int64_t stride);

// out (rows, columns) = gallery x query of int16. Of each step exact in int32, then rounded to float32 twice.
void word_product(const int16_t* gallery, const int16_t* query, float* out, int64_t rows, int64_t columns, int64_t tiles,
                  int64_t stride);

}  // namespace gaitfast::retrieval
