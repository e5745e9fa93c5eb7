// What is done with features, one index at a time: sums of squares, planes of int8, distances of pairs.
//
// Features are (N, C, P), contiguous. A row is shared out among `lanes`, a multiple of P: lane j reads the values j,
// j + lanes, ..., all of part j % P, so that neighbouring threads read neighbouring memory.
#pragma once

#include "numbers.h"
#include "sizes.h"

namespace gaitfast::retrieval_cuda {

constexpr double kLowSteps = 254.0;  // steps of the low plane in one of the high plane

inline int64_t lanes_of(int64_t parts) {
  constexpr int64_t kAtLeast = 32;
  return parts >= kAtLeast ? parts : parts * ((kAtLeast + parts - 1) / parts);
}

GAITFAST_BOTH double cosine_weight(double square, int64_t parts) {
  return square > 0.0 ? 1.0 / sqrt(square * static_cast<double>(parts)) : 0.0;
}

// --- float64 ---------------------------------------------------------------------------------------------------------

// sums (n, lanes): of x y, or of (x - y)^2, for the pairs (rows[i], items[i]); without `rows`, of (i, i). A pair whose
// item is negative is left out.
template <class T>
struct LaneSums {
  const T *x, *y;
  const int64_t *rows, *items;
  int64_t width, lanes;
  bool difference;
  double* sums;

  GAITFAST_BOTH void operator()(int64_t index) const {
    const int64_t pair = index / lanes, lane = index % lanes;
    const int64_t row = rows ? rows[pair] : pair, item = rows ? items[pair] : pair;
    if (item < 0) return;
    const T *a = x + row * width, *b = y + item * width;
    double sum = 0.0;
    for (int64_t i = lane; i < width; i += lanes) {
      const double left = widen(a[i]), right = widen(b[i]), apart = left - right;
      sum += difference ? apart * apart : left * right;
    }
    sums[index] = sum;
  }
};

GAITFAST_BOTH double sum_of_part(const double* sums, int64_t lanes, int64_t parts, int64_t part) {
  double sum = 0.0;
  for (int64_t lane = part; lane < lanes; lane += parts) sum += sums[lane];
  return sum;
}

// squares (n, P) from sums (n, lanes).
struct PartSquares {
  const double* sums;
  int64_t lanes, parts;
  double* squares;

  GAITFAST_BOTH void operator()(int64_t index) const {
    squares[index] = sum_of_part(sums + index / parts * lanes, lanes, parts, index % parts);
  }
};

// distances (n) from sums (n, lanes): within the tolerance; infinite where the item is negative.
struct PairDistances {
  const double *sums, *query_squares, *gallery_squares;
  const int64_t *rows, *items;
  int64_t lanes, parts;
  bool cosine;
  double* distances;

  GAITFAST_BOTH void operator()(int64_t pair) const {
    const int64_t row = rows[pair], item = items[pair];
    if (item < 0) {
      distances[pair] = INFINITY;
      return;
    }
    double total = 0.0;
    for (int64_t part = 0; part < parts; ++part) {
      const double sum = sum_of_part(sums + pair * lanes, lanes, parts, part);
      total += cosine ? sum * (cosine_weight(query_squares[row * parts + part], parts) *
                               cosine_weight(gallery_squares[item * parts + part], parts))
                      : sqrt(sum);
    }
    distances[pair] = cosine ? 1.0 - total : total / static_cast<double>(parts);
  }
};

// --- the exact distance ----------------------------------------------------------------------------------------------

constexpr int kLevels = 5;  // of a sum by halves that one thread does by itself

// How many numbers are left after each level.
struct Levels {
  int64_t lengths[kLevels + 1];
  explicit Levels(int64_t length) : lengths{length} {
    for (int level = 0; level < kLevels; ++level) lengths[level + 1] = (lengths[level] + 1) / 2;
  }
  GAITFAST_BOTH int64_t last() const { return lengths[kLevels]; }
};

// The first levels of the sums over the channels: out (n, terms, last, P). Terms of the cosine: x x, y y, x y; of the
// Euclidean distance: (x - y)^2.
template <class T>
struct ExactLeaves {
  const T *x, *y;
  const int64_t *rows, *items;
  int64_t parts, terms;
  Levels levels;
  Double* out;

  GAITFAST_BOTH void operator()(int64_t index) const {
    const int64_t part = index % parts, i = index / parts % levels.last();
    const int64_t term = index / (parts * levels.last()) % terms, pair = index / (parts * levels.last() * terms);
    const int64_t width = levels.lengths[0] * parts;
    const T *a = x + rows[pair] * width + part, *b = y + items[pair] * width + part;
    if (terms == 1) {
      out[index] = sum_by_halves<kLevels>(levels.lengths, i, [&](int64_t channel) {
        const Double apart = two_sum(widen(a[channel * parts]), -widen(b[channel * parts]));
        const Double square = two_product(apart.high, apart.high);
        return Double{square.high, square.low + product(2.0 * apart.high, apart.low)};
      });
    } else {
      const T *left = term == 1 ? b : a, *right = term == 0 ? a : b;
      out[index] = sum_by_halves<kLevels>(levels.lengths, i, [&](int64_t channel) {
        // Exact in float64: the factors have 24 bits.
        return Double{product(widen(left[channel * parts]), widen(right[channel * parts])), 0.0};
      });
    }
  }
};

// The levels after those: out (n terms, last, P) from in (n terms, length, P).
struct ExactSums {
  const Double* in;
  int64_t parts;
  Levels levels;
  Double* out;

  GAITFAST_BOTH void operator()(int64_t index) const {
    const int64_t part = index % parts, i = index / parts % levels.last(), sum = index / (parts * levels.last());
    const Double* first = in + sum * levels.lengths[0] * parts + part;
    out[index] = sum_by_halves<kLevels>(levels.lengths, i, [&](int64_t j) { return first[j * parts]; });
  }
};

// The cosine or the Euclidean distance of each part, in the place of its first sum: sums (n, terms, P).
struct ExactParts {
  Double* sums;
  int64_t parts, terms;

  GAITFAST_BOTH void operator()(int64_t index) const {
    Double* own = sums + index / parts * terms * parts + index % parts;
    if (terms == 1) {
      *own = square_root(*own);
      return;
    }
    const Double norms = multiply(own[0], own[parts]);
    // A part of zeros: its product is 0 as well.
    *own = divide(own[2 * parts], norms.high == 0.0 ? Double{1.0, 0.0} : square_root(norms));
  }
};

// distances (n) from what ExactParts leaves, which is overwritten.
struct ExactMeans {
  Double* sums;
  int64_t parts, terms;
  double* distances;

  GAITFAST_BOTH void operator()(int64_t pair) const {
    Double* own = sums + pair * terms * parts;
    for (int64_t length = parts; length > 1; length = (length + 1) / 2) {
      const int64_t half = length / 2;
      for (int64_t i = 0; i < half; ++i) own[i] = add(own[i], own[half + i]);
      if (length % 2) own[half] = own[length - 1];
    }
    const double mean = divide(own[0], {static_cast<double>(parts), 0.0}).high;
    distances[pair] = terms == 1 ? mean : 1.0 - mean;
  }
};

// --- planes ----------------------------------------------------------------------------------------------------------
// Cosine: rows are normalised per part and divided by sqrt(P), one segment of C P values, so that their dot product is
// the mean cosine. Euclidean: a segment of C values per part, times a power of two that brings the longest part to at
// most 1. A segment is unit (high + low / 254) + rest with int8 high and low: see csrc/cpu/retrieval/plane.h.

// Of one segment: its unit, and upper bounds of the lengths of its low part and of its rest.
struct Lengths {
  float unit, low, rest;
};

// Rows that become planes (segments, padded rows, 2 depth). Every `kDepth` values the high ones are followed by the low
// ones; on the other side of a product (`swapped`) the low ones by the high ones.
template <class T>
struct Rows {
  const T* features;
  const double* squares;
  int64_t channels, parts, lanes, padded, depth;
  bool cosine, swapped;
  double scale;

  GAITFAST_BOTH int64_t width() const { return channels * parts; }
  GAITFAST_BOTH int64_t segments() const { return cosine ? 1 : parts; }
  GAITFAST_BOTH double weight(int64_t row, int64_t part) const {
    return cosine ? cosine_weight(squares[row * parts + part], parts) : scale;
  }
};

// sizes (n, lanes): the largest |value|.
template <class T>
struct LargestValues {
  Rows<T> rows;
  double* sizes;

  GAITFAST_BOTH void operator()(int64_t index) const {
    const int64_t row = index / rows.lanes, lane = index % rows.lanes;
    const T* x = rows.features + row * rows.width();
    const double weight = rows.weight(row, lane % rows.parts);
    double size = 0.0;
    for (int64_t i = lane; i < rows.width(); i += rows.lanes) size = fmax(size, fabs(widen(x[i]) * weight));
    sizes[index] = size;
  }
};

// lengths (n, segments): the unit of each, from sizes (n, lanes).
struct SegmentUnits {
  const double* sizes;
  int64_t lanes, segments;
  Lengths* lengths;

  GAITFAST_BOTH void operator()(int64_t index) const {
    const double* own = sizes + index / segments * lanes;
    double size = 1e-30;  // of a segment of zeros, and of what float32 could not hold: it stays in the rest
    for (int64_t lane = index % segments; lane < lanes; lane += segments) size = fmax(size, own[lane]);
    lengths[index].unit = static_cast<float>(size / 127.0 * (1.0 + 1e-6));  // so that no value rounds to 128
  }
};

// The planes, and low_squares, rest_squares (n, lanes), in units.
template <class T>
struct SplitRows {
  Rows<T> rows;
  const Lengths* lengths;
  int8_t* planes;
  double *low_squares, *rest_squares;

  GAITFAST_BOTH void operator()(int64_t index) const {
    const int64_t row = index / rows.lanes, lane = index % rows.lanes, part = lane % rows.parts;
    const int64_t segment = rows.cosine ? 0 : part;
    const T* x = rows.features + row * rows.width();
    const double weight = rows.weight(row, part) / lengths[row * rows.segments() + segment].unit;
    int8_t* own = planes + (segment * rows.padded + row) * 2 * rows.depth;
    double lows = 0.0, rests = 0.0;
    for (int64_t i = lane; i < rows.width(); i += rows.lanes) {
      const double value = widen(x[i]) * weight, whole = rint(value), left = value - whole;
      const double steps = rint(left * kLowSteps), rest = left - steps * (1.0 / kLowSteps);
      const int64_t place = rows.cosine ? i : i / rows.parts, chunk = place / kDepth * kDepth;
      const int64_t length = rows.depth - chunk < kDepth ? rows.depth - chunk : kDepth;
      int8_t* at = own + chunk + place;
      at[rows.swapped ? length : 0] = static_cast<int8_t>(whole);
      at[rows.swapped ? 0 : length] = static_cast<int8_t>(steps);
      lows += steps * steps;
      rests += rest * rest;
    }
    low_squares[index] = lows;
    rest_squares[index] = rests;
  }
};

// lengths (n, segments): low and rest of each, from sums (n, lanes).
struct SegmentLengths {
  const double *low_squares, *rest_squares;
  int64_t lanes, segments;
  Lengths* lengths;

  GAITFAST_BOTH void operator()(int64_t index) const {
    constexpr double kRound = 1.0 + 1e-6, kLeast = 1e-14;  // float64 itself is off by 1e-15 of a length of at most 1
    const int64_t first = index / segments * lanes, segment = index % segments;
    const double unit = lengths[index].unit;
    const double lows = sum_of_part(low_squares + first, lanes, segments, segment);
    const double rests = sum_of_part(rest_squares + first, lanes, segments, segment);
    lengths[index].low = static_cast<float>(unit * sqrt(lows) / kLowSteps * kRound + kLeast);
    lengths[index].rest = static_cast<float>(unit * sqrt(rests) * kRound + kLeast);
  }
};

}  // namespace gaitfast::retrieval_cuda
