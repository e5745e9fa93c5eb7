// Linear attention over the sites of a frame: softmax_features(q) D^-1/2 (softmax_sites(k)^T v).
#pragma once

#include "attention.h"

namespace gaitfast::denoiser {
namespace {

template <class E>
struct LinearScratch {
  Sequence<E> s;
  alignas(64) float context[kFeatures * kFeatures], context_grad[kFeatures * kFeatures];
  alignas(64) typename E::Cell matrix[kFeatures * kFeatures], rows[kFeatures * kFeatures];
};

// Queries with a softmax over features, keys with one over rows, values.
template <class T, class E>
GAITFAST_INLINE void read_linear_head(const Attention& a, const Place& place, int64_t head, Sequence<E>& s) {
  const int64_t step = place.wide_step;
  const T* query = static_cast<const T*>(a.qkv) + place.wide + head * kFeatures;
  const T *key = query + place.width, *value = key + place.width;
  const Floats log2e = all(kLog2e);
  Row most{all(-__builtin_inff()), all(-__builtin_inff())};
  for (int64_t t = 0; t < a.rows; ++t) {
    const Row row = load_row(key + t * step);
    most = {at_least(row.even, most.even), at_least(row.odd, most.odd)};
  }
  float* exponent = s.result;
  Row sum{};
  for (int64_t t = 0; t < a.rows; ++t) {
    const Row row = load_row(key + t * step);
    const Floats even = exp2<T>((row.even - most.even) * log2e), odd = exp2<T>((row.odd - most.odd) * log2e);
    sum = {sum.even + even, sum.odd + odd};
    store(even, exponent + t * kFeatures);
    store(odd, exponent + t * kFeatures + kLanes);
  }
  const Floats even = reciprocal(sum.even), odd = reciprocal(sum.odd);
  for (int64_t t = 0; t < a.rows; ++t) {
    const float* row = exponent + t * kFeatures;
    E::put(Row{load(row) * even, load(row + kLanes) * odd}, s.key, t);
    E::put(value + t * step, s.value, t);
    const Row q = load_row(query + t * step);
    const Floats high = all(largest(at_least(q.even, q.odd)));
    const Row e{exp2<T>((q.even - high) * log2e), exp2<T>((q.odd - high) * log2e)};
    E::put(e * all(1.f / total(e.even + e.odd)), s.query, t);
  }
}

template <class T>
void linear_attention(const Attention& a, int64_t begin, int64_t end, float*) {
  using E = typename ProductsOf<T>::Type;
  LinearScratch<E> scratch;
  Sequence<E>& s = scratch.s;
  s.clear();
  E::start();
  const int64_t n = a.rows, padded = a.padded();
  const Floats scale = all(1.f / __builtin_sqrtf(static_cast<float>(kFeatures)));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sample = task / a.tasks_of_sample(), first = task % a.tasks_of_sample() * a.sequences;
    for (int64_t index = first; index < smaller(first + a.sequences, a.count); ++index) {
      const Place place(a, sample, index);
      for (int64_t head = 0; head < a.heads; ++head) {
        read_linear_head<T>(a, place, head, s);
        ask_for_next<T>(a, place, sample, index, head, a.qkv, a.out);
        E::product(E::flank(s.key, padded, s.left), E::stack(s.value, padded, s.right), scratch.context, kFeatures,
                   kFeatures, padded);
        E::product(E::rows(s.query), E::matrix(scratch.context, scratch.matrix), s.result, padded, kFeatures, kFeatures);
        T* out = static_cast<T*>(a.out) + place.narrow + head * kFeatures;
        for (int64_t t = 0; t < n; ++t) {
          const float* row = s.result + t * kFeatures;
          store_row(Row{load(row), load(row + kLanes)} * scale, out + t * place.narrow_step);
        }
      }
    }
  }
  E::stop();
}

// The transpose of a float32 matrix (32, 32) as right operand of a sum over features.
template <class E>
GAITFAST_INLINE typename E::Right transposed_matrix(LinearScratch<E>& scratch, const float* x) {
  for (int64_t i = 0; i < kFeatures; ++i) {
    E::put(Row{load(x + i * kFeatures), load(x + i * kFeatures + kLanes)}, scratch.rows, i);
  }
  return E::columns(scratch.rows, kFeatures, scratch.matrix);
}

template <class T>
void linear_attention_backward(const Attention& a, int64_t begin, int64_t end, float*) {
  using E = typename ProductsOf<T>::Type;
  LinearScratch<E> scratch;
  Sequence<E>& s = scratch.s;
  s.clear();
  E::start();
  const int64_t n = a.rows, padded = a.padded();
  const Floats scale = all(1.f / __builtin_sqrtf(static_cast<float>(kFeatures)));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sample = task / a.tasks_of_sample(), first = task % a.tasks_of_sample() * a.sequences;
    for (int64_t index = first; index < smaller(first + a.sequences, a.count); ++index) {
      const Place place(a, sample, index);
      for (int64_t head = 0; head < a.heads; ++head) {
        read_linear_head<T>(a, place, head, s);
        const T* grad = static_cast<const T*>(a.grad) + place.narrow + head * kFeatures;
        T* out = static_cast<T*>(a.out) + place.wide + head * kFeatures;
        for (int64_t t = 0; t < n; ++t) E::put(grad + t * place.narrow_step, s.outer, t);
        ask_for_next<T>(a, place, sample, index, head, a.qkv, a.grad);
        E::product(E::flank(s.key, padded, s.left), E::stack(s.value, padded, s.right), scratch.context, kFeatures,
                   kFeatures, padded);
        E::product(E::flank(s.query, padded, s.left), E::stack(s.outer, padded, s.right), scratch.context_grad, kFeatures,
                   kFeatures, padded);
        // Queries: q (slope - its product with q), slope = grad context^T.
        E::product(E::rows(s.outer), transposed_matrix(scratch, scratch.context), s.result, padded, kFeatures, kFeatures);
        for (int64_t t = 0; t < n; ++t) {
          const Row q = E::get(s.query, t), slope{load(s.result + t * kFeatures), load(s.result + t * kFeatures + kLanes)};
          const Floats along = all(total(fma(q.even, slope.even, q.odd * slope.odd)));
          store_row(Row{q.even * (slope.even - along), q.odd * (slope.odd - along)} * scale, out + t * place.wide_step);
        }
        // Keys: the same down the rows, slope = v context_grad^T.
        E::product(E::rows(s.value), transposed_matrix(scratch, scratch.context_grad), s.result, padded, kFeatures,
                   kFeatures);
        Row along{};
        for (int64_t t = 0; t < n; ++t) {
          const Row k = E::get(s.key, t);
          along = {fma(k.even, load(s.result + t * kFeatures), along.even),
                   fma(k.odd, load(s.result + t * kFeatures + kLanes), along.odd)};
        }
        for (int64_t t = 0; t < n; ++t) {
          const Row k = E::get(s.key, t), slope{load(s.result + t * kFeatures), load(s.result + t * kFeatures + kLanes)};
          store_row(Row{k.even * (slope.even - along.even), k.odd * (slope.odd - along.odd)} * scale,
                    out + place.width + t * place.wide_step);
        }
        // Values: keys times the context's gradient.
        E::product(E::rows(s.key), E::matrix(scratch.context_grad, scratch.matrix), s.result, padded, kFeatures,
                   kFeatures);
        for (int64_t t = 0; t < n; ++t) {
          const float* row = s.result + t * kFeatures;
          store_row(Row{load(row), load(row + kLanes)} * scale, out + 2 * place.width + t * place.wide_step);
        }
      }
    }
  }
  E::stop();
}

}  // namespace
}  // namespace gaitfast::denoiser
