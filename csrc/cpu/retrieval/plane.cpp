#include "plane.h"

#include <sys/mman.h>

#include <cstring>

namespace gaitfast::retrieval {
namespace {

// To the nearest integer, for |x| < 2^22: beyond it float32 has no digits after the point.
GAITFAST_INLINE float nearest(float x) {
  constexpr float kWhole = 0x1.8p23f;
  return (x + kWhole) - kWhole;
}

// The largest |x[i] weights[i % period]| per place of a chunk.
template <bool kFma, class T>
GAITFAST_INLINE void largest_body(const T* x, int64_t width, int64_t period, const double* weights, double* out) {
  for (int64_t j = 0; j < period; ++j) out[j] = 0.0;
  for (int64_t start = 0; start < width; start += period) {
    const int64_t length = std::min(period, width - start);
    for (int64_t j = 0; j < length; ++j) {
      const double size = std::fabs(widen(x[start + j]) * weights[j]);
      out[j] = out[j] > size ? out[j] : size;
    }
  }
}

GAITFAST_MULTIVERSION(template <class T>, largest,
                      (Simd level, const T* x, int64_t width, int64_t period, const double* weights, double* out),
                      (x, width, period, weights, out))

// x[i] times `weights` is high + low / 254 + rest; sums of squares of the low values and of the rests per place.
template <bool kFma, class T>
GAITFAST_INLINE void split_row_body(const T* __restrict x, int64_t width, int64_t period,
                                    const double* __restrict weights, int8_t* __restrict high, int8_t* __restrict low,
                                    float* __restrict low_squares, float* __restrict rest_squares) {
  constexpr float kSteps = static_cast<float>(kLowSteps), kStep = 1.0f / kSteps;
  for (int64_t j = 0; j < period; ++j) low_squares[j] = rest_squares[j] = 0.0f;
  for (int64_t start = 0; start < width; start += period) {
    const int64_t length = std::min(period, width - start);
    for (int64_t j = 0; j < length; ++j) {
      // The weight may be far from 1, for features that are denormal or huge; what follows stays within 127.
      const float value = static_cast<float>(widen(x[start + j]) * weights[j]);
      const float whole = nearest(value), left = value - whole;
      const float steps = nearest(left * kSteps), rest = left - steps * kStep;
      high[start + j] = static_cast<int8_t>(static_cast<int32_t>(whole));
      low[start + j] = static_cast<int8_t>(static_cast<int32_t>(steps));
      low_squares[j] += steps * steps;
      rest_squares[j] += rest * rest;
    }
  }
}

GAITFAST_MULTIVERSION(template <class T>, split_row,
                      (Simd level, const T* x, int64_t width, int64_t period, const double* weights, int8_t* high,
                       int8_t* low, float* low_squares, float* rest_squares),
                      (x, width, period, weights, high, low, low_squares, rest_squares))

template <bool kFma, class T>
GAITFAST_INLINE void weigh_row_body(const T* x, int64_t width, int64_t period, const double* weights, float* out) {
  for (int64_t start = 0; start < width; start += period) {
    const int64_t length = std::min(period, width - start);
    for (int64_t j = 0; j < length; ++j) out[start + j] = static_cast<float>(widen(x[start + j]) * weights[j]);
  }
}

GAITFAST_MULTIVERSION(template <class T>, weigh_row,
                      (Simd level, const T* x, int64_t width, int64_t period, const double* weights, float* out),
                      (x, width, period, weights, out))

// The largest |x[i]| and the sum of squares per place of a chunk.
template <bool>
GAITFAST_INLINE void measure_body(const float* __restrict x, int64_t width, int64_t period, float* __restrict sizes,
                                  float* __restrict squares) {
  for (int64_t j = 0; j < period; ++j) sizes[j] = squares[j] = 0.0f;
  for (int64_t start = 0; start < width; start += period) {
    const int64_t length = std::min(period, width - start);
    for (int64_t j = 0; j < length; ++j) {
      const float size = std::fabs(x[start + j]);
      sizes[j] = sizes[j] > size ? sizes[j] : size;
      squares[j] += size * size;
    }
  }
}

GAITFAST_MULTIVERSION(, measure, (Simd level, const float* x, int64_t width, int64_t period, float* sizes, float* squares),
                      (x, width, period, sizes, squares))

// x[i] times `weights` is words + rest; sums of squares of the rests per place.
template <bool>
GAITFAST_INLINE void split_words_body(const float* __restrict x, int64_t width, int64_t period,
                                      const float* __restrict weights, int16_t* __restrict words,
                                      float* __restrict rest_squares) {
  for (int64_t j = 0; j < period; ++j) rest_squares[j] = 0.0f;
  for (int64_t start = 0; start < width; start += period) {
    const int64_t length = std::min(period, width - start);
    for (int64_t j = 0; j < length; ++j) {
      const float value = x[start + j] * weights[j], whole = nearest(value), rest = value - whole;
      words[start + j] = static_cast<int16_t>(static_cast<int32_t>(whole));
      rest_squares[j] += rest * rest;
    }
  }
}

GAITFAST_MULTIVERSION(, split_words,
                      (Simd level, const float* x, int64_t width, int64_t period, const float* weights, int16_t* words,
                       float* rest_squares),
                      (x, width, period, weights, words, rest_squares))

// A row in the order of its features, (C, P), to its places in the tiles. `row`: its number among the 16 of its group.
template <class T>
void place(const T* source, const Shape& shape, const Segments& segments, Side side, int64_t row, int64_t groups,
           T* group) {
  constexpr int64_t kDepth = kTileDepth / sizeof(T), kValues = kTileRows * kDepth, kQuadruple = 4 / sizeof(T);
  const int64_t step = segments.count == 1 ? 1 : shape.parts;  // between the values of a segment
  for (int64_t s = 0; s < segments.count; ++s) {
    T* tile = group + s * groups * segments.stride * kValues;
    for (int64_t start = 0; start < segments.values; start += kDepth, tile += kValues) {
      const int64_t length = std::min(kDepth, segments.values - start);
      const T* in = source + start * step + s;
      T line[kDepth] = {};
      if (step == 1) {
        std::memcpy(line, in, length * sizeof(T));
      } else {
        for (int64_t k = 0; k < length; ++k) line[k] = in[k * step];
      }
      if (side == Side::gallery) {
        std::memcpy(tile + row * kDepth, line, sizeof line);
      } else {
        for (int64_t k = 0; k < kDepth; k += kQuadruple) {
          std::memcpy(tile + k * kTileRows + row * kQuadruple, line + k, 4);
        }
      }
    }
  }
}

// Fills up the panel that `count` rows leave open.
template <class T>
void clear_rest(const Segments& segments, int64_t count, int64_t groups, T* plane) {
  const int64_t group_values = segments.stride * kTileRows * segments.depth;
  const int64_t full = count / kRowsOfPanel * kRowsOfPanel / kTileRows, used = padded_rows(count) / kTileRows;
  for (int64_t s = 0; s < segments.count; ++s) {
    std::fill_n(plane + (s * groups + full) * group_values, (used - full) * group_values, T{0});
  }
}

// Of the lengths of what is left out: values are rounded to float32 first, 2^-24 of a length of at most 1, and up to
// twice more on their way to integers. `round_up`: sums of squares are in float32 too.
constexpr double kLeast = 0x1p-22;
double round_up(int64_t width, int64_t period) { return 1.0 + 1e-5 + (width / period + 1) * 0x1p-24; }

}  // namespace

Form best_form() {
  const Simd level = simd();
  if (level == Simd::amx) return Form::bytes;
  return level == Simd::avx512 && has_vnni() ? Form::words : Form::floats;
}

void prefer_large_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may be ignored
#endif
}

Rows::Rows(Metric metric, const at::Tensor& features, const double* squares, double scale, Form form)
    : features_(features),
      shape_(shape_of("features", features)),
      segments_(metric, shape_, form),
      level_(simd()),
      period_(period_of(shape_.parts)),
      scale_(scale) {
  if (metric == Metric::cosine) weights_ = cosine_weights(squares, shape_.rows, shape_.parts);
}

void Rows::weigh(int64_t row, double* weights) const {
  for (int64_t j = 0; j < period_; ++j) {
    weights[j] = weights_.empty() ? scale_ : weights_[row * shape_.parts + j % shape_.parts];
  }
}

void Rows::to_tiles(int64_t first, int64_t count, Side side, int8_t* high, int8_t* low, Lengths* lengths,
                    int64_t rows) const {
  const int64_t groups = padded_rows(rows) / kTileRows, group_values = segments_.stride * kTileBytes;
  for (int8_t* plane : {high, low}) clear_rest(segments_, count, groups, plane);
  std::vector<int8_t> row_high(shape_.width()), row_low(shape_.width());
  std::vector<double> weights(period_), sizes(period_);
  std::vector<float> low_squares(period_), rest_squares(period_);
  const int64_t step = segments_.count == 1 ? 1 : shape_.parts;
  GAITFAST_DISPATCH_FEATURES(features_.scalar_type(), "to_tiles", [&] {
    for (int64_t i = 0; i < count; ++i) {
      const scalar_t* x = features_.const_data_ptr<scalar_t>() + (first + i) * shape_.width();
      Lengths* line = lengths + i * segments_.count;
      weigh(first + i, weights.data());
      largest(level_, x, shape_.width(), period_, weights.data(), sizes.data());
      for (int64_t s = 0; s < segments_.count; ++s) {
        double size = 1e-30;  // of a segment of zeros, and of what float32 could not hold: it stays in the rest
        for (int64_t j = s; j < period_; j += step) size = std::max(size, sizes[j]);
        line[s].unit = static_cast<float>(size / 127.0 * (1.0 + 1e-6));  // so that no value rounds to 128
        for (int64_t j = s; j < period_; j += step) weights[j] /= line[s].unit;
      }
      split_row(level_, x, shape_.width(), period_, weights.data(), row_high.data(), row_low.data(),
                low_squares.data(), rest_squares.data());
      for (int64_t s = 0; s < segments_.count; ++s) {
        double lows = 0.0, rests = 0.0;
        for (int64_t j = s; j < period_; j += step) lows += low_squares[j], rests += rest_squares[j];
        const double more = round_up(shape_.width(), period_);
        line[s].low = static_cast<float>(line[s].unit * std::sqrt(lows) / kLowSteps * more + kLeast);
        line[s].rest = static_cast<float>(line[s].unit * std::sqrt(rests) * more + kLeast);
      }
      const int64_t offset = i / kTileRows * group_values;
      place(row_high.data(), shape_, segments_, side, i % kTileRows, groups, high + offset);
      place(row_low.data(), shape_, segments_, side, i % kTileRows, groups, low + offset);
    }
  });
}

void Rows::to_words(int64_t first, int64_t count, Side side, int16_t* words, Lengths* lengths, int64_t rows) const {
  const int64_t width = shape_.width(), groups = padded_rows(rows) / kTileRows;
  clear_rest(segments_, count, groups, words);
  std::vector<int16_t> row(width);
  std::vector<double> weights(period_), units(segments_.count);
  std::vector<float> values(width), sizes(period_), squares(period_);
  const bool whole = segments_.count == 1;
  const int64_t step = whole ? 1 : shape_.parts;
  const int64_t run = whole ? kWordsOfStep : width;  // the parts' steps are not longer than the parts
  GAITFAST_DISPATCH_FEATURES(features_.scalar_type(), "to_words", [&] {
    for (int64_t i = 0; i < count; ++i) {
      const scalar_t* x = features_.const_data_ptr<scalar_t>() + (first + i) * width;
      Lengths* line = lengths + i * segments_.count;
      weigh(first + i, weights.data());
      weigh_row(level_, x, width, period_, weights.data(), values.data());
      std::fill(units.begin(), units.end(), 1e-9);  // what is shorter stays in the rest
      for (int64_t begin = 0; begin < width; begin += run) {
        measure(level_, values.data() + begin, std::min(run, width - begin), period_, sizes.data(), squares.data());
        for (int64_t s = 0; s < segments_.count; ++s) {
          double size = 0.0, square = 0.0;
          for (int64_t j = s; j < period_; j += step) size = std::max<double>(size, sizes[j]), square += squares[j];
          // Rounding adds at most sqrt(kWordsOfStep) / 2 = 11.4 to the length, and 0.5 to a word.
          constexpr double kLongest = 46300.0, kLargest = 32766.0;
          const double length = std::sqrt(square) * round_up(width, period_);
          units[s] = std::max({units[s], length / kLongest, size / kLargest});
        }
      }
      for (int64_t s = 0; s < segments_.count; ++s) {
        line[s].unit = static_cast<float>(units[s] * (1.0 + 1e-6));
        for (int64_t j = s; j < period_; j += step) sizes[j] = 1.0f / line[s].unit;
      }
      split_words(level_, values.data(), width, period_, sizes.data(), row.data(), squares.data());
      for (int64_t s = 0; s < segments_.count; ++s) {
        double rests = 0.0;
        for (int64_t j = s; j < period_; j += step) rests += squares[j];
        const double rest = line[s].unit * std::sqrt(rests) * round_up(width, period_) + kLeast;
        line[s].low = 0.0f;
        line[s].rest = static_cast<float>(rest * (1.0 + rest));  // two rests may be large enough to matter together
      }
      place(row.data(), shape_, segments_, side, i % kTileRows, groups,
            words + i / kTileRows * segments_.stride * kTileRows * segments_.depth);
    }
  });
}

void Rows::to_floats(int64_t first, int64_t count, float* out, int64_t rows) const {
  std::vector<float> values(segments_.count == 1 ? 0 : shape_.width());
  std::vector<double> weights(period_);
  GAITFAST_DISPATCH_FEATURES(features_.scalar_type(), "to_floats", [&] {
    for (int64_t i = 0; i < count; ++i) {
      const scalar_t* x = features_.const_data_ptr<scalar_t>() + (first + i) * shape_.width();
      weigh(first + i, weights.data());
      float* line = values.empty() ? out + i * segments_.values : values.data();
      weigh_row(level_, x, shape_.width(), period_, weights.data(), line);
      for (int64_t s = 0; !values.empty() && s < segments_.count; ++s) {
        float* segment = out + (s * rows + i) * segments_.values;
        for (int64_t k = 0; k < segments_.values; ++k) segment[k] = values[k * shape_.parts + s];
      }
    }
  });
}

}  // namespace gaitfast::retrieval
