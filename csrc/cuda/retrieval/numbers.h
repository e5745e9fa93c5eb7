// Numbers as retrieval reads and computes them, for the device and, compiled by a C++ compiler alone, for the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define GAITFAST_BOTH __host__ __device__ __forceinline__
#else
#define GAITFAST_BOTH inline
#endif

namespace gaitfast::retrieval_cuda {

// --- features --------------------------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

GAITFAST_BOTH float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

GAITFAST_BOTH double widen(float x) { return x; }
GAITFAST_BOTH double widen(BFloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }
GAITFAST_BOTH double widen(Half x) {
  const uint32_t size = x.bits & 0x7fffu, sign = (x.bits & 0x8000u) << 16;
  const uint32_t exponent = size >= 0x7c00u ? 0x7f800000u : 0u;  // infinite, or no number: all ones here as well
  const double value = float_of_bits(size << 13 | sign | exponent);
  return exponent ? value : value * 0x1p112;  // exponents are off by 127 - 15, also those of denormals
}

// --- twice float64's precision ---------------------------------------------------------------------------------------
// Sums of two floats (high, low), every operation error free or good to about 2^-104, in the order of
// gaitfast/retrieval/_exact.py and csrc/cpu/retrieval/distance.cpp: the results are theirs, bit for bit.
// Source: Dekker, "A floating-point technique for extending the available precision", 1971.

struct Double {
  double high, low;
};

// A product that no compiler fuses with the sum after it.
GAITFAST_BOTH double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;  // the host is compiled with -ffp-contract=off
#endif
}

GAITFAST_BOTH Double two_sum(double a, double b) {
  const double total = a + b, part = total - a;
  return {total, (a - (total - part)) + (b - part)};
}

GAITFAST_BOTH Double two_product(double a, double b) {
  const double rounded = product(a, b);
  return {rounded, fma(a, b, -rounded)};
}

GAITFAST_BOTH Double add(Double a, Double b) {
  const Double sum = two_sum(a.high, b.high);
  return two_sum(sum.high, sum.low + (a.low + b.low));
}

GAITFAST_BOTH Double multiply(Double a, Double b) {
  const Double whole = two_product(a.high, b.high);
  return two_sum(whole.high, whole.low + (product(a.high, b.low) + product(a.low, b.high)));
}

GAITFAST_BOTH Double divide(Double a, Double b) {
  const double quotient = a.high / b.high;
  const Double back = multiply({quotient, 0.0}, b);
  const Double rest = add(a, {-back.high, -back.low});
  return two_sum(quotient, rest.high / b.high);
}

GAITFAST_BOTH Double square_root(Double a) {
  const double root = sqrt(a.high);
  if (!(root > 0.0)) return {root, 0.0};
  const Double square = two_product(root, root);
  const Double rest = add(a, {-square.high, -square.low});
  return two_sum(root, rest.high / (2.0 * root));
}

// Sums by halves: of `lengths[0]` numbers the i-th and the (half + i)-th are added, an odd last one goes up alone; that
// gives `lengths[1]` numbers, and so on. This is number i of level `kLevel`; leaf(i): number i of level 0.
template <int kLevel, class Leaf>
GAITFAST_BOTH Double sum_by_halves(const int64_t* lengths, int64_t i, const Leaf& leaf) {
  if constexpr (kLevel == 0) {
    return leaf(i);
  } else {
    const int64_t length = lengths[kLevel - 1], half = length / 2;
    const bool alone = i == half;  // only where the length is odd
    const Double first = sum_by_halves<kLevel - 1>(lengths, alone ? length - 1 : i, leaf);
    if (alone) return first;
    return add(first, sum_by_halves<kLevel - 1>(lengths, half + i, leaf));
  }
}

// --- distances and scores --------------------------------------------------------------------------------------------

// A score is larger where the distance is smaller: 1 - distance for the cosine, -distance * scale otherwise.
struct Measure {
  bool cosine;
  double scale;
  double absolute, relative;  // of the tolerance

  // Tolerances: those of csrc/cpu/retrieval/distance.h, for any order of summation.
  Measure(bool cosine, double scale, int64_t channels, int64_t parts)
      : cosine(cosine),
        scale(scale),
        absolute(cosine ? 0x1p-52 * static_cast<double>(channels * parts + channels + 16) : 0.0),
        relative(cosine ? 0.0 : 0x1p-52 * static_cast<double>(channels + parts + 8)) {}

  // How far a float64 distance may be from the true one.
  GAITFAST_BOTH double tolerance(double distance) const { return absolute + relative * distance; }

  GAITFAST_BOTH double score(double distance) const { return cosine ? 1.0 - distance : -distance * scale; }
  GAITFAST_BOTH float score_below(double distance) const {
    const double exact = score(distance);
    return nextafterf(static_cast<float>(exact - 1e-15 - 1e-15 * fabs(exact)), -INFINITY);
  }
  GAITFAST_BOTH float score_above(double distance) const {
    const double exact = score(distance);
    return nextafterf(static_cast<float>(exact + 1e-15 + 1e-15 * fabs(exact)), INFINITY);
  }
};

// --- counting together -----------------------------------------------------------------------------------------------

GAITFAST_BOTH int32_t fetch_add(int32_t* counter, int32_t value) {
#ifdef __CUDA_ARCH__
  return atomicAdd(counter, value);
#else
  const int32_t before = *counter;
  *counter += value;
  return before;
#endif
}

GAITFAST_BOTH void add_to(int64_t* counter, int64_t value) {
#ifdef __CUDA_ARCH__
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(value));
#else
  *counter += value;
#endif
}

}  // namespace gaitfast::retrieval_cuda
