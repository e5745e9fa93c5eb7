// Batch norm of a backbone's maps, a shortcut and ReLU. Each pass goes through a part a few rows at a time, and through
// these by columns, whose sums and factors stay in registers.
#pragma once

#include "vectors.h"

namespace gaitfast::denoiser {
namespace {

// `values` where z > 0 or z is not a number, else zero.
GAITFAST_INLINE Floats pass(Floats values, Floats z) {
#if GAITFAST_LEVEL >= 2
  return (Floats)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)z, __m512{}, _CMP_NLE_UQ), (__m512)values);
#elif GAITFAST_LEVEL == 1
  union Parts {
    Floats whole;
    __m256 half[2];
  } v{values}, w{z};
  for (int i = 0; i < 2; ++i) v.half[i] = _mm256_and_ps(v.half[i], _mm256_cmp_ps(w.half[i], __m256{}, _CMP_NLE_UQ));
  return v.whole;
#else
  return z <= 0.f ? Floats{} : values;
#endif
}

// f(first element, rows) for a few rows of a task at a time.
template <class F>
GAITFAST_INLINE void for_rows(const FrameNorm& a, int64_t task, const F& f) {
  const int64_t end = smaller((task + 1) * a.part(), a.rows);
  for (int64_t row = task * a.part(); row < end; row += kChunk) f(row * a.channels, smaller(kChunk, end - row));
}

// z at N vectors of channels, from channel c on.
template <int N>
struct Line {
  Floats mean[N], gain[N], bias[N];

  GAITFAST_INLINE Line(const FrameNorm& a, int64_t lanes, int64_t c) {
    for (int v = 0; v < N; ++v) {
      mean[v] = load(a.mean + c + v * kLanes, lanes);
      gain[v] = load(a.gain + c + v * kLanes, lanes);
      bias[v] = load(a.bias + c + v * kLanes, lanes);
    }
  }
  GAITFAST_INLINE Floats operator()(Floats x, int v) const { return fma(x - mean[v], gain[v], bias[v]); }
};

template <int N>
GAITFAST_INLINE void add_to(float* sums, const Floats* values, int64_t lanes) {
  for (int v = 0; v < N; ++v) store(load(sums + v * kLanes, lanes) + values[v], sums + v * kLanes, lanes);
}

// The mean of some rows.
template <int N>
struct Pivot {
  template <class T>
  static GAITFAST_INLINE void run(int64_t lanes, int64_t c, const T* x, int64_t stride, int64_t rows, float* pivot) {
    Floats sum[N] = {};
    for (int64_t r = 0; r < rows; ++r) {
      for (int v = 0; v < N; ++v) sum[v] += load(x + r * stride + c + v * kLanes, lanes);
    }
    const float part = 1.f / static_cast<float>(rows);
    for (int v = 0; v < N; ++v) store(sum[v] * part, pivot + c + v * kLanes, lanes);
  }
};

// Adds up x - pivot and its square.
template <int N>
struct Moments {
  template <class T>
  static GAITFAST_INLINE void run(int64_t lanes, int64_t c, const T* x, int64_t stride, int64_t rows, const float* pivot,
                                  float* sums, float* squares) {
    Floats centre[N], sum[N] = {}, square[N] = {};
    for (int v = 0; v < N; ++v) centre[v] = load(pivot + c + v * kLanes, lanes);
    for (int64_t r = 0; r < rows; ++r) {
      for (int v = 0; v < N; ++v) {
        const Floats value = load(x + r * stride + c + v * kLanes, lanes) - centre[v];
        sum[v] += value;
        square[v] = fma(value, value, square[v]);
      }
    }
    add_to<N>(sums + c, sum, lanes);
    add_to<N>(squares + c, square, lanes);
  }
};

// Moves the pivots to the means of n rows, given the sums of x - pivot and of its square, if these are mostly due to a
// pivot that is off: their difference to the squares about the mean would cancel.
GAITFAST_INLINE bool moves_pivots(int64_t n, int64_t channels, const float* sums, const float* squares, float* pivot) {
  const float count = static_cast<float>(n);
  bool off = false;
  for (int64_t c = 0; c < channels; ++c) off |= sums[c] * sums[c] > 0.75f * count * squares[c];
  for (int64_t c = 0; c < channels && off; ++c) pivot[c] += sums[c] / count;
  return off;
}

// parts: a pivot near the mean, and the sums of x - pivot and of its square. The pivot is the mean of the first rows;
// where that does not do, of all.
template <class T>
void frame_moments(const FrameNorm& a, int64_t begin, int64_t end, float*) {
  for (int64_t task = begin; task < end; ++task) {
    const T* x = static_cast<const T*>(a.x);
    float *pivot = a.parts + task * FrameNorm::kSums * a.channels, *sums = pivot + a.channels, *squares = sums + a.channels;
    const int64_t first = task * a.part(), count = smaller(a.part(), a.rows - first);
    for_vectors<Pivot>(a.channels, x + first * a.channels, a.channels, smaller(kChunk, count), pivot);
    for (bool again = false;; again = true) {
      std::memset(sums, 0, 2 * a.channels * sizeof(float));
      for_rows(a, task, [&](int64_t from, int64_t rows) __attribute__((always_inline)) {
        for_vectors<Moments>(a.channels, x + from, a.channels, rows, pivot, sums, squares);
      });
      if (again || count <= kChunk || !moves_pivots(count, a.channels, sums, squares, pivot)) break;
    }
  }
}

template <Ending kEnding>
struct Normalise {
  template <int N>
  struct Part {
    template <class T>
    static GAITFAST_INLINE void run(int64_t lanes, int64_t c, const FrameNorm& a, int64_t from, int64_t rows, const T* x) {
      const Line<N> line(a, lanes, c);
      for (int64_t r = 0; r < rows; ++r) {
        for (int v = 0; v < N; ++v) {
          const int64_t at = from + r * a.channels + c + v * kLanes;
          Floats z = line(load(x + at, lanes), v);
          if constexpr (kEnding == Ending::shortcut) z += load(static_cast<const T*>(a.other) + at, lanes);
          if constexpr (kEnding != Ending::plain) z = pass(z, z);
          store(z, static_cast<T*>(a.out) + at, lanes);
        }
      }
    }
  };
};

// Adds up the gradient of z and its product with x - mean. Where the result tells what passed the ReLU, stores the former.
template <Ending kEnding>
struct FrameSlopes {
  template <int N>
  struct Part {
    template <class T>
    static GAITFAST_INLINE void run(int64_t lanes, int64_t c, const FrameNorm& a, int64_t from, int64_t rows, const T* x,
                                    float* sums, float* products) {
      const Line<N> line(a, lanes, c);
      Floats sum[N] = {}, product[N] = {};
      for (int64_t r = 0; r < rows; ++r) {
        for (int v = 0; v < N; ++v) {
          const int64_t at = from + r * a.channels + c + v * kLanes;
          const Floats value = load(x + at, lanes);
          Floats slope = load(static_cast<const T*>(a.grad) + at, lanes);
          if constexpr (kEnding == Ending::relu) slope = pass(slope, line(value, v));
          if constexpr (kEnding == Ending::shortcut) {
            slope = pass(slope, load(static_cast<const T*>(a.other) + at, lanes));
            store(slope, static_cast<T*>(a.masked) + at, lanes);
          }
          sum[v] += slope;
          product[v] = fma(slope, value - line.mean[v], product[v]);
        }
      }
      add_to<N>(sums + c, sum, lanes);
      add_to<N>(products + c, product, lanes);
    }
  };
};

// The gradient of x from that of z, which is stored if there is a shortcut.
template <Ending kEnding>
struct FrameGradient {
  template <int N>
  struct Part {
    template <class T>
    static GAITFAST_INLINE void run(int64_t lanes, int64_t c, const FrameNorm& a, int64_t from, int64_t rows, const T* x) {
      const Line<N> line(a, lanes, c);
      Floats level[N], along[N];
      for (int v = 0; v < N; ++v) {
        level[v] = load(a.level + c + v * kLanes, lanes);
        along[v] = load(a.along + c + v * kLanes, lanes);
      }
      const T* grad = static_cast<const T*>(kEnding == Ending::shortcut ? a.masked : a.grad);
      for (int64_t r = 0; r < rows; ++r) {
        for (int v = 0; v < N; ++v) {
          const int64_t at = from + r * a.channels + c + v * kLanes;
          const Floats value = load(x + at, lanes);
          Floats slope = load(grad + at, lanes);
          if constexpr (kEnding == Ending::relu) slope = pass(slope, line(value, v));
          const Floats rest = fma(line.mean[v] - value, along[v], slope - level[v]);
          store(rest * line.gain[v], static_cast<T*>(a.out) + at, lanes);
        }
      }
    }
  };
};

template <class T, template <int> class Part>
GAITFAST_INLINE void frame_pass(const FrameNorm& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    for_rows(a, task, [&](int64_t from, int64_t rows) __attribute__((always_inline)) {
      for_vectors<Part>(a.channels, a, from, rows, static_cast<const T*>(a.x));
    });
  }
}

template <class T>
void frame_norm(const FrameNorm& a, int64_t begin, int64_t end, float*) {
  switch (a.ending) {
    case Ending::plain:
      return frame_pass<T, Normalise<Ending::plain>::template Part>(a, begin, end);
    case Ending::relu:
      return frame_pass<T, Normalise<Ending::relu>::template Part>(a, begin, end);
    case Ending::shortcut:
      return frame_pass<T, Normalise<Ending::shortcut>::template Part>(a, begin, end);
  }
}

template <class T, template <int> class Part>
GAITFAST_INLINE void slope_sums(const FrameNorm& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    float *sums = a.parts + task * FrameNorm::kSums * a.channels, *products = sums + a.channels;
    std::memset(sums, 0, 2 * a.channels * sizeof(float));
    for_rows(a, task, [&](int64_t from, int64_t rows) __attribute__((always_inline)) {
      for_vectors<Part>(a.channels, a, from, rows, static_cast<const T*>(a.x), sums, products);
    });
  }
}

// parts: the sums of the gradient of z and of its product with x - mean.
template <class T>
void frame_norm_sums(const FrameNorm& a, int64_t begin, int64_t end, float*) {
  switch (a.ending) {
    case Ending::plain:
      return slope_sums<T, FrameSlopes<Ending::plain>::template Part>(a, begin, end);
    case Ending::relu:
      return slope_sums<T, FrameSlopes<Ending::relu>::template Part>(a, begin, end);
    case Ending::shortcut:
      return slope_sums<T, FrameSlopes<Ending::shortcut>::template Part>(a, begin, end);
  }
}

template <class T>
void frame_norm_gradient(const FrameNorm& a, int64_t begin, int64_t end, float*) {
  switch (a.ending) {
    case Ending::plain:
      return frame_pass<T, FrameGradient<Ending::plain>::template Part>(a, begin, end);
    case Ending::relu:
      return frame_pass<T, FrameGradient<Ending::relu>::template Part>(a, begin, end);
    case Ending::shortcut:
      return frame_pass<T, FrameGradient<Ending::shortcut>::template Part>(a, begin, end);
  }
}

}  // namespace
}  // namespace gaitfast::denoiser
