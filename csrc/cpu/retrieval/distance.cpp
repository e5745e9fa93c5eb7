#include "distance.h"

#include "workers.h"

namespace gaitfast::retrieval {
namespace {

constexpr int64_t kRowsOfTask = 64;
constexpr size_t kCacheLine = 64;

// --- float64 ---------------------------------------------------------------------------------------------------------

template <bool kFma, bool kDifference>
GAITFAST_INLINE double accumulate(double x, double y, double sum) {
  if (kDifference) x = y = x - y;
  return kFma ? __builtin_fma(x, y, sum) : sum + x * y;
}

// sums[j] = sum over the chunks of a row of x[j] y[j], or of (x[j] - y[j])^2.
template <bool kFma, bool kDifference, class T>
GAITFAST_INLINE void chunk_sums(const T* x, const T* y, const T* next, int64_t width, int64_t period, double* sums) {
  constexpr int64_t kCommon = 64;  // its sums fit the registers of AVX-512; any P that divides 64 comes this way
  int64_t start = 0;
  if (period == kCommon) {
    double local[kCommon] = {};
    for (; start + kCommon <= width; start += kCommon) {
      for (size_t byte = 0; byte < kCommon * sizeof(T); byte += kCacheLine) {
        __builtin_prefetch(reinterpret_cast<const char*>(next + start) + byte);
      }
      for (int64_t j = 0; j < kCommon; ++j) {
        local[j] = accumulate<kFma, kDifference>(widen(x[start + j]), widen(y[start + j]), local[j]);
      }
    }
    for (int64_t j = 0; j < kCommon; ++j) sums[j] = local[j];
  } else {
    for (int64_t j = 0; j < period; ++j) sums[j] = 0.0;
    for (; start + period <= width; start += period) {
      for (int64_t j = 0; j < period; ++j) {
        sums[j] = accumulate<kFma, kDifference>(widen(x[start + j]), widen(y[start + j]), sums[j]);
      }
    }
  }
  for (int64_t j = 0; j < width - start; ++j) {
    sums[j] = accumulate<kFma, kDifference>(widen(x[start + j]), widen(y[start + j]), sums[j]);
  }
}

template <bool kFma, class T>
GAITFAST_INLINE void part_sums_body(const T* x, const T* y, const T* next, int64_t width, int64_t period, int64_t parts,
                                    bool difference, double* sums) {
  if (difference) {
    chunk_sums<kFma, true>(x, y, next, width, period, sums);
  } else {
    chunk_sums<kFma, false>(x, y, next, width, period, sums);
  }
  for (int64_t j = parts; j < period; j += parts) {
    for (int64_t p = 0; p < parts; ++p) sums[p] += sums[j + p];
  }
}

// sums[p], p < P: sum over the channels of part p. `sums` has room for a period. `next`: fetched from memory meanwhile.
GAITFAST_MULTIVERSION(template <class T>, part_sums,
                      (Simd level, const T* x, const T* y, const T* next, int64_t width, int64_t period, int64_t parts,
                       bool difference, double* sums),
                      (x, y, next, width, period, parts, difference, sums))

// --- twice float64's precision ---------------------------------------------------------------------------------------
// Sums of two floats (high, low), every operation error free or good to about 2^-104, in the order of _exact.py.
// Source: Dekker, "A floating-point technique for extending the available precision", 1971.

struct Double {
  double high, low;
};

GAITFAST_INLINE Double two_sum(double a, double b) {
  const double total = a + b, part = total - a;
  return {total, (a - (total - part)) + (b - part)};
}

GAITFAST_INLINE Double two_product(double a, double b) {
  const double product = a * b;
  return {product, std::fma(a, b, -product)};
}

GAITFAST_INLINE Double add(Double a, Double b) {
  const Double sum = two_sum(a.high, b.high);
  return two_sum(sum.high, sum.low + (a.low + b.low));
}

Double multiply(Double a, Double b) {
  const Double product = two_product(a.high, b.high);
  return two_sum(product.high, product.low + (a.high * b.low + a.low * b.high));
}

Double divide(Double a, Double b) {
  const double quotient = a.high / b.high;
  const Double back = multiply({quotient, 0.0}, b);
  const Double rest = add(a, {-back.high, -back.low});
  return two_sum(quotient, rest.high / b.high);
}

Double square_root(Double a) {
  const double root = std::sqrt(a.high);
  if (!(root > 0.0)) return {root, 0.0};
  const Double square = two_product(root, root);
  const Double rest = add(a, {-square.high, -square.low});
  return two_sum(root, rest.high / (2.0 * root));
}

// Sums over `length` rows of `parts` values each, by halves; the result lies in the first row.
template <bool kFma>
GAITFAST_INLINE void sum_rows_body(double* high, double* low, int64_t length, int64_t parts) {
  while (length > 1) {
    const int64_t half = length / 2, count = half * parts;
    for (int64_t i = 0; i < count; ++i) {
      const Double sum = add({high[i], low[i]}, {high[count + i], low[count + i]});
      high[i] = sum.high;
      low[i] = sum.low;
    }
    if (length % 2) {
      for (int64_t p = 0; p < parts; ++p) {
        high[count + p] = high[(length - 1) * parts + p];
        low[count + p] = low[(length - 1) * parts + p];
      }
    }
    length = half + length % 2;
  }
}

GAITFAST_MULTIVERSION(, sum_rows, (Simd level, double* high, double* low, int64_t length, int64_t parts),
                      (high, low, length, parts))

Double mean(double* high, double* low, int64_t count) {
  sum_rows_body<false>(high, low, count, 1);
  return divide({high[0], low[0]}, {static_cast<double>(count), 0.0});
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------

void sum_squares(const at::Tensor& features, double* out) {
  const Shape shape = shape_of("features", features);
  const int64_t period = period_of(shape.parts);
  const Simd level = simd();
  GAITFAST_DISPATCH_FEATURES(features.scalar_type(), "sum_squares", [&] {
    const auto* data = features.const_data_ptr<scalar_t>();
    parallel((shape.rows + kRowsOfTask - 1) / kRowsOfTask, [&](int64_t task) {
      std::vector<double> sums(period);
      const int64_t last = std::min(shape.rows, (task + 1) * kRowsOfTask);
      for (int64_t row = task * kRowsOfTask; row < last; ++row) {
        const scalar_t* x = data + row * shape.width();
        part_sums(level, x, x, x, shape.width(), period, shape.parts, false, sums.data());
        std::copy_n(sums.begin(), shape.parts, out + row * shape.parts);
      }
    });
  });
}

std::vector<double> cosine_weights(const double* squares, int64_t rows, int64_t parts) {
  std::vector<double> weights(rows * parts);
  for (int64_t i = 0; i < rows * parts; ++i) weights[i] = squares[i] > 0.0 ? 1.0 / std::sqrt(squares[i] * parts) : 0.0;
  return weights;
}

Pairs::Pairs(Metric metric, const at::Tensor& queries, const double* query_squares, const at::Tensor& gallery,
             const double* gallery_squares)
    : metric_(metric),
      queries_(queries),
      gallery_(gallery),
      query_shape_(shape_of("queries", queries)),
      gallery_shape_(shape_of("gallery", gallery)),
      gallery_squares_(gallery_squares),
      level_(simd()),
      tolerance_(metric, gallery_shape_),
      period_(period_of(gallery_shape_.parts)) {
  if (metric == Metric::cosine) {
    query_weights_ = cosine_weights(query_squares, query_shape_.rows, query_shape_.parts);
    gallery_weights_ = cosine_weights(gallery_squares, gallery_shape_.rows, gallery_shape_.parts);
  }
}

std::pair<const char*, size_t> Pairs::bytes(int64_t item) const {
  const size_t size = gallery_shape_.width() * gallery_.element_size();
  return {static_cast<const char*>(gallery_.const_data_ptr()) + item * size, size};
}

std::pair<const char*, size_t> Pairs::squares(int64_t item) const {
  const int64_t parts = gallery_shape_.parts;
  return {reinterpret_cast<const char*>(gallery_squares_ + item * parts), parts * sizeof(double)};
}

template <class T>
double Pairs::value_of(const T* x, const T* y, const T* next, int64_t query, int64_t item, Scratch& scratch) const {
  const int64_t parts = gallery_shape_.parts;
  scratch.sums.resize(period_);
  double* sums = scratch.sums.data();
  part_sums(level_, x, y, next, gallery_shape_.width(), period_, parts, metric_ == Metric::euclidean, sums);
  double total = 0.0;
  if (metric_ == Metric::euclidean) {
    for (int64_t p = 0; p < parts; ++p) total += std::sqrt(sums[p]);
    return total / parts;
  }
  const double* a = &query_weights_[query * parts];
  const double* b = &gallery_weights_[item * parts];
  for (int64_t p = 0; p < parts; ++p) total += sums[p] * (a[p] * b[p]);
  return 1.0 - total;
}

template <class T>
double Pairs::exact_of(const T* x, const T* y, Scratch& scratch) const {
  const int64_t channels = gallery_shape_.channels, parts = gallery_shape_.parts, width = channels * parts;
  for (auto* buffer : {&scratch.high, &scratch.low, &scratch.more_high, &scratch.more_low}) {
    buffer->resize(std::max<int64_t>(width, parts));
  }
  double *high = scratch.high.data(), *low = scratch.low.data();
  std::vector<double> results_high(parts), results_low(parts);
  const auto keep = [&](int64_t p, Double value) { results_high[p] = value.high, results_low[p] = value.low; };
  if (metric_ == Metric::euclidean) {
    for (int64_t i = 0; i < width; ++i) {
      const Double difference = two_sum(widen(x[i]), -widen(y[i]));
      const Double square = two_product(difference.high, difference.high);
      high[i] = square.high;
      low[i] = square.low + 2.0 * difference.high * difference.low;
    }
    sum_rows(level_, high, low, channels, parts);
    for (int64_t p = 0; p < parts; ++p) keep(p, square_root({high[p], low[p]}));
    return mean(results_high.data(), results_low.data(), parts).high;
  }
  // The product of two numbers of at most 24 bits is exact in float64.
  const auto dot = [&](const T* a, const T* b) {
    for (int64_t i = 0; i < width; ++i) high[i] = widen(a[i]) * widen(b[i]), low[i] = 0.0;
    sum_rows(level_, high, low, channels, parts);
  };
  std::vector<Double> norms(parts);
  dot(x, x);
  for (int64_t p = 0; p < parts; ++p) norms[p] = {high[p], low[p]};
  dot(y, y);
  for (int64_t p = 0; p < parts; ++p) norms[p] = multiply(norms[p], {high[p], low[p]});
  dot(x, y);
  for (int64_t p = 0; p < parts; ++p) {
    if (norms[p].high == 0.0) norms[p] = {1.0, 0.0};  // a part of zeros: its product is 0 as well
    keep(p, divide({high[p], low[p]}, square_root(norms[p])));
  }
  return 1.0 - mean(results_high.data(), results_low.data(), parts).high;
}

double Pairs::value(int64_t query, int64_t item, int64_t next, Scratch& scratch) const {
  double result = 0.0;
  GAITFAST_DISPATCH_FEATURES(queries_.scalar_type(), "value", [&] {
    const int64_t width = gallery_shape_.width();
    const scalar_t* gallery = gallery_.const_data_ptr<scalar_t>();
    result = value_of(queries_.const_data_ptr<scalar_t>() + query * width, gallery + item * width,
                      gallery + next * width, query, item, scratch);
  });
  return result;
}

double Pairs::exact(int64_t query, int64_t item, Scratch& scratch) const {
  double result = 0.0;
  GAITFAST_DISPATCH_FEATURES(queries_.scalar_type(), "exact", [&] {
    result = exact_of(queries_.const_data_ptr<scalar_t>() + query * gallery_shape_.width(),
                      gallery_.const_data_ptr<scalar_t>() + item * gallery_shape_.width(), scratch);
  });
  return result;
}

}  // namespace gaitfast::retrieval
