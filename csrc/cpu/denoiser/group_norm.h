// GroupNorm, modulation and SiLU. A task's rows stay in the second-level cache between its passes: forward sums, squares
// and result, backward the gradient at the SiLU's argument and the result. So memory is crossed once.
#pragma once

#include "vectors.h"

namespace gaitfast::denoiser {
namespace {

// One task: channels [first, first + width) of a sample.
struct Columns {
  int64_t sample, first, width, offset;

  GAITFAST_INLINE Columns(const GroupNorm& a, int64_t task) {
    sample = task / a.blocks();
    first = task % a.blocks() * a.block();
    width = smaller(a.block(), a.channels - first);
    offset = sample * a.positions * a.channels + first;
  }
};

// In place: every channel gets the sum over its group, times `factor`.
GAITFAST_INLINE void join_groups(float* values, int64_t width, int64_t per_group, float factor) {
  for (int64_t group = 0; group < width; group += per_group) {
    float sum = 0;
    for (int64_t c = 0; c < per_group; ++c) sum += values[group + c];
    for (int64_t c = 0; c < per_group; ++c) values[group + c] = sum * factor;
  }
}

// Sums over the rows of x - mean, or of its square.
template <bool kSquares>
struct Sums {
  template <int N>
  struct Part {
    template <class T>
    static GAITFAST_INLINE void run(int64_t lanes, int64_t c, const T* x, const GroupNorm& a, const float* mean, float* out) {
      Floats sum[N] = {}, centre[N];
      for (int v = 0; v < N; ++v) centre[v] = load(mean + c + v * kLanes, lanes);
      for (int64_t row = 0; row < a.positions; row += kChunk) {
        const int64_t end = smaller(row + kChunk, a.positions);
        Floats even[N] = {}, odd[N] = {};
        int64_t r = row;
        const auto add = [&](Floats* to, int64_t at) __attribute__((always_inline)) {
          for (int v = 0; v < N; ++v) {
            const Floats value = load(x + at * a.channels + c + v * kLanes, lanes) - centre[v];
            to[v] = kSquares ? fma(value, value, to[v]) : to[v] + value;
          }
        };
        for (; r + 1 < end; r += 2) {
          add(even, r);
          add(odd, r + 1);
        }
        if (r < end) add(even, r);
        for (int v = 0; v < N; ++v) sum[v] += even[v] + odd[v];
      }
      for (int v = 0; v < N; ++v) store(sum[v], out + c + v * kLanes, lanes);
    }
  };
};

// What multiplies (x - mean) and what is added, before the SiLU.
struct Affine {
  alignas(64) float mean[kMostPerGroup], inverse[kMostPerGroup], gain[kMostPerGroup], offset[kMostPerGroup];

  // gain: of the normalised x, times `inverse` where x - mean is multiplied at once.
  GAITFAST_INLINE void modulate(const GroupNorm& a, const Columns& own) {
    for (int64_t c = 0; c < own.width; ++c) {
      const float factor = a.scale ? a.scale[own.sample * a.scale_stride + own.first + c] + 1.f : 1.f;
      const float shift = a.scale ? a.shift[own.sample * a.shift_stride + own.first + c] : 0.f;
      gain[c] = a.weight[own.first + c] * factor;
      offset[c] = a.bias[own.first + c] * factor + shift;
    }
  }
};

template <int N>
struct Apply {
  template <class T>
  static GAITFAST_INLINE void run(int64_t lanes, int64_t c, const T* x, T* y, const GroupNorm& a, const Affine& affine) {
    Floats mean[N], gain[N], offset[N];
    for (int v = 0; v < N; ++v) {
      mean[v] = load(affine.mean + c + v * kLanes, lanes);
      gain[v] = load(affine.gain + c + v * kLanes, lanes) * load(affine.inverse + c + v * kLanes, lanes);
      offset[v] = load(affine.offset + c + v * kLanes, lanes);
    }
    for (int64_t r = 0; r < a.positions; ++r) {
      for (int v = 0; v < N; ++v) {
        const int64_t at = r * a.channels + c + v * kLanes;
        const Floats z = fma(load(x + at, lanes) - mean[v], gain[v], offset[v]);
        store(z * sigmoid<T>(z), y + at, lanes);
      }
    }
  }
};

template <class T>
void group_norm(const GroupNorm& a, int64_t begin, int64_t end, float*) {
  const int64_t per_group = a.per_group(), groups = a.groups;
  const float part = 1.f / (static_cast<float>(per_group) * static_cast<float>(a.positions));
  Affine affine;
  for (int64_t task = begin; task < end; ++task) {
    const Columns own(a, task);
    const T* x = static_cast<const T*>(a.x) + own.offset;
    T* y = static_cast<T*>(a.out) + own.offset;
    std::memset(affine.mean, 0, sizeof affine.mean);
    // The mean of the sums, and then what rounding left of it.
    alignas(64) float sums[kMostPerGroup];
    for_vectors<Sums<false>::Part>(own.width, x, a, affine.mean, sums);
    join_groups(sums, own.width, per_group, part);
    std::memcpy(affine.mean, sums, own.width * sizeof(float));
    for_vectors<Sums<true>::Part>(own.width, x, a, affine.mean, affine.inverse);
    join_groups(affine.inverse, own.width, per_group, part);
    for (int64_t c = 0; c < own.width; ++c) affine.inverse[c] = 1.f / __builtin_sqrtf(affine.inverse[c] + a.eps);
    for (int64_t c = 0; c < own.width; c += per_group) {
      float* stats = a.stats + own.sample * 2 * groups + (own.first + c) / per_group;
      stats[0] = affine.mean[c];
      stats[groups] = affine.inverse[c];
    }
    affine.modulate(a, own);
    for_vectors<Apply>(own.width, x, y, a, affine);
  }
}

// The gradient at the SiLU's argument into `slopes` (rows of `stride`), its sum, and that of its product with x - mean.
template <int N>
struct Slopes {
  template <class T>
  static GAITFAST_INLINE void run(int64_t lanes, int64_t c, const T* x, const T* grad, float* slopes, int64_t stride,
                                  const GroupNorm& a, const Affine& affine, float* sums, float* products) {
    Floats mean[N], gain[N], offset[N], sum[N] = {}, product[N] = {};
    for (int v = 0; v < N; ++v) {
      mean[v] = load(affine.mean + c + v * kLanes, lanes);
      gain[v] = load(affine.gain + c + v * kLanes, lanes) * load(affine.inverse + c + v * kLanes, lanes);
      offset[v] = load(affine.offset + c + v * kLanes, lanes);
    }
    for (int64_t row = 0; row < a.positions; row += kChunk) {
      const int64_t end = smaller(row + kChunk, a.positions);
      Floats chunk_sum[N] = {}, chunk_product[N] = {};
      for (int64_t r = row; r < end; ++r) {
        for (int v = 0; v < N; ++v) {
          const int64_t at = r * a.channels + c + v * kLanes;
          const Floats centred = load(x + at, lanes) - mean[v];
          // Precise whatever T is: gradients of the parameters are sums in float32.
          const Floats z = fma(centred, gain[v], offset[v]), s = sigmoid<float>(z);
          const Floats slope = load(grad + at, lanes) * fma(z * s, 1.f - s, s);
          store(slope, slopes + r * stride + c + v * kLanes, lanes);
          chunk_sum[v] += slope;
          chunk_product[v] = fma(slope, centred, chunk_product[v]);
        }
      }
      for (int v = 0; v < N; ++v) {
        sum[v] += chunk_sum[v];
        product[v] += chunk_product[v];
      }
    }
    for (int v = 0; v < N; ++v) {
      store(sum[v], sums + c + v * kLanes, lanes);
      store(product[v], products + c + v * kLanes, lanes);
    }
  }
};

// slope * steep - level - (x - mean) * along
template <int N>
struct Gradient {
  template <class T>
  static GAITFAST_INLINE void run(int64_t lanes, int64_t c, const T* x, const float* slopes, int64_t stride, T* out,
                                  const GroupNorm& a, const Affine& affine, const float* level, const float* along) {
    Floats mean[N], steep[N], by[N], less[N];
    for (int v = 0; v < N; ++v) {
      mean[v] = load(affine.mean + c + v * kLanes, lanes);
      steep[v] = load(affine.gain + c + v * kLanes, lanes) * load(affine.inverse + c + v * kLanes, lanes);
      by[v] = -load(along + c + v * kLanes, lanes);
      less[v] = -load(level + c + v * kLanes, lanes);
    }
    for (int64_t r = 0; r < a.positions; ++r) {
      for (int v = 0; v < N; ++v) {
        const int64_t at = r * a.channels + c + v * kLanes;
        const Floats rest = fma(load(x + at, lanes) - mean[v], by[v], less[v]);
        store(fma(load(slopes + r * stride + c + v * kLanes, lanes), steep[v], rest), out + at, lanes);
      }
    }
  }
};

template <class T>
void group_norm_backward(const GroupNorm& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t per_group = a.per_group(), groups = a.groups, plane = a.batch * a.channels;
  const float part = 1.f / (static_cast<float>(per_group) * static_cast<float>(a.positions));
  Affine affine;
  for (int64_t task = begin; task < end; ++task) {
    const Columns own(a, task);
    const T* x = static_cast<const T*>(a.x) + own.offset;
    const T* grad = static_cast<const T*>(a.grad) + own.offset;
    T* out = static_cast<T*>(a.out) + own.offset;
    float* slopes = scratch;
    int64_t stride = own.width;
    if constexpr (sizeof(T) == sizeof(float)) slopes = out, stride = a.channels;
    for (int64_t c = 0; c < own.width; ++c) {
      const float* stats = a.stats + own.sample * 2 * groups + (own.first + c) / per_group;
      affine.mean[c] = stats[0];
      affine.inverse[c] = stats[groups];
    }
    affine.modulate(a, own);
    alignas(64) float level[kMostPerGroup], along[kMostPerGroup];
    for_vectors<Slopes>(own.width, x, grad, slopes, stride, a, affine, level, along);
    float* sums = a.sums + own.sample * a.channels + own.first;
    for (int64_t c = 0; c < own.width; ++c) {
      const float factor = a.scale ? a.scale[own.sample * a.scale_stride + own.first + c] + 1.f : 1.f;
      const float normalised = along[c] * affine.inverse[c];
      sums[c] = normalised * factor;
      sums[plane + c] = level[c] * factor;
      if (a.scale) {
        sums[2 * plane + c] = normalised * a.weight[own.first + c] + level[c] * a.bias[own.first + c];
        sums[3 * plane + c] = level[c];
      }
      const float steep = affine.gain[c] * affine.inverse[c];
      level[c] *= steep;
      along[c] = normalised * steep;
    }
    join_groups(level, own.width, per_group, part);
    join_groups(along, own.width, per_group, part);
    for (int64_t c = 0; c < own.width; ++c) along[c] *= affine.inverse[c];
    for_vectors<Gradient>(own.width, x, slopes, stride, out, a, affine, level, along);
  }
}

}  // namespace
}  // namespace gaitfast::denoiser
