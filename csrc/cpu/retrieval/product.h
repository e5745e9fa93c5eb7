// Products of int8 planes with the tile unit of recent Xeons (AMX).
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

// out (rows, columns) = high x high^T + (high x low^T + low x high^T) / 254, gallery x query: exact in int32, rounded to
// float32 twice, and once more for every 65,536 values of depth.
void tile_product(Planes gallery, Planes query, float* out, int64_t rows, int64_t columns, int64_t tiles,
                  int64_t stride);

}  // namespace gaitfast::retrieval
