// Layer norm of rows that lie one after another; the backward pass computes the statistics again.
#pragma once

#include "vectors.h"

namespace gaitfast::denoiser {
namespace {

// A row of `channels` channels in N vectors; beyond its end, lanes are zero. With N = 0 any width, read again when needed.
template <class T, int N>
struct NormRow {
  static constexpr int kHeld = N > 0 ? N : 1;
  const T* x;
  int64_t channels;
  float mean, inverse;
  Floats held[kHeld];

  GAITFAST_INLINE NormRow(const T* x_, int64_t channels_, float eps) : x(x_), channels(channels_) {
    Floats sum = {}, squares = {};
    if constexpr (N > 0) {
      for (int v = 0; v < N; ++v) held[v] = load(x + v * kLanes);
      for (int v = 0; v < N; ++v) sum += held[v];
      mean = total(sum) / static_cast<float>(channels);
      for (int v = 0; v < N; ++v) {
        const Floats centred = held[v] - mean;
        squares = fma(centred, centred, squares);
      }
    } else {
      for (int64_t c = 0; c < channels; c += kLanes) sum += load(x + c, channels - c);
      mean = total(sum) / static_cast<float>(channels);
      const int64_t whole = channels / kLanes * kLanes;
      for (int64_t c = 0; c < whole; c += kLanes) {
        const Floats centred = load(x + c) - mean;
        squares = fma(centred, centred, squares);
      }
      if (whole < channels) {
        alignas(64) float centred[kLanes] = {};
        store(load(x + whole, channels - whole) - mean, centred, channels - whole);
        squares = fma(load(centred), load(centred), squares);
      }
    }
    inverse = 1.f / __builtin_sqrtf(total(squares) / static_cast<float>(channels) + eps);
  }

  GAITFAST_INLINE int64_t vectors() const { return N > 0 ? N : (channels + kLanes - 1) / kLanes; }
  GAITFAST_INLINE int64_t lanes(int64_t v) const { return N > 0 ? kLanes : channels - v * kLanes; }
  GAITFAST_INLINE Floats normalised(int64_t v) const {
    const Floats value = N > 0 ? held[N > 0 ? v : 0] : load(x + v * kLanes, lanes(v));
    return (value - mean) * inverse;
  }
};

template <class T, int N>
GAITFAST_INLINE void norm_rows(const LayerNorm& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const NormRow<T, N> own(static_cast<const T*>(a.x) + row * a.channels, N > 0 ? N * kLanes : a.channels, a.eps);
    T* y = static_cast<T*>(a.out) + row * a.channels;
    for (int64_t v = 0; v < own.vectors(); ++v) {
      store(own.normalised(v) * load(a.weight + v * kLanes, own.lanes(v)), y + v * kLanes, own.lanes(v));
    }
  }
}

template <class T, int N>
GAITFAST_INLINE void norm_rows_backward(const LayerNorm& a, int64_t first, int64_t last, float* weight) {
  const int64_t channels = N > 0 ? N * kLanes : a.channels;
  const float part = 1.f / static_cast<float>(channels);
  for (int64_t row = first; row < last; ++row) {
    const NormRow<T, N> own(static_cast<const T*>(a.x) + row * channels, channels, a.eps);
    const T* grad = static_cast<const T*>(a.grad) + row * channels;
    T* out = static_cast<T*>(a.out) + row * channels;
    Floats level = {}, along = {};
    // Beyond the last channel the gradient is zero, so nothing is added there.
    for (int64_t v = 0; v < own.vectors(); ++v) {
      const int64_t c = v * kLanes, lanes = own.lanes(v);
      const Floats n = own.normalised(v), slope = load(grad + c, lanes), inner = slope * load(a.weight + c, lanes);
      store(fma(slope, n, load(weight + c, lanes)), weight + c, lanes);
      level += inner;
      along = fma(inner, n, along);
    }
    const float mean = total(level) * part, by = total(along) * part;
    for (int64_t v = 0; v < own.vectors(); ++v) {
      const int64_t c = v * kLanes, lanes = own.lanes(v);
      const Floats inner = load(grad + c, lanes) * load(a.weight + c, lanes);
      store((inner - mean - own.normalised(v) * by) * own.inverse, out + c, lanes);
    }
  }
}

template <class T>
void layer_norm(const LayerNorm& a, int64_t begin, int64_t end, float*) {
  const int64_t first = begin * LayerNorm::kRows, last = smaller(end * LayerNorm::kRows, a.rows);
  if (a.channels == 4 * kLanes) return norm_rows<T, 4>(a, first, last);
  if (a.channels == 8 * kLanes) return norm_rows<T, 8>(a, first, last);
  norm_rows<T, 0>(a, first, last);
}

template <class T>
void layer_norm_backward(const LayerNorm& a, int64_t begin, int64_t end, float*) {
  for (int64_t task = begin; task < end; ++task) {
    float* weight = a.parts + task * a.channels;
    std::memset(weight, 0, a.channels * sizeof(float));
    const int64_t first = task * LayerNorm::kRows, last = smaller(first + LayerNorm::kRows, a.rows);
    if (a.channels == 4 * kLanes) {
      norm_rows_backward<T, 4>(a, first, last, weight);
    } else if (a.channels == 8 * kLanes) {
      norm_rows_backward<T, 8>(a, first, last, weight);
    } else {
      norm_rows_backward<T, 0>(a, first, last, weight);
    }
  }
}

}  // namespace
}  // namespace gaitfast::denoiser
