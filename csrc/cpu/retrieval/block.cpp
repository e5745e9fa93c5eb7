#include "block.h"

#include <ATen/ops/mm.h>

#include <cmath>

#include "workers.h"

namespace gaitfast::retrieval {
namespace {

constexpr float kFloatUnit = 0x1p-24f;
constexpr float kSpare = 1.01f;  // for the rounding of the bounds themselves
// Gallery items of a tile. Euclidean distances pass over a tile part by part.
constexpr int64_t kTiledRows = 512, kTiledPartRows = 128, kFloatRows = 2048, kFloatPartRows = 512;
constexpr int64_t kRowsOfTask = 4 * kRowsOfPanel;
// In float32, rows at most 1 long: they are off by half of this at most.
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

// 1 / sqrt(x) within 0.2 %, of a normal number: a guess by its exponent, and a step of Newton's method.
GAITFAST_INLINE float about_inverse_root(float x) {
  const float guess = __builtin_bit_cast(float, 0x5f3759df - (__builtin_bit_cast(int32_t, x) >> 1));
  return guess * (1.5f - 0.5f * x * guess * guess);
}

// x where `sign` is below zero, or else zero. Without a comparison: the compiler would take a root on either side of it.
GAITFAST_INLINE float where_negative(float sign, float x) {
  const int32_t mask = __builtin_bit_cast(int32_t, sign) >> 31;
  return __builtin_bit_cast(float, __builtin_bit_cast(int32_t, x) & mask);
}

// Adds one part's distances to the sums of lower and upper bounds (both negative).
template <bool>
GAITFAST_INLINE void add_part_body(const float* __restrict products, int64_t columns, const Part& item,
                                   const Parts& query, float rounding, float* __restrict near, float* __restrict far) {
  const float *__restrict square = query.square.data(), *__restrict length = query.length.data();
  const float *__restrict unit = query.unit.data(), *__restrict low = query.low.data();
  const float *__restrict rest = query.rest.data();
  for (int64_t j = 0; j < columns; ++j) {
    const float both = item.square + square[j];
    const float t = both - 2.0f * (products[j] * (item.lengths.unit * unit[j]));
    const float off = length[j] * item.lengths.rest + rest[j] * (item.length + item.lengths.rest) +
                      low[j] * item.lengths.low + rounding * length[j] * item.length;
    const float error = 2.0f * kSpare * off + 8.0f * kFloatUnit * both + 1e-30f;
    // One root for both bounds: with s^2 = m >= 4 error, sqrt(m + error) - s < s - sqrt(m - error) <= 0.536 error / s.
    const float least = 4.0f * error, m = t > least ? t : least;
    const float root = __builtin_sqrtf(m), width = 0.545f * error * about_inverse_root(m);
    near[j] -= where_negative(least - t, root - width);
    far[j] -= root + width;
  }
}

GAITFAST_MULTIVERSION(, add_part,
                      (Simd level, const float* products, int64_t columns, const Part& item, const Parts& query,
                       float rounding, float* near, float* far),
                      (products, columns, item, query, rounding, near, far))

}  // namespace

std::pair<at::Tensor, at::Tensor> make_plane(Metric metric, const at::Tensor& features, const at::Tensor& squares,
                                             double scale) {
  const Form form = best_form();
  const Rows rows(metric, features, squares.const_data_ptr<double>(), scale, form);
  const int64_t count = rows.shape().rows, tasks = (count + kRowsOfTask - 1) / kRowsOfTask;
  const Segments& segments = rows.segments();
  const at::Tensor lengths = at::empty({count, segments.count, 3}, at::kFloat);
  auto* lengths_data = reinterpret_cast<Lengths*>(lengths.mutable_data_ptr<float>());
  const int64_t plane_size = plane_values(segments, count);
  const at::Tensor plane = form == Form::bytes   ? at::empty({2, plane_size}, at::kChar)
                           : form == Form::words ? at::empty({plane_size}, at::kShort)
                                                 : at::empty({segments.count, count, segments.values}, at::kFloat);
  prefer_large_pages(plane.mutable_data_ptr(), plane.nbytes());
  parallel(tasks, [&](int64_t task) {
    const int64_t first = task * kRowsOfTask, length = std::min(kRowsOfTask, count - first);
    const int64_t start = first * segments.stride * segments.depth;
    Lengths* own = lengths_data + first * segments.count;
    if (form == Form::bytes) {
      int8_t* high = plane.mutable_data_ptr<int8_t>() + start;
      rows.to_tiles(first, length, Side::gallery, high, high + plane_size, own, count);
    } else if (form == Form::words) {
      rows.to_words(first, length, Side::gallery, plane.mutable_data_ptr<int16_t>() + start, own, count);
    } else {
      rows.to_floats(first, length, plane.mutable_data_ptr<float>() + first * segments.values, count);
      std::fill_n(own, length * segments.count, kFloatLengths);
    }
  });
  return {plane, lengths};
}

Problem::Problem(Metric metric, const at::Tensor& queries, const at::Tensor& query_squares, const at::Tensor& gallery,
                 const at::Tensor& gallery_squares, const at::Tensor& plane, const at::Tensor& lengths, double scale)
    : metric(metric),
      form(form_of(plane)),
      level(form == Form::bytes ? Simd::amx : std::min(simd(), Simd::avx512)),
      scale(scale),
      queries(metric, queries, query_squares.const_data_ptr<double>(), scale, form),
      gallery(metric, gallery, gallery_squares.const_data_ptr<double>(), scale, form),
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
      tile_rows_(problem.metric == Metric::cosine ? (problem.tiled() ? kTiledRows : kFloatRows)
                                                 : (problem.tiled() ? kTiledPartRows : kFloatPartRows)) {
  const Segments& segments = problem.queries.segments();
  const int64_t values = segments.values;
  lengths_.resize(columns_ * segments.count);
  const int64_t size = plane_values(segments, count);
  if (problem.form == Form::floats) {
    planes_ = at::zeros({segments.count, columns_, values}, at::kFloat);
    parallel((count + kRowsOfTask - 1) / kRowsOfTask, [&](int64_t task) {
      const int64_t begin = task * kRowsOfTask;
      problem.queries.to_floats(first + begin, std::min(kRowsOfTask, count - begin),
                                planes_.mutable_data_ptr<float>() + begin * values, columns_);
    });
    std::fill(lengths_.begin(), lengths_.end(), kFloatLengths);
    // Any order of summation (Higham, "Accuracy and Stability of Numerical Algorithms", sec. 3.1).
    rounding_ = 1.1f * kFloatUnit * (static_cast<float>(values) + 8.0f);
  } else {
    const bool bytes = problem.form == Form::bytes;
    planes_ = bytes ? at::empty({2, size}, at::kChar) : at::empty({size}, at::kShort);
    prefer_large_pages(planes_.mutable_data_ptr(), planes_.nbytes());
    if (bytes) {
      unit_.emplace();
      auto* high = planes_.mutable_data_ptr<int8_t>();
      problem.queries.to_tiles(first, count, Side::query, high, high + size, lengths_.data(), count);
    } else {
      problem.queries.to_words(first, count, Side::query, planes_.mutable_data_ptr<int16_t>(), lengths_.data(), count);
    }
    const int64_t step = bytes ? kTilesOfStep : kWordTilesOfStep, steps = (segments.tiles + step - 1) / step;
    rounding_ = 4.0f * kFloatUnit * (1.0f + static_cast<float>(steps));
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
  if (problem_.form == Form::floats) {
    at::Tensor result = at::from_blob(out, {rows, columns_}, at::kFloat);
    const at::Tensor items = problem_.plane[segment].narrow(0, first, rows);
    at::mm_out(result, items, planes_[segment].t());
    return;
  }
  const int64_t row_values = segments.stride * segments.depth, padded = padded_rows(problem_.gallery.shape().rows);
  const int64_t item = (segment * padded + first) * row_values, query = segment * columns_ * row_values;
  if (problem_.form == Form::words) {
    word_product(problem_.plane.const_data_ptr<int16_t>() + item, planes_.const_data_ptr<int16_t>() + query, out,
                 padded_rows(rows), columns_, segments.tiles, segments.stride);
    return;
  }
  const int8_t* items = problem_.plane.const_data_ptr<int8_t>() + item;
  const int8_t* queries = planes_.const_data_ptr<int8_t>() + query;
  const int64_t item_planes = problem_.plane.size(1), query_planes = planes_.size(1);
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
