// Scores of a block of queries against gallery items, a tile at a time, each within a proven bound.
//
// A score is larger where the distance is smaller: the mean cosine, or the negative mean Euclidean distance in units of
// the plane. For query j and item i of the tile the true score lies in
//     [far[i][j] - item_error[i] - query_error[j],  near[i][j] + item_error[i] + query_error[j]].
// The bound: with x = x_h + x_l + x_r (plane.h), the product leaves out x_l.y_l, x_r.y and (x_h + x_l).y_r, at most
// |x_l| |y_l| + |x_r| |y| + |x| |y_r| (Cauchy-Schwarz; the lengths are measured, not estimated), and
// |x_l| |y_l| <= (|x_l|^2 + |y_l|^2) / 2. What int32 sums of products hold is exact.
#pragma once

#include <optional>
#include <vector>

#include "plane.h"
#include "product.h"

namespace gaitfast::retrieval {

// Per query the gallery items that do not exist for it, ascending.
struct Excluded {
  const int64_t* offsets;  // (Q + 1)
  const int64_t* items;
};

struct Problem {
  Problem(Metric metric, const at::Tensor& queries, const at::Tensor& query_squares, const at::Tensor& gallery,
          const at::Tensor& gallery_squares, const at::Tensor& plane, const at::Tensor& lengths, double scale);

  bool tiled() const { return form != Form::floats; }
  // The score of a distance, rounded towards minus or plus infinity.
  float score_below(double distance) const;
  float score_above(double distance) const;

  Metric metric;
  Form form;
  Simd level;
  double scale;
  Rows queries, gallery;
  Pairs pairs;
  const double *query_squares, *gallery_squares;
  at::Tensor plane;  // of the gallery, in that form
  const Lengths* lengths;
};

// The gallery's plane and lengths, float32 (N, segments, 3), as `Problem` takes them. In which form is decided here, by the
// instructions at hand.
std::pair<at::Tensor, at::Tensor> make_plane(Metric metric, const at::Tensor& features, const at::Tensor& squares,
                                             double scale);

inline Form form_of(const at::Tensor& plane) {
  const at::ScalarType type = plane.scalar_type();
  return type == at::kChar ? Form::bytes : type == at::kShort ? Form::words : Form::floats;
}

class Block {
 public:
  // Queries [first, first + count).
  Block(const Problem& problem, int64_t first, int64_t count);

  // Fills near, far and the items' errors for gallery items [first, first + rows); first is a multiple of tile_rows().
  void compute(int64_t first, int64_t rows, const Excluded& excluded);

  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  int64_t columns() const { return columns_; }      // count, padded
  int64_t tile_rows() const { return tile_rows_; }  // gallery items at a time
  const float* near(int64_t row) const { return near_.data() + row * columns_; }
  const float* far(int64_t row) const { return (far_.empty() ? near_ : far_).data() + row * columns_; }
  const float* item_errors() const { return item_error_.data(); }  // (rows)
  float query_error(int64_t column) const { return query_error_[column]; }

 private:
  void product(int64_t segment, int64_t first, int64_t rows, float* out);
  void cosines(int64_t first, int64_t rows);
  void euclidean_distances(int64_t first, int64_t rows);
  void exclude(int64_t first, int64_t rows, const Excluded& excluded);

  const Problem& problem_;
  int64_t first_, count_, columns_, tile_rows_;
  float rounding_;  // of a product in float32, relative to the two lengths
  std::optional<TileUnit> unit_;
  at::Tensor planes_;   // int8: high, then low; int16; or float32 (segments, columns, values)
  std::vector<Lengths> lengths_;  // (columns, segments)
  std::vector<float> near_, far_, scratch_, item_error_, query_error_, units_;
};

}  // namespace gaitfast::retrieval
