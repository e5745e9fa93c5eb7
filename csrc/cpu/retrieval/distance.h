// The distance of single pairs: quickly in float64 with a bound, and exactly (rounded once) in twice that precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "features.h"

namespace gaitfast::retrieval {

constexpr double kUnit = 0x1p-53;

// How far the float64 distance may be from the true one. Any order of summation (Higham, "Accuracy and Stability of
// Numerical Algorithms", sec. 3.1), and a factor of two to spare. Mirrors _tiles.py.
class Tolerance {
 public:
  Tolerance(Metric metric, Shape shape)
      : absolute_(metric == Metric::cosine ? 2.0 * kUnit * (shape.width() + shape.channels + 16.0) : 0.0),
        relative_(metric == Metric::cosine ? 0.0 : 2.0 * kUnit * (shape.channels + shape.parts + 8.0)) {}
  double operator()(double distance) const { return absolute_ + relative_ * distance; }

 private:
  double absolute_, relative_;
};

// Sums of squares per part, float64 (N, P); not finite where a feature is not.
void sum_squares(const at::Tensor& features, double* out);

// Distances of pairs of one gallery block. `query_squares`, `gallery_squares`: from sum_squares.
class Pairs {
 public:
  Pairs(Metric metric, const at::Tensor& queries, const double* query_squares, const at::Tensor& gallery,
        const double* gallery_squares);

  // Scratch memory of one thread.
  struct Scratch {
    std::vector<double> sums, high, low, more_high, more_low;
  };

  // Within tolerance(). `next`: an item to fetch from memory meanwhile.
  double value(int64_t query, int64_t item, int64_t next, Scratch& scratch) const;
  // The real number, rounded as a mean and, for the cosine, as a difference.
  double exact(int64_t query, int64_t item, Scratch& scratch) const;
  const Tolerance& tolerance() const { return tolerance_; }
  const Shape& gallery_shape() const { return gallery_shape_; }
  Metric metric() const { return metric_; }
  // The bytes of a gallery item, for finding items that are equal.
  std::pair<const char*, size_t> bytes(int64_t item) const;
  // Those of its sums of squares.
  std::pair<const char*, size_t> squares(int64_t item) const;

 private:
  template <class T>
  double value_of(const T* x, const T* y, const T* next, int64_t query, int64_t item, Scratch& scratch) const;
  template <class T>
  double exact_of(const T* x, const T* y, Scratch& scratch) const;

  Metric metric_;
  at::Tensor queries_, gallery_;
  Shape query_shape_, gallery_shape_;
  const double* gallery_squares_;
  Simd level_;
  Tolerance tolerance_;
  int64_t period_;
  std::vector<double> query_weights_, gallery_weights_;  // cosine: 1 / (norm sqrt(P)), 0 for a part of zeros
};

// 1 / (norm sqrt(P)) of each part.
std::vector<double> cosine_weights(const double* squares, int64_t rows, int64_t parts);

}  // namespace gaitfast::retrieval
