// Sixteen float32 lanes at the level of instructions that the including file has chosen:
//
//   GAITFAST_LEVEL  0 any CPU, 1 AVX2 with FMA, 2 AVX-512, 3 AVX-512 with bfloat16 and AMX tiles
//
// Everything is in an anonymous namespace, so that no code for one level is ever linked into another.
#pragma once

#include <cstring>

#include "kernels.h"

#define GAITFAST_INLINE __attribute__((always_inline)) inline

namespace gaitfast::denoiser {
namespace {

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef float UnalignedFloats __attribute__((vector_size(64), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint32_t UnalignedWords __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(32), aligned(2)));

GAITFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

GAITFAST_INLINE Floats all(float value) { return value - Floats{}; }

GAITFAST_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if GAITFAST_LEVEL >= 2
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif GAITFAST_LEVEL == 1
  union Parts {
    Floats whole;
    __m256 half[2];
  } x{a}, y{b}, z{c};
  for (int i = 0; i < 2; ++i) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
  return z.whole;
#else
  return a * b + c;
#endif
}

// The larger one; x where it is not a number.
GAITFAST_INLINE Floats at_least(Floats x, Floats low) {
#if GAITFAST_LEVEL >= 2
  return (Floats)_mm512_max_ps((__m512)low, (__m512)x);
#else
  return x < low ? low : x;
#endif
}

GAITFAST_INLINE Floats at_most(Floats x, Floats high) {
#if GAITFAST_LEVEL >= 2
  return (Floats)_mm512_min_ps((__m512)high, (__m512)x);
#else
  return x > high ? high : x;
#endif
}

GAITFAST_INLINE Floats load(const float* x) { return *reinterpret_cast<const UnalignedFloats*>(x); }
GAITFAST_INLINE Words load_words(const void* x) { return *static_cast<const UnalignedWords*>(x); }
GAITFAST_INLINE void store_words(Words words, void* x) { *static_cast<UnalignedWords*>(x) = words; }
GAITFAST_INLINE void store(Floats values, float* x) { *reinterpret_cast<UnalignedFloats*>(x) = values; }

GAITFAST_INLINE Floats load(const BFloat16* x) {
  const Halves halves = *reinterpret_cast<const UnalignedHalves*>(x);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

// The upper half of each lane, rounded to nearest even; a NaN stays one.
GAITFAST_INLINE Words rounded(Floats values) {
  const Words bits = (Words)values;
  const Words even = bits + 0x7fff + ((bits >> 16) & 1);
  return values == values ? even : (Words{} + 0x7fc00000u);
}

GAITFAST_INLINE void store(Floats values, BFloat16* x) {
#if GAITFAST_LEVEL >= 3
  const Halves halves = (Halves)_mm512_cvtneps_pbh((__m512)values);
#else
  const Halves halves = __builtin_convertvector(rounded(values) >> 16, Halves);
#endif
  *reinterpret_cast<UnalignedHalves*>(x) = halves;
}

// The first `lanes` lanes; the others are zero, and nothing is read or written there.
template <class T>
GAITFAST_INLINE Floats load(const T* x, int64_t lanes) {
  if (lanes >= kLanes) return load(x);
  alignas(64) T all_lanes[kLanes] = {};
  std::memcpy(all_lanes, x, lanes * sizeof(T));
  return load(all_lanes);
}

template <class T>
GAITFAST_INLINE void store(Floats values, T* x, int64_t lanes) {
  if (lanes >= kLanes) return store(values, x);
  alignas(64) T all_lanes[kLanes];
  store(values, all_lanes);
  std::memcpy(x, all_lanes, lanes * sizeof(T));
}

GAITFAST_INLINE float total(Floats values) {
#if GAITFAST_LEVEL >= 2
  return _mm512_reduce_add_ps((__m512)values);
#else
  float eight[8], sum = 0;
  for (int i = 0; i < 8; ++i) eight[i] = values[i] + values[i + 8];
  for (int i = 0; i < 4; ++i) eight[i] += eight[i + 4];
  return sum + ((eight[0] + eight[2]) + (eight[1] + eight[3]));
#endif
}

GAITFAST_INLINE float largest(Floats values) {
#if GAITFAST_LEVEL >= 2
  return _mm512_reduce_max_ps((__m512)values);
#else
  float found = values[0];
  for (int i = 1; i < 16; ++i) found = values[i] > found ? values[i] : found;
  return found;
#endif
}

// 2^x for x in [-126, 126], to 1e-7 of itself where T is float and 1e-4 where it is bfloat16; below, as at the end of it.
template <class T>
GAITFAST_INLINE Floats exp2(Floats x) {
  x = at_least(x, all(-126.f));
#if GAITFAST_LEVEL >= 2
  const Floats whole = (Floats)_mm512_roundscale_ps((__m512)x, 8);
#else
  const Floats moved = x + 12582912.f;  // 1.5 * 2^23: the whole part stands in the lowest bits
  const Floats whole = moved - 12582912.f;
#endif
  const Floats f = x - whole;
  Floats p;
  // Minimax in relative error over [-1/2, 1/2].
  if constexpr (sizeof(T) == 4) {
    p = fma(f, all(0.0013276472f), all(0.0096755415f));
    p = fma(f, p, all(0.0555071328f));
    p = fma(f, p, all(0.240221197f));
    p = fma(f, p, all(0.693146967f));
    p = fma(f, p, all(1.00000007f));
  } else {
    p = fma(f, all(0.0551716688f), all(0.242611133f));
    p = fma(f, p, all(0.693260986f));
    p = fma(f, p, all(0.999928073f));
  }
#if GAITFAST_LEVEL >= 2
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  return (Floats)((Ints)p + (((Ints)moved - 0x4b400000) << 23));
#endif
}

// 1 / x for x that is neither zero nor infinite.
GAITFAST_INLINE Floats reciprocal(Floats x) {
#if GAITFAST_LEVEL >= 2
  const Floats rough = (Floats)_mm512_rcp14_ps((__m512)x);
  return fma(rough, fma(-x, rough, all(1.f)), rough);
#else
  return 1.f / x;
#endif
}

constexpr float kLog2e = 1.44269504f;

template <class T>
GAITFAST_INLINE Floats sigmoid(Floats x) {
  return reciprocal(1.f + exp2<T>(at_most(x * -kLog2e, all(126.f))));
}

// Rows whose sums are added up before they join the total, which keeps the rounding of long columns small.
constexpr int64_t kChunk = 32;

// Calls Part<N>::run(lanes, c, ...) for N vectors of channels at a time, from channel c on; `lanes` of the last are there.
template <template <int> class Part, class... Arguments>
GAITFAST_INLINE void for_vectors(int64_t width, Arguments&&... arguments) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= width; c += 4 * kLanes) Part<4>::run(kLanes, c, arguments...);
  for (; c + 2 * kLanes <= width; c += 2 * kLanes) Part<2>::run(kLanes, c, arguments...);
  for (; c < width; c += kLanes) Part<1>::run(smaller(kLanes, width - c), c, arguments...);
}

}  // namespace
}  // namespace gaitfast::denoiser
