// Softmax attention among the rows of a sequence: the frames of a site, with rotation and bias, or the sites of a frame.
//
// Weights stand transposed, a key's row over the queries' lanes, so that the softmax is a walk down rows without exchange
// between lanes. Nothing of them leaves the first-level cache; the backward pass computes them again.
#pragma once

#include "products.h"

namespace gaitfast::denoiser {
namespace {

template <class E>
struct Sequence {
  using Cell = typename E::Cell;
  static constexpr int64_t kRowCells = kMostRows * E::kCells, kSquare = kMostRows * kMostRows;

  alignas(64) Cell query[kRowCells], key[kRowCells], value[kRowCells], outer[kRowCells];
  alignas(64) Cell right[kRowCells];
  alignas(64) Cell left[kSquare];
  alignas(64) float weights[kSquare], slopes[kSquare], result[kMostRows * kFeatures];
  alignas(64) float factor[kMostRows], along[kMostRows];

  GAITFAST_INLINE void clear() {
    std::memset(query, 0, sizeof query);
    std::memset(key, 0, sizeof key);
    std::memset(value, 0, sizeof value);
    std::memset(outer, 0, sizeof outer);
  }
};

// A sequence's place: rows in qkv and in the result.
struct Place {
  int64_t wide, narrow, wide_step, narrow_step, width;

  GAITFAST_INLINE Place(const Attention& a, int64_t sample, int64_t index) {
    width = a.heads * kFeatures;
    narrow = (sample * a.outer + index * a.inner) * width;
    narrow_step = a.step * width;
    wide = 3 * narrow;
    wide_step = 3 * narrow_step;
  }
};

// Asks for the rows of the next head, while this one is computed: they lie far apart, in lines of their own.
template <class T>
GAITFAST_INLINE void ask_for(const void* x, int64_t from, int64_t rows, int64_t step) {
  const T* row = static_cast<const T*>(x) + from;
  for (int64_t t = 0; t < rows; ++t, row += step) {
    __builtin_prefetch(row, 0, 2);
    if constexpr (sizeof(T) == sizeof(float)) __builtin_prefetch(row + kLanes, 0, 2);
  }
}

// The same for all that a head reads and writes: `wide` and `narrow`, tensors of that width.
template <class T>
GAITFAST_INLINE void ask_for_next(const Attention& a, const Place& place, int64_t sample, int64_t index, int64_t head,
                                  const void* wide, const void* narrow) {
  const bool same = head + 1 < a.heads;
  if (!same && index + 1 >= a.count) return;
  const Place next = same ? place : Place(a, sample, index + 1);
  const int64_t offset = same ? (head + 1) * kFeatures : 0;
  for (int part = 0; part < 3; ++part) {
    ask_for<T>(wide, next.wide + part * next.width + offset, a.rows, next.wide_step);
  }
  ask_for<T>(narrow, next.narrow + offset, a.rows, next.narrow_step);
}

template <class T, class E>
GAITFAST_INLINE void read_head(const Attention& a, const Place& place, int64_t head, Sequence<E>& s) {
  const T* x = static_cast<const T*>(a.qkv) + place.wide + head * kFeatures;
  for (int64_t t = 0; t < a.rows; ++t, x += place.wide_step) {
    if (a.rotation) {
      const Floats cosine = load(a.rotation + t * kFeatures), sine = load(a.rotation + t * kFeatures + kLanes);
      E::put(turned(load_row(x), cosine, sine), s.query, t);
      E::put(turned(load_row(x + place.width), cosine, sine), s.key, t);
    } else {
      E::put(x, s.query, t);
      E::put(x + place.width, s.key, t);
    }
    E::put(x + 2 * place.width, s.value, t);
  }
}

// Scores become exp(score - the query's largest), rows beyond the last key zero; `factor`: 1 / their sum per query.
template <class T, class E>
GAITFAST_INLINE void exponents(const Attention& a, int64_t head, Sequence<E>& s) {
  const int64_t n = a.rows, padded = a.padded();
  const Floats scale = all(kLog2e / __builtin_sqrtf(static_cast<float>(kFeatures)));
  const float* bias = a.bias ? a.bias + head * n * padded : nullptr;
  for (int64_t lane = 0; lane < padded; lane += 2 * kLanes) {
    float* column = s.weights + lane;
    Floats most0 = all(-__builtin_inff()), most1 = most0;
    for (int64_t t = 0; t < n; ++t) {
      Floats x0 = load(column + t * padded), x1 = load(column + t * padded + kLanes);
      if (bias) {
        x0 = fma(x0, scale, load(bias + t * padded + lane));
        x1 = fma(x1, scale, load(bias + t * padded + lane + kLanes));
      } else {
        x0 *= scale;
        x1 *= scale;
      }
      store(x0, column + t * padded);
      store(x1, column + t * padded + kLanes);
      most0 = at_least(x0, most0);
      most1 = at_least(x1, most1);
    }
    Floats sum0 = {}, sum1 = {};
    for (int64_t t = 0; t < n; ++t) {
      const Floats e0 = exp2<T>(load(column + t * padded) - most0);
      const Floats e1 = exp2<T>(load(column + t * padded + kLanes) - most1);
      store(e0, column + t * padded);
      store(e1, column + t * padded + kLanes);
      sum0 += e0;
      sum1 += e1;
    }
    for (int64_t t = n; t < padded; ++t) {
      store(Floats{}, column + t * padded);
      store(Floats{}, column + t * padded + kLanes);
    }
    store(reciprocal(sum0), s.factor + lane);
    store(reciprocal(sum1), s.factor + lane + kLanes);
  }
}

template <class T>
void attention(const Attention& a, int64_t begin, int64_t end, float*) {
  using E = typename ProductsOf<T>::Type;
  Sequence<E> s;
  s.clear();
  E::start();
  const int64_t n = a.rows, padded = a.padded();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sample = task / a.tasks_of_sample(), first = task % a.tasks_of_sample() * a.sequences;
    for (int64_t index = first; index < smaller(first + a.sequences, a.count); ++index) {
      const Place place(a, sample, index);
      for (int64_t head = 0; head < a.heads; ++head) {
        read_head<T>(a, place, head, s);
        ask_for_next<T>(a, place, sample, index, head, a.qkv, a.out);
        E::product(E::rows(s.key), E::columns(s.query, padded, s.right), s.weights, padded, padded, kFeatures);
        exponents<T>(a, head, s);
        E::product(E::square_transposed(s.weights, padded, s.left), E::stack(s.value, padded, s.right), s.result, padded,
                   kFeatures, padded);
        T* out = static_cast<T*>(a.out) + place.narrow + head * kFeatures;
        for (int64_t t = 0; t < n; ++t) {
          const float* row = s.result + t * kFeatures;
          store_row(Row{load(row), load(row + kLanes)} * all(s.factor[t]), out + t * place.narrow_step);
        }
      }
    }
  }
  E::stop();
}

template <class T>
GAITFAST_INLINE void store_turned_back(const Attention& a, const float* result, Floats scale, T* out, int64_t step) {
  for (int64_t t = 0; t < a.rows; ++t, out += step) {
    const Row row = Row{load(result + t * kFeatures), load(result + t * kFeatures + kLanes)} * scale;
    if (a.rotation) {
      const Floats cosine = load(a.rotation + t * kFeatures), sine = load(a.rotation + t * kFeatures + kLanes);
      store_row(turned(row, cosine, -sine), out);
    } else {
      store_row(row, out);
    }
  }
}

// weights *= factor; slopes = weights * (slopes - the query's sum of weights * slopes), which is added to `bias` if there.
template <class E>
GAITFAST_INLINE void softmax_slopes(const Attention& a, float* bias, Sequence<E>& s) {
  const int64_t n = a.rows, padded = a.padded();
  for (int64_t lane = 0; lane < padded; lane += 2 * kLanes) {
    const Floats factor0 = load(s.factor + lane), factor1 = load(s.factor + lane + kLanes);
    Floats along0 = {}, along1 = {};
    for (int64_t t = 0; t < n; ++t) {
      const int64_t at = t * padded + lane;
      const Floats w0 = load(s.weights + at) * factor0, w1 = load(s.weights + at + kLanes) * factor1;
      store(w0, s.weights + at);
      store(w1, s.weights + at + kLanes);
      along0 = fma(w0, load(s.slopes + at), along0);
      along1 = fma(w1, load(s.slopes + at + kLanes), along1);
    }
    for (int64_t t = 0; t < n; ++t) {
      const int64_t at = t * padded + lane;
      const Floats d0 = load(s.weights + at) * (load(s.slopes + at) - along0);
      const Floats d1 = load(s.weights + at + kLanes) * (load(s.slopes + at + kLanes) - along1);
      store(d0, s.slopes + at);
      store(d1, s.slopes + at + kLanes);
      if (bias) {
        store(load(bias + at) + d0, bias + at);
        store(load(bias + at + kLanes) + d1, bias + at + kLanes);
      }
    }
    for (int64_t t = n; t < padded; ++t) {
      store(Floats{}, s.slopes + t * padded + lane);
      store(Floats{}, s.slopes + t * padded + lane + kLanes);
    }
  }
}

template <class T>
void attention_backward(const Attention& a, int64_t begin, int64_t end, float*) {
  using E = typename ProductsOf<T>::Type;
  Sequence<E> s;
  s.clear();
  E::start();
  const int64_t n = a.rows, padded = a.padded(), square = n * padded;
  const Floats scale = all(1.f / __builtin_sqrtf(static_cast<float>(kFeatures)));
  for (int64_t task = begin; task < end; ++task) {
    float* parts = a.bias_parts ? a.bias_parts + task * a.heads * square : nullptr;
    if (parts) std::memset(parts, 0, a.heads * square * sizeof(float));
    const int64_t sample = task / a.tasks_of_sample(), first = task % a.tasks_of_sample() * a.sequences;
    for (int64_t index = first; index < smaller(first + a.sequences, a.count); ++index) {
      const Place place(a, sample, index);
      for (int64_t head = 0; head < a.heads; ++head) {
        read_head<T>(a, place, head, s);
        const T* grad = static_cast<const T*>(a.grad) + place.narrow + head * kFeatures;
        for (int64_t t = 0; t < n; ++t) E::put(grad + t * place.narrow_step, s.outer, t);
        ask_for_next<T>(a, place, sample, index, head, a.qkv, a.grad);
        E::product(E::rows(s.key), E::columns(s.query, padded, s.right), s.weights, padded, padded, kFeatures);
        E::product(E::rows(s.value), E::columns(s.outer, padded, s.right), s.slopes, padded, padded, kFeatures);
        exponents<T>(a, head, s);
        softmax_slopes(a, parts ? parts + head * square : nullptr, s);
        T* out = static_cast<T*>(a.out) + place.wide + head * kFeatures;
        E::product(E::square(s.weights, padded, s.left), E::stack(s.outer, padded, s.right), s.result, padded, kFeatures,
                   padded);
        for (int64_t t = 0; t < n; ++t) {
          const float* row = s.result + t * kFeatures;
          store_row(Row{load(row), load(row + kLanes)}, out + 2 * place.width + t * place.wide_step);
        }
        E::product(E::square(s.slopes, padded, s.left), E::stack(s.query, padded, s.right), s.result, padded, kFeatures,
                   padded);
        store_turned_back(a, s.result, scale, out + place.width, place.wide_step);
        E::product(E::square_transposed(s.slopes, padded, s.left), E::stack(s.key, padded, s.right), s.result, padded,
                   kFeatures, padded);
        store_turned_back(a, s.result, scale, out, place.wide_step);
      }
    }
  }
  E::stop();
}

}  // namespace
}  // namespace gaitfast::denoiser
