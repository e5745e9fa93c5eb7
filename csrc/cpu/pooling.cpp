// What stands between the convolutions of a plain stack, on channels_last maps: maxima with LeakyReLU, and back.
//
// Forward a maximum leaves a byte that says which entry won, the first of equal ones; backward needs that byte and the
// result's sign, not the map that went in.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "retrieval/simd.h"

namespace gaitfast {
namespace {

using retrieval::Simd;
using retrieval::simd;

// bfloat16 without PyTorch's class, so that loops over it vectorise.
struct Short {
  uint16_t bits;
};

GAITFAST_INLINE float widen(float x) { return x; }
GAITFAST_INLINE float widen(Short x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
GAITFAST_INLINE void narrow(float x, float& out) { out = x; }
GAITFAST_INLINE void narrow(float x, Short& out) {  // to nearest even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
}

// Whether `next` takes the place of `best`: larger, or not a number.
GAITFAST_INLINE bool beats(float next, float best) { return next > best || next != next; }

// One row of 2 x 2 windows: rows a and b of (2 * windows, channels) -> out (windows, channels) and which entry won.
template <bool, class T>
GAITFAST_INLINE void pool_row_body(const T* a, const T* b, int64_t windows, int64_t channels, float slope, T* out,
                                   uint8_t* code) {
  for (int64_t w = 0; w < windows; ++w) {
    const T *p = a + 2 * w * channels, *q = b + 2 * w * channels;
    T* to = out + w * channels;
    uint8_t* which = code + w * channels;
    for (int64_t c = 0; c < channels; ++c) {
      float best = widen(p[c]);
      int32_t won = 0;
      const float second = widen(p[c + channels]), third = widen(q[c]), fourth = widen(q[c + channels]);
      won = beats(second, best) ? 1 : won;
      best = beats(second, best) ? second : best;
      won = beats(third, best) ? 2 : won;
      best = beats(third, best) ? third : best;
      won = beats(fourth, best) ? 3 : won;
      best = beats(fourth, best) ? fourth : best;
      narrow(best > 0 ? best : best * slope, to[c]);
      which[c] = static_cast<uint8_t>(won);
    }
  }
}
GAITFAST_MULTIVERSION(template <class T>, pool_row,
                      (Simd level, const T* a, const T* b, int64_t windows, int64_t channels, float slope, T* out,
                       uint8_t* code),
                      (a, b, windows, channels, slope, out, code))

// values where `which` is `one`, zero elsewhere.
GAITFAST_INLINE void spread_row(const float* values, const uint8_t* which, int64_t length, uint8_t one, float* out) {
  for (int64_t i = 0; i < length; ++i) out[i] = which[i] == one ? values[i] : 0.0f;
}
GAITFAST_INLINE void spread_row(const Short* values, const uint8_t* which, int64_t length, uint8_t one, Short* out) {
  for (int64_t i = 0; i < length; ++i) {
    const uint16_t all = which[i] == one ? 0xffff : 0;
    out[i].bits = values[i].bits & all;
  }
}

// The gradient of a row of windows, to the entries that won; zero to the others.
template <bool, class T>
GAITFAST_INLINE void unpool_row_body(const T* gradient, const T* out, const uint8_t* code, int64_t windows,
                                     int64_t channels, float slope, T* a, T* b) {
  constexpr int64_t kTile = 64;
  for (int64_t w = 0; w < windows; ++w) {
    for (int64_t c = 0; c < channels; c += kTile) {
      const int64_t from = w * channels + c, length = std::min(kTile, channels - c);
      T back[kTile];  // one loop for the arithmetic, one for each entry: so all of them vectorise
      for (int64_t i = 0; i < length; ++i) {
        const float g = widen(gradient[from + i]);
        narrow(widen(out[from + i]) > 0 ? g : g * slope, back[i]);
      }
      T *p = a + 2 * w * channels + c, *q = b + 2 * w * channels + c;
      spread_row(back, code + from, length, uint8_t{0}, p);
      spread_row(back, code + from, length, uint8_t{1}, p + channels);
      spread_row(back, code + from, length, uint8_t{2}, q);
      spread_row(back, code + from, length, uint8_t{3}, q + channels);
    }
  }
}
GAITFAST_MULTIVERSION(template <class T>, unpool_row,
                      (Simd level, const T* gradient, const T* out, const uint8_t* code, int64_t windows,
                       int64_t channels, float slope, T* a, T* b),
                      (gradient, out, code, windows, channels, slope, a, b))

template <bool, class T>
GAITFAST_INLINE void leak_body(T* gradient, const T* out, int64_t count, float slope) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = widen(gradient[i]);
    narrow(widen(out[i]) > 0 ? g : g * slope, gradient[i]);
  }
}
GAITFAST_MULTIVERSION(template <class T>, leak, (Simd level, T* gradient, const T* out, int64_t count, float slope),
                      (gradient, out, count, slope))

// The maximum over frames of one piece of a map: x (frames, stride) -> out, which (length).
template <bool, class T>
GAITFAST_INLINE void top_frame_body(const T* x, int64_t frames, int64_t stride, int64_t length, T* out,
                                    uint8_t* which) {
  std::memcpy(out, x, length * sizeof(T));
  std::memset(which, 0, length);
  for (int64_t t = 1; t < frames; ++t) {
    const T* frame = x + t * stride;
    for (int64_t i = 0; i < length; ++i) {
      const bool won = beats(widen(frame[i]), widen(out[i]));
      out[i] = won ? frame[i] : out[i];
      which[i] = won ? static_cast<uint8_t>(t) : which[i];
    }
  }
}
GAITFAST_MULTIVERSION(template <class T>, top_frame,
                      (Simd level, const T* x, int64_t frames, int64_t stride, int64_t length, T* out, uint8_t* which),
                      (x, frames, stride, length, out, which))

template <bool, class T>
GAITFAST_INLINE void spread_frame_body(const T* gradient, const uint8_t* which, int64_t length, int64_t frame, T* out) {
  spread_row(gradient, which, length, static_cast<uint8_t>(frame), out);
}
GAITFAST_MULTIVERSION(template <class T>, spread_frame,
                      (Simd level, const T* gradient, const uint8_t* which, int64_t length, int64_t frame, T* out),
                      (gradient, which, length, frame, out))

void check_map(const char* op, const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast), op,
              ": maps are (F, C, H, W), channels_last");
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, op, ": maps are float32 or bfloat16");
}

void check_alike(const char* op, const at::Tensor& x, const at::Tensor& like) {
  check_map(op, x);
  check_map(op, like);
  TORCH_CHECK(x.sizes() == like.sizes() && x.scalar_type() == like.scalar_type(), op, ": gradient and result differ");
}

// f(pointer type) for the element type of `x`.
template <class F>
void typed(const at::Tensor& x, const F& f) {
  if (x.scalar_type() == at::kFloat) f(float{});
  else f(Short{});
}

template <class T>
T* data(const at::Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

std::tuple<at::Tensor, at::Tensor> pool_leaky(const at::Tensor& x, double slope) {
  check_map("pool_leaky", x);
  const int64_t frames = x.size(0), channels = x.size(1), height = x.size(2) / 2, width = x.size(3) / 2;
  const auto format = at::MemoryFormat::ChannelsLast;
  auto out = at::empty({frames, channels, height, width}, x.options().memory_format(format));
  auto code = at::empty({frames, channels, height, width}, x.options().dtype(at::kByte).memory_format(format));
  const Simd level = simd();
  const int64_t from = x.size(3) * channels, to = width * channels, rows = x.size(2);
  typed(x, [&](auto type) {
    using T = decltype(type);
    at::parallel_for(0, frames * height, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* a = data<T>(x) + (i / height * rows + 2 * (i % height)) * from;
        pool_row<T>(level, a, a + from, width, channels, static_cast<float>(slope), data<T>(out) + i * to,
                    code.data_ptr<uint8_t>() + i * to);
      }
    });
  });
  return {out, code};
}

at::Tensor pool_leaky_backward(const at::Tensor& gradient, const at::Tensor& out, const at::Tensor& code,
                               int64_t height, int64_t width, double slope) {
  check_alike("pool_leaky_backward", gradient, out);
  TORCH_CHECK(code.scalar_type() == at::kByte && code.sizes() == out.sizes() &&
                  code.is_contiguous(at::MemoryFormat::ChannelsLast),
              "pool_leaky_backward: code must be uint8, as pool_leaky returned it");
  TORCH_CHECK(height / 2 == out.size(2) && width / 2 == out.size(3), "pool_leaky_backward: not the map's size");
  const int64_t frames = out.size(0), channels = out.size(1), rows = out.size(2), windows = out.size(3);
  const auto format = at::MemoryFormat::ChannelsLast;
  auto result = at::empty({frames, channels, height, width}, out.options().memory_format(format));
  if (height % 2 || width % 2) result.zero_();  // a last row or column that no window holds
  const Simd level = simd();
  const int64_t from = windows * channels, to = width * channels;
  typed(out, [&](auto type) {
    using T = decltype(type);
    at::parallel_for(0, frames * rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* a = data<T>(result) + (i / rows * height + 2 * (i % rows)) * to;
        unpool_row<T>(level, data<T>(gradient) + i * from, data<T>(out) + i * from,
                      code.const_data_ptr<uint8_t>() + i * from, windows, channels, static_cast<float>(slope), a,
                      a + to);
      }
    });
  });
  return result;
}

void leaky_backward_(at::Tensor& gradient, const at::Tensor& out, double slope) {
  check_alike("leaky_backward_", gradient, out);
  const Simd level = simd();
  typed(out, [&](auto type) {
    using T = decltype(type);
    at::parallel_for(0, out.numel(), 4096, [&](int64_t begin, int64_t end) {
      leak<T>(level, data<T>(gradient) + begin, data<T>(out) + begin, end - begin, static_cast<float>(slope));
    });
  });
}

constexpr int64_t kColumns = 1024;  // entries of a map that one pass over the frames takes: they stay in the cache

std::tuple<at::Tensor, at::Tensor> frames_max(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), "frames_max: clips are (N, S, M), contiguous");
  TORCH_CHECK(x.size(1) >= 1 && x.size(1) <= 256, "frames_max: clips have 1 to 256 frames, got ", x.size(1));
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "frames_max: float32 or bfloat16");
  const int64_t clips = x.size(0), frames = x.size(1), length = x.size(2), pieces = (length + kColumns - 1) / kColumns;
  auto out = at::empty({clips, length}, x.options());
  auto which = at::empty({clips, length}, x.options().dtype(at::kByte));
  const Simd level = simd();
  typed(x, [&](auto type) {
    using T = decltype(type);
    at::parallel_for(0, clips * pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t clip = i / pieces, first = i % pieces * kColumns;
        top_frame<T>(level, data<T>(x) + clip * frames * length + first, frames, length,
                     std::min(kColumns, length - first), data<T>(out) + clip * length + first,
                     which.data_ptr<uint8_t>() + clip * length + first);
      }
    });
  });
  return {out, which};
}

at::Tensor frames_max_backward(const at::Tensor& gradient, const at::Tensor& which, int64_t frames) {
  TORCH_CHECK(gradient.dim() == 2 && gradient.is_contiguous() && which.is_contiguous() &&
                  gradient.sizes() == which.sizes() && which.scalar_type() == at::kByte,
              "frames_max_backward: gradient (N, M) and the uint8 (N, M) that frames_max returned");
  TORCH_CHECK(gradient.scalar_type() == at::kFloat || gradient.scalar_type() == at::kBFloat16,
              "frames_max_backward: float32 or bfloat16");
  const int64_t clips = gradient.size(0), length = gradient.size(1);
  auto result = at::empty({clips, frames, length}, gradient.options());
  const Simd level = simd();
  typed(gradient, [&](auto type) {
    using T = decltype(type);
    at::parallel_for(0, clips * frames, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t clip = i / frames;
        spread_frame<T>(level, data<T>(gradient) + clip * length, which.const_data_ptr<uint8_t>() + clip * length,
                        length, i % frames, data<T>(result) + i * length);
      }
    });
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(gaitfast, CPU, m) {
  m.impl("pool_leaky", pool_leaky);
  m.impl("pool_leaky_backward", pool_leaky_backward);
  m.impl("leaky_backward_", leaky_backward_);
  m.impl("frames_max", frames_max);
  m.impl("frames_max_backward", frames_max_backward);
}

}  // namespace gaitfast
