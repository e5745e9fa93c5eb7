#include "warp.h"

#include <algorithm>
#include <cmath>

#include "retrieval/simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace gaitfast {
namespace {

using retrieval::Simd;

constexpr int64_t kLanes = 32;            // frames at a time
constexpr int64_t kTile = 16;             // bytes that are transposed at once, in both directions
constexpr int64_t kRow = Warp::kSize + 2;  // pixels of a row with its border
constexpr int64_t kPixels = Warp::kSize * Warp::kSize;
constexpr uint32_t kOne = (1u << 16) - 1;  // the sum of the four weights
// Half a grey level, and the mean of what four products lose below 2^-8.
constexpr uint16_t kRounding = 128 + 2;

// Where the pixels of one output row come from: the place of each one's upper left neighbour in a (66, 66) canvas, and the
// weights of the four. A pixel without a neighbour inside has weights of zero.
struct Row {
  int32_t place[Warp::kSize], here[Warp::kSize], right[Warp::kSize], below[Warp::kSize], diagonal[Warp::kSize];
};

template <bool>
GAITFAST_INLINE void locate_body(const double* m, double y, Row& __restrict__ row) {
  constexpr double kEnd = Warp::kSize + 2;
  constexpr float kScale = kOne;
  double u[Warp::kSize], v[Warp::kSize];
  for (int32_t x = 0; x < Warp::kSize; ++x) {
    const double w = 1.0 / (m[6] * x + m[7] * y + m[8]);
    const double a = (m[0] * x + m[1] * y + m[2]) * w + 2.0, b = (m[3] * x + m[4] * y + m[5]) * w + 2.0;
    // Beyond the border nothing differs; written so that NaN ends there too.
    const double c = a > 0.0 ? a : 0.0, d = b > 0.0 ? b : 0.0;
    u[x] = c < kEnd ? c : kEnd;
    v[x] = d < kEnd ? d : kEnd;
  }
  for (int32_t x = 0; x < Warp::kSize; ++x) {
    const int32_t column = static_cast<int32_t>(u[x]), line = static_cast<int32_t>(v[x]);  // 2 is the first pixel
    const float to_right = static_cast<float>(u[x] - column), to_below = static_cast<float>(v[x] - line);
    const int32_t inside = (column >= 1) & (column <= Warp::kSize + 1) & (line >= 1) & (line <= Warp::kSize + 1);
    const int32_t diagonal = static_cast<int32_t>(to_right * to_below * kScale + 0.5f);
    const int32_t right = static_cast<int32_t>(to_right * (1.0f - to_below) * kScale + 0.5f);
    const int32_t below = static_cast<int32_t>((1.0f - to_right) * to_below * kScale + 0.5f);
    const int32_t here = static_cast<int32_t>(kOne) - diagonal - right - below;  // rounded, those may exceed it by one
    row.place[x] = inside * ((line - 1) * static_cast<int32_t>(kRow) + column - 1);
    row.here[x] = inside * (here > 0 ? here : 0);
    row.right[x] = inside * right;
    row.below[x] = inside * below;
    row.diagonal[x] = inside * diagonal;
  }
}

GAITFAST_MULTIVERSION(template <int kUnused = 0>, locate, (Simd level, const double* m, double y, Row& row), (m, y, row))

GAITFAST_INLINE uint16_t product(uint16_t pixel, uint16_t weight) {
  return static_cast<uint16_t>(uint32_t(pixel) * weight >> 16);
}

template <bool, class Weights>
GAITFAST_INLINE void blend_body(const uint16_t* lanes, const uint8_t* canvas, const int32_t* base,
                                const Weights* weights, int64_t pixels, uint8_t* __restrict__ out) {
  for (int64_t i = 0; i < pixels; ++i) {
    if (!canvas[base[i]]) {  // two pixels in three: people are narrow
      std::fill_n(out + i * kLanes, kLanes, 0);
      continue;
    }
    const uint16_t* here = lanes + base[i] * kLanes;
    const uint16_t* below = here + kRow * kLanes;
    const Weights w = weights[i];
    for (int64_t t = 0; t < kLanes; ++t) {
      const uint16_t sum = product(here[t], w.here) + product(here[kLanes + t], w.right) + product(below[t], w.below) +
                           product(below[kLanes + t], w.diagonal) + kRounding;
      out[i * kLanes + t] = static_cast<uint8_t>(sum >> 8);
    }
  }
}

GAITFAST_MULTIVERSION(template <class Weights>, blend,
                      (Simd level, const uint16_t* lanes, const uint8_t* canvas, const int32_t* base,
                       const Weights* weights, int64_t pixels, uint8_t* out),
                      (lanes, canvas, base, weights, pixels, out))

// rows[i][j] -> columns[j][i], 16 x 16 bytes.
#if defined(__SSE2__)
inline void transpose(__m128i* x) {
  // Interleaving row i with row i + 8, four times over, rotates the eight bits of the place (i, j) by four.
  for (int round = 0; round < 4; ++round) {
    __m128i y[kTile];
    for (int64_t i = 0; i < kTile / 2; ++i) {
      y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + kTile / 2]);
      y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + kTile / 2]);
    }
    std::copy_n(y, kTile, x);
  }
}
#endif

}  // namespace

Warp::Warp()
    : lanes_(kRow * kRow * kLanes),
      canvas_(kRow * kRow),
      result_(kPixels * kLanes),
      base_(kPixels),
      weights_(kPixels) {}

void Warp::prepare(const double* matrix, int64_t width) {
  width_ = width;
  const Simd level = retrieval::simd();
  Row row;
  for (int64_t y = 0; y < kSize; ++y) {
    locate(level, matrix, static_cast<double>(y), row);
    for (int64_t x = 0; x < width; ++x) {
      const int64_t i = y * width + x;
      base_[i] = row.place[x];
      weights_[i] = {static_cast<uint16_t>(row.here[x]), static_cast<uint16_t>(row.right[x]),
                     static_cast<uint16_t>(row.below[x]), static_cast<uint16_t>(row.diagonal[x])};
    }
  }
}

void Warp::run(const uint8_t* frames, int64_t count, uint8_t* out) {
  const Simd level = retrieval::simd();
  for (int64_t t = 0; t < count; t += kLanes) {
    const int64_t now = std::min(kLanes, count - t);
    find_black(frames + t * kStride, now);
    transpose_in(frames + t * kStride, now);
    blend(level, lanes_.data(), canvas_.data(), base_.data(), weights_.data(), kSize * width_, result_.data());
    transpose_out(now, out + t * kSize * width_);
  }
}

void Warp::find_black(const uint8_t* frames, int64_t count) {
  uint8_t pairs[(kSize + 2) * kRow] = {};  // a pixel and its right neighbour, rows -1 to 64
  for (int64_t y = 0; y < kSize; ++y) {
    uint8_t seen[kSize] = {};
    for (int64_t t = 0; t < count; ++t)
      for (int64_t x = 0; x < kSize; ++x) seen[x] |= frames[t * kStride + y * kSize + x];
    uint8_t* const row = pairs + (y + 1) * kRow;
    for (int64_t x = 0; x < kSize; ++x) row[x] = seen[x];
    for (int64_t x = 0; x < kSize; ++x) row[x + 1] |= seen[x];
  }
  for (int64_t i = 0; i < (kRow - 1) * kRow; ++i) canvas_[i] = pairs[i] | pairs[i + kRow];
}

void Warp::transpose_in(const uint8_t* frames, int64_t count) {
  for (int64_t first = 0; first < std::min(kLanes, (count + kTile - 1) / kTile * kTile); first += kTile) {
    for (int64_t pixel = 0; pixel < kPixels; pixel += kTile) {
      const int64_t y = pixel / kSize, x = pixel % kSize;
      uint16_t* const to = lanes_.data() + ((y + 1) * kRow + x + 1) * kLanes + first;
#if defined(__SSE2__)
      __m128i tile[kTile];
      for (int64_t t = 0; t < kTile; ++t)
        tile[t] = first + t < count
                      ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(frames + (first + t) * kStride + pixel))
                      : _mm_setzero_si128();
      transpose(tile);
      for (int64_t p = 0; p < kTile; ++p) {
        auto* const lanes = reinterpret_cast<__m128i*>(to + p * kLanes);
        _mm_storeu_si128(lanes, _mm_unpacklo_epi8(_mm_setzero_si128(), tile[p]));
        _mm_storeu_si128(lanes + 1, _mm_unpackhi_epi8(_mm_setzero_si128(), tile[p]));
      }
#else
      for (int64_t p = 0; p < kTile; ++p)
        for (int64_t t = 0; t < kTile; ++t)
          to[p * kLanes + t] = first + t < count ? frames[(first + t) * kStride + pixel + p] << 8 : 0;
#endif
    }
  }
}

void Warp::transpose_out(int64_t count, uint8_t* out) const {
  const int64_t pixels = kSize * width_;  // a multiple of kSize: whole lines of the cache are written at once
  for (int64_t pixel = 0; pixel < pixels; pixel += kSize) {
    for (int64_t first = 0; first < count; first += kTile) {
      const uint8_t* from = result_.data() + pixel * kLanes + first;
      uint8_t* const to = out + first * pixels + pixel;
      const int64_t frames = std::min(kTile, count - first);
#if defined(__SSE2__)
      __m128i tiles[kSize / kTile][kTile];
      for (int64_t k = 0; k < kSize / kTile; ++k) {
        for (int64_t p = 0; p < kTile; ++p)
          tiles[k][p] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + (k * kTile + p) * kLanes));
        transpose(tiles[k]);
      }
      for (int64_t t = 0; t < frames; ++t)
        for (int64_t k = 0; k < kSize / kTile; ++k)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + t * pixels + k * kTile), tiles[k][t]);
#else
      for (int64_t t = 0; t < frames; ++t)
        for (int64_t p = 0; p < kSize; ++p) to[t * pixels + p] = from[p * kLanes + t];
#endif
    }
  }
}

}  // namespace gaitfast
