#include "block.h"

#include <ATen/ops/mm.h>

#include <cmath>

#include "workers.h"

namespace gaitfast::retrieval {
namespace {

constexpr float kFloatUnit = 0x1p-24f;
constexpr float kSpare = 1.01f;  // for the rounding of the bounds themselves
constexpr int64_t kTiledRows = 256, kFloatRows = 512;  // gallery items of a tile
constexpr int64_t kRowsOfTask = 4 * kRowsOfPanel;
// Without the tile unit, rows at most 1 long in float32: they are off by half of this at most.
constexpr Lengths kFloatLengths = {1.0f, 0.0f, 2.0f * kFloatUnit};

template <bool>
GAITFAST_INLINE void scale_row_body(float* row, int64_t columns, float unit, const float* units) {
  for (int64_t j = 0; j < columns; ++j) row[j] *= unit * units[j];
}

GAITFAST_MULTIVERSION(, scale_row, (Simd level, float* row, int64_t columns, float unit, const float* units),
                      (row, columns, unit, units))

// One part of one side: its sum of squares, the length (rounded up), and those of what the planes hold.
struct Part {
  float square, length;
  Lengths lengths;
};

// Of 16 and more queries side by side.
struct Parts {
  std::vector<float> square, length, unit, low, rest;
  explicit Parts(int64_t n) : square(n), length(n), unit(n), low(n), rest(n) {}
};

// Adds one part's distances to the sums of lower and upper bounds (both negative).
template <bool>
GAITFAST_INLINE void add_part_body(const float* products, int64_t columns, const Part& item, const Parts& query,
                                   float rounding, float* near, float* far) {
  const float *square = query.square.data(), *length = query.length.data(), *unit = query.unit.data();
  const float *low = query.low.data(), *rest = query.rest.data();
  for (int64_t j = 0; j < columns; ++j) {
    const float both = item.square + square[j];
    const float t = both - 2.0f * (products[j] * (item.lengths.unit * unit[j]));
    const float off = length[j] * item.lengths.rest + rest[j] * (item.length + item.lengths.rest) +
                      low[j] * item.lengths.low + rounding * length[j] * item.length;
    const float error = 2.0f * kSpare * off + 8.0f * kFloatUnit * both + 1e-30f;
    const float lower = t - error > 0.0f ? t - error : 0.0f;
    const float upper = t + error > 0.0f ? t + error : 0.0f;
    near[j] -= __builtin_sqrtf(lower);
    far[j] -= __builtin_sqrtf(upper);
  }
}

GAITFAST_MULTIVERSION(, add_part,
                      (Simd level, const float* products, int64_t columns, const Part& item, const Parts& query,
                       float rounding, float* near, float* far),
                      (products, columns, item, query, rounding, near, far))

}  // namespace

std::pair<at::Tensor, at::Tensor> make_plane(Metric metric, const at::Tensor& features, const at::Tensor& squares,
                                             double scale) {
  const Rows rows(metric, features, squares.const_data_ptr<double>(), scale);
  const int64_t count = rows.shape().rows, tasks = (count + kRowsOfTask - 1) / kRowsOfTask;
  const Segments& segments = rows.segments();
  const at::Tensor lengths = at::empty({count, segments.count, 3}, at::kFloat);
  auto* lengths_data = reinterpret_cast<Lengths*>(lengths.mutable_data_ptr<float>());
  const bool tiled = simd() == Simd::amx;
  const int64_t plane_size = plane_values(segments, count);
  const at::Tensor plane = tiled ? at::empty({2, plane_size}, at::kChar)
                                 : at::empty({segments.count, count, segments.values}, at::kFloat);
  prefer_large_pages(plane.mutable_data_ptr(), plane.nbytes());
  const auto copy_segments = [&](const auto* from, int64_t step, int64_t size, auto* to, int64_t to_step) {
    for (int64_t s = 0; s < segments.count; ++s) std::copy_n(from + s * step, size, to + s * to_step);
  };
  parallel(tasks, [&](int64_t task) {
    const int64_t first = task * kRowsOfTask, length = std::min(kRowsOfTask, count - first);
    if (!tiled) {
      std::vector<float> buffer(segments.count * length * segments.values);
      rows.to_floats(first, length, buffer.data());
      copy_segments(buffer.data(), length * segments.values, length * segments.values,
                    plane.mutable_data_ptr<float>() + first * segments.values, count * segments.values);
      std::fill_n(lengths_data + first * segments.count, length * segments.count, kFloatLengths);
      return;
    }
    const int64_t size = plane_values(segments, length), row_values = segments.stride * kTileDepth;
    std::vector<int8_t> buffer(2 * size);
    rows.to_tiles(first, length, Side::gallery, buffer.data(), buffer.data() + size,
                  lengths_data + first * segments.count);
    for (int64_t half = 0; half < 2; ++half) {
      copy_segments(buffer.data() + half * size, size / segments.count, size / segments.count,
                    plane.mutable_data_ptr<int8_t>() + half * plane_size + first * row_values,
                    plane_size / segments.count);
    }
  });
  return {plane, lengths};
}

Problem::Problem(Metric metric, const at::Tensor& queries, const at::Tensor& query_squares, const at::Tensor& gallery,
                 const at::Tensor& gallery_squares, const at::Tensor& plane, const at::Tensor& lengths, double scale)
    : metric(metric),
      level(plane.scalar_type() == at::kChar ? Simd::amx : std::min(simd(), Simd::avx512)),
      scale(scale),
      queries(metric, queries, query_squares.const_data_ptr<double>(), scale),
      gallery(metric, gallery, gallery_squares.const_data_ptr<double>(), scale),
      pairs(metric, queries, query_squares.const_data_ptr<double>(), gallery, gallery_squares.const_data_ptr<double>()),
      query_squares(query_squares.const_data_ptr<double>()),
      gallery_squares(gallery_squares.const_data_ptr<double>()),
      plane(plane),
      lengths(reinterpret_cast<const Lengths*>(lengths.const_data_ptr<float>())) {}

float Problem::score_below(double distance) const {
  const double score = metric == Metric::cosine ? 1.0 - distance : -distance * scale;
  return std::nextafterf(static_cast<float>(score - 1e-15 - 1e-15 * std::fabs(score)), -INFINITY);
}

float Problem::score_above(double distance) const {
  const double score = metric == Metric::cosine ? 1.0 - distance : -distance * scale;
  return std::nextafterf(static_cast<float>(score + 1e-15 + 1e-15 * std::fabs(score)), INFINITY);
}

Block::Block(const Problem& problem, int64_t first, int64_t count)
    : problem_(problem),
      first_(first),
      count_(count),
      columns_(padded_rows(count)),
      tile_rows_(problem.tiled() ? kTiledRows : kFloatRows) {
  const Segments& segments = problem.queries.segments();
  const int64_t values = segments.values;
  lengths_.resize(columns_ * segments.count);
  if (problem.tiled()) {
    unit_.emplace();
    const int64_t size = plane_values(segments, count);
    planes_.resize(2 * size);
    problem.queries.to_tiles(first, count, Side::query, planes_.data(), planes_.data() + size, lengths_.data());
    rounding_ = 8.0f * kFloatUnit * (1.0f + static_cast<float>(values) / 65536.0f);
  } else {
    floats_ = at::zeros({segments.count, columns_, values}, at::kFloat);
    std::vector<float> rows(segments.count * count * values);
    problem.queries.to_floats(first, count, rows.data());
    for (int64_t s = 0; s < segments.count; ++s) {
      std::copy_n(rows.data() + s * count * values, count * values,
                  floats_.mutable_data_ptr<float>() + s * columns_ * values);
    }
    std::fill(lengths_.begin(), lengths_.end(), kFloatLengths);
    // Any order of summation (Higham, "Accuracy and Stability of Numerical Algorithms", sec. 3.1).
    rounding_ = 1.1f * kFloatUnit * (static_cast<float>(values) + 8.0f);
  }
  near_.resize(tile_rows_ * columns_);
  item_error_.resize(tile_rows_);
  query_error_.resize(columns_);
  units_.resize(columns_);
  if (problem.metric == Metric::euclidean) {
    far_.resize(near_.size());
    scratch_.resize(near_.size());
    return;
  }
  for (int64_t j = 0; j < columns_; ++j) {
    const Lengths& own = lengths_[j];
    units_[j] = own.unit;
    query_error_[j] = kSpare * (own.rest + 0.5f * own.low * own.low + rounding_) + 8.0f * kFloatUnit;
  }
}

void Block::compute(int64_t first, int64_t rows, const Excluded& excluded) {
  if (problem_.metric == Metric::cosine) {
    cosines(first, rows);
  } else {
    euclidean_distances(first, rows);
  }
  exclude(first, rows, excluded);
}

void Block::product(int64_t segment, int64_t first, int64_t rows, float* out) {
  const Segments& segments = problem_.gallery.segments();
  if (!problem_.tiled()) {
    at::Tensor result = at::from_blob(out, {rows, columns_}, at::kFloat);
    const at::Tensor items = problem_.plane[segment].narrow(0, first, rows);
    at::mm_out(result, items, floats_[segment].t());
    return;
  }
  const int64_t row_values = segments.stride * kTileDepth, padded = padded_rows(problem_.gallery.shape().rows);
  const int8_t* items = problem_.plane.const_data_ptr<int8_t>() + (segment * padded + first) * row_values;
  const int8_t* queries = planes_.data() + segment * columns_ * row_values;
  const int64_t item_planes = problem_.plane.size(1), query_planes = static_cast<int64_t>(planes_.size()) / 2;
  tile_product({items, items + item_planes}, {queries, queries + query_planes}, out, padded_rows(rows), columns_,
               segments.tiles, segments.stride);
}

void Block::cosines(int64_t first, int64_t rows) {
  product(0, first, rows, near_.data());
  for (int64_t i = 0; i < rows; ++i) {
    const Lengths& own = problem_.lengths[first + i];
    item_error_[i] = kSpare * (own.rest + 0.5f * own.low * own.low);
    if (problem_.tiled()) scale_row(problem_.level, near_.data() + i * columns_, columns_, own.unit, units_.data());
  }
}

void Block::euclidean_distances(int64_t first, int64_t rows) {
  const int64_t parts = problem_.gallery.shape().parts;
  std::fill_n(near_.begin(), rows * columns_, 0.0f);
  std::fill_n(far_.begin(), rows * columns_, 0.0f);
  Parts query(columns_);
  const double area = problem_.scale * problem_.scale;
  constexpr double kUp = 1.0 + 1e-6;
  for (int64_t p = 0; p < parts; ++p) {
    product(p, first, rows, scratch_.data());
    for (int64_t j = 0; j < count_; ++j) {
      const double square = problem_.query_squares[(first_ + j) * parts + p] * area;
      const Lengths& own = lengths_[j * parts + p];
      query.square[j] = static_cast<float>(square);
      query.length[j] = static_cast<float>(std::sqrt(square) * kUp);
      query.unit[j] = own.unit;
      query.low[j] = own.low;
      query.rest[j] = own.rest;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (first + i) * parts + p;
      const double square = problem_.gallery_squares[at] * area;
      const Part item{static_cast<float>(square), static_cast<float>(std::sqrt(square) * kUp), problem_.lengths[at]};
      add_part(problem_.level, scratch_.data() + i * columns_, columns_, item, query, rounding_,
               near_.data() + i * columns_, far_.data() + i * columns_);
    }
  }
  // Of the mean: the roots and the sum are rounded too.
  const float slack = (static_cast<float>(parts) + 8.0f) * 2.0f * kFloatUnit;
  const float inward = (1.0f - slack) / parts, outward = (1.0f + slack) / parts;
  for (int64_t i = 0; i < rows * columns_; ++i) near_[i] *= inward, far_[i] *= outward;
}

void Block::exclude(int64_t first, int64_t rows, const Excluded& excluded) {
  for (int64_t j = 0; j < count_; ++j) {
    const int64_t* end = excluded.items + excluded.offsets[first_ + j + 1];
    const int64_t* item = std::lower_bound(excluded.items + excluded.offsets[first_ + j], end, first);
    for (; item != end && *item < first + rows; ++item) {
      near_[(*item - first) * columns_ + j] = -INFINITY;
      if (!far_.empty()) far_[(*item - first) * columns_ + j] = -INFINITY;
    }
  }
}

}  // namespace gaitfast::retrieval
