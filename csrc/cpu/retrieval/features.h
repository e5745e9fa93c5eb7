// Features as they come in: (N, C, P), float32, float16 or bfloat16, contiguous.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <cstdint>

#include "simd.h"

namespace gaitfast::retrieval {

enum class Metric { cosine, euclidean };

inline Metric metric_of(c10::string_view name) {
  TORCH_CHECK(name == "cosine" || name == "euclidean", "metric: is cosine or euclidean, got ", name);
  return name == "cosine" ? Metric::cosine : Metric::euclidean;
}

struct Shape {
  int64_t rows, channels, parts;
  int64_t width() const { return channels * parts; }
};

inline Shape shape_of(const char* what, const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 3 && x.is_contiguous() && x.device().is_cpu(), what, ": must be contiguous (N, C, P) on the CPU");
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16, what,
              ": must be float32, float16 or bfloat16");
  TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0, what, ": holds no values");
  return {x.size(0), x.size(1), x.size(2)};
}

#define GAITFAST_DISPATCH_FEATURES(TYPE, NAME, ...)                       \
  AT_DISPATCH_SWITCH(TYPE, NAME,                                          \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)            \
                         AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__)         \
                             AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

GAITFAST_INLINE double widen(float x) { return x; }
GAITFAST_INLINE double widen(c10::BFloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.x) << 16); }
GAITFAST_INLINE double widen(c10::Half x) { return c10::detail::fp16_ieee_to_fp32_value(x.x); }

// A row is read in chunks of this many values, a multiple of P, so that value j of a chunk always belongs to part j % P
// and sums per part are sums per lane.
inline int64_t period_of(int64_t parts) {
  constexpr int64_t kAtLeast = 64;
  return parts >= kAtLeast ? parts : parts * ((kAtLeast + parts - 1) / parts);
}

}  // namespace gaitfast::retrieval
