// Features as integers, laid out for the instructions that multiply them, with the length of what rounding left out.
//
// Cosine: the rows are normalised per part and divided by sqrt(P), one segment of C P values: their dot product is the
// mean cosine. Euclidean: a segment of C values per part, times a power of two that brings the longest part to at most 1.
//
// For the tile unit a segment x is unit (high + low / 254) + rest with int8 high and low: the two planes together hold 15
// bits, and their products are exact in int32. For AVX-512 VNNI it is unit words + rest with int16 words, in units so
// large that the words of a step of kWordsOfStep values are at most 46,340 long: |a.b| <= |a| |b| < 2^31, so that the
// sum over a step is exact in int32, whatever wraps around on the way.
#pragma once

#include <memory>
#include <vector>

#include "distance.h"

namespace gaitfast::retrieval {

constexpr int64_t kTileRows = 16;   // rows of a tile
constexpr int64_t kTileDepth = 64;  // bytes of one of its rows
constexpr int64_t kTileBytes = kTileRows * kTileDepth;
constexpr double kLowSteps = 254.0;  // steps of the low plane in one of the high plane
constexpr int64_t kWordsOfStep = 512;     // of a sum of products of words

// Gallery tiles are [16 rows][64 bytes]; query tiles [16 quadruples][16 rows][4 bytes], as the instructions want them.
enum class Side { gallery, query };

// What products read: two planes of int8, one of int16, or rows of float32 where there are no instructions for either.
enum class Form { bytes, words, floats };
Form best_form();

struct Segments {
  Segments(Metric metric, Shape shape, Form form)
      : count(metric == Metric::cosine ? 1 : shape.parts),
        values(metric == Metric::cosine ? shape.width() : shape.channels),
        depth(form == Form::words ? kTileDepth / 2 : kTileDepth),
        tiles((values + depth - 1) / depth),
        stride(tiles | 1) {}
  int64_t count, values;
  int64_t depth;  // values of a tile's row
  int64_t tiles;
  int64_t stride;  // tiles from one group of 16 rows to the next; odd, as powers of two would share cache lines' places
};

// Rows are padded with zeros to a multiple of this, so that products need no edge cases.
constexpr int64_t kRowsOfPanel = 2 * kTileRows;
inline int64_t padded_rows(int64_t rows) { return (rows + kRowsOfPanel - 1) / kRowsOfPanel * kRowsOfPanel; }

// Values of one plane of `rows` rows.
inline int64_t plane_values(const Segments& segments, int64_t rows) {
  return segments.count * padded_rows(rows) * segments.stride * segments.depth;
}

// Of one segment: its unit, and upper bounds of the lengths of its low part and of its rest.
struct Lengths {
  float unit, low, rest;
};

// Reads rows of one side, normalised or scaled.
class Rows {
 public:
  // `squares`: float64 (N, P). `scale`: the power of two of the Euclidean distance.
  Rows(Metric metric, const at::Tensor& features, const double* squares, double scale, Form form);

  const Shape& shape() const { return shape_; }
  const Segments& segments() const { return segments_; }

  // Rows [first, first + count) to `high` and `low`, the first of them in planes (segments, padded rows / 16, stride,
  // 1024), and their `lengths` (count, segments). A panel that they do not fill is filled up with zeros.
  void to_tiles(int64_t first, int64_t count, Side side, int8_t* high, int8_t* low, Lengths* lengths,
                int64_t rows) const;
  // The same in int16: one plane, and no low part.
  void to_words(int64_t first, int64_t count, Side side, int16_t* words, Lengths* lengths, int64_t rows) const;
  // The same rows in float32, to `out`, the first of them in a tensor (segments, rows, values).
  void to_floats(int64_t first, int64_t count, float* out, int64_t rows) const;

 private:
  void weigh(int64_t row, double* weights) const;

  at::Tensor features_;
  Shape shape_;
  Segments segments_;
  Simd level_;
  int64_t period_;
  std::vector<double> weights_;  // cosine: (N, P)
  double scale_;
};

// Asks for large pages before memory is first written: a plane is read in an order that small ones slow down.
void prefer_large_pages(void* data, int64_t bytes);

}  // namespace gaitfast::retrieval
