// A convolution between two small grids as one matrix: every site of one sees most of the other.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace gaitfast::convolution {
namespace {

template <class Weight>
void spread(
    const Weight* weight, at::BFloat16* out, int64_t width, int64_t channels, int64_t kernel, int64_t stride,
    int64_t padding, int64_t out_height, int64_t out_width, int64_t height, int64_t row_sites) {
  const int64_t taps = kernel * kernel, columns = height * row_sites * channels;
  at::parallel_for(0, width, 16, [&](int64_t begin, int64_t end) {
    std::vector<at::BFloat16> turned(taps * channels);
    for (int64_t m = begin; m < end; ++m) {
      const Weight* from = weight + m * channels * taps;
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t n = 0; n < channels; ++n) turned[tap * channels + n] = static_cast<at::BFloat16>(from[n * taps + tap]);
      }
      for (int64_t site = 0; site < out_height * out_width; ++site) {
        const int64_t top = site / out_width * stride - padding, left = site % out_width * stride - padding;
        at::BFloat16* row = out + (site * width + m) * columns;
        for (int64_t y = 0; y < height; ++y) {
          for (int64_t x = 0; x < row_sites; ++x, row += channels) {
            const int64_t dy = y - top, dx = x - left;
            if (dy >= 0 && dy < kernel && dx >= 0 && dx < kernel) {
              const auto* tap = turned.data() + (dy * kernel + dx) * channels;
              std::copy(tap, tap + channels, row);
            } else {
              std::fill(row, row + channels, at::BFloat16(0.f));
            }
          }
        }
      }
    }
  });
}

at::Tensor dense_weight(const at::Tensor& weight, int64_t height, int64_t width, int64_t stride, int64_t padding) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(2) == weight.size(3), "dense_weight: (M, N, kernel, kernel) wanted");
  TORCH_CHECK(weight.is_contiguous(), "dense_weight: a contiguous weight wanted");
  const int64_t kernel = weight.size(2);
  TORCH_CHECK(kernel > 0 && stride > 0 && padding >= 0, "dense_weight: kernel, stride or padding out of range");
  TORCH_CHECK(height + 2 * padding >= kernel && width + 2 * padding >= kernel, "dense_weight: the grid is too small");
  const int64_t out_height = (height + 2 * padding - kernel) / stride + 1;
  const int64_t out_width = (width + 2 * padding - kernel) / stride + 1;
  auto out = at::empty(
      {out_height * out_width * weight.size(0), height * width * weight.size(1)},
      weight.options().dtype(at::kBFloat16));
  const auto write = [&](const auto* from) {
    spread(
        from, out.mutable_data_ptr<at::BFloat16>(), weight.size(0), weight.size(1), kernel, stride, padding, out_height,
        out_width, height, width);
  };
  if (weight.scalar_type() == at::kFloat) {
    write(weight.const_data_ptr<float>());
  } else {
    TORCH_CHECK(weight.scalar_type() == at::kBFloat16, "dense_weight: float32 or bfloat16 wanted");
    write(weight.const_data_ptr<at::BFloat16>());
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gaitfast, CPU, m) { m.impl("dense_weight", &dense_weight); }

}  // namespace gaitfast::convolution
