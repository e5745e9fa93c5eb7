// Batch norm of maps over all frames, with a shortcut and ReLU, forward and backward. Statistics and the sums of
// gradients are those of parts in float32, put together in float64; nothing is kept but what came in, and the result
// where there was a shortcut.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "denoiser/kernels.h"

namespace gaitfast {
namespace {

using at::Tensor;
using denoiser::Ending;
using denoiser::FrameNorm;
using denoiser::Kernel;

constexpr int64_t kSmall = 16384;  // elements that are not worth a second thread

// (F, C, H, W) -> (F, H, W, C): a view of a map in channels_last, a copy of any other.
Tensor rows_of(const Tensor& map) { return map.permute({0, 2, 3, 1}).contiguous(); }
Tensor map_of(const Tensor& rows) { return rows.permute({0, 3, 1, 2}); }

void run(Kernel<FrameNorm> kernel, const FrameNorm& a) {
  const int64_t tasks = a.tasks();
  at::parallel_for(0, tasks, a.rows * a.channels < kSmall ? tasks : 1,
                   [&](int64_t begin, int64_t end) { kernel(a, begin, end, nullptr); });
}

// What the structure points into; it must outlive the call.
struct Call {
  FrameNorm a{};
  Tensor x, other, mean, gain, bias, parts;
  int type;

  Call(const Tensor& map, const Tensor& weight, const Tensor& bias_, const std::optional<Tensor>& other_, bool relu)
      : bias(bias_.contiguous()) {
    TORCH_CHECK(map.dim() == 4 && map.numel() > 0, "frame_norm: x must be (F, C, H, W) and not empty");
    TORCH_CHECK(map.scalar_type() == at::kFloat || map.scalar_type() == at::kBFloat16,
                "frame_norm: x must be float32 or bfloat16, not ", map.scalar_type());
    for (const Tensor& parameter : {weight, bias}) {
      TORCH_CHECK(parameter.scalar_type() == at::kFloat && parameter.dim() == 1 && parameter.size(0) == map.size(1),
                  "frame_norm: weight and bias must be float32 (C,)");
    }
    type = map.scalar_type() == at::kFloat ? denoiser::kFloat32 : denoiser::kBFloat16;
    x = rows_of(map);
    a.x = x.const_data_ptr();
    a.channels = map.size(1);
    a.rows = map.numel() / a.channels;
    a.ending = relu ? Ending::relu : Ending::plain;
    if (other_.has_value()) {
      TORCH_CHECK(relu && other_->sizes() == map.sizes() && other_->scalar_type() == map.scalar_type(),
                  "frame_norm: a shortcut has the type and the shape of x, and ReLU comes after it");
      other = rows_of(*other_);
      a.other = other.const_data_ptr();
      a.ending = Ending::shortcut;
    }
    a.bias = bias.const_data_ptr<float>();
    parts = at::empty({a.tasks(), FrameNorm::kSums, a.channels}, at::kFloat);
    a.parts = parts.mutable_data_ptr<float>();
  }

  // z = (x - mean) * gain + bias from the moments, float64 (2, C).
  void normalise_by(const Tensor& moments, const Tensor& weight, double eps) {
    mean = moments[0].to(at::kFloat);
    gain = ((moments[1] + eps).rsqrt() * weight).to(at::kFloat);
    a.mean = mean.const_data_ptr<float>();
    a.gain = gain.const_data_ptr<float>();
  }
};

// Mean and biased variance of each channel, float64 (2, C), from the parts: those of n rows with mean m have a sum of
// squares about the whole mean of their own plus n (m - mean)^2.
Tensor moments_of(const FrameNorm& a) {
  Tensor moments = at::zeros({2, a.channels}, at::kDouble);
  double *mean = moments.mutable_data_ptr<double>(), *variance = mean + a.channels;
  const double share = 1.0 / static_cast<double>(a.rows);
  const auto each = [&](const auto& f) {
    for (int64_t task = 0; task < a.tasks(); ++task) {
      const auto rows = static_cast<double>(std::min(a.part(), a.rows - task * a.part()));
      const float* pivot = a.parts + task * FrameNorm::kSums * a.channels;
      for (int64_t c = 0; c < a.channels; ++c) {
        f(c, rows, pivot[c], static_cast<double>(pivot[a.channels + c]), static_cast<double>(pivot[2 * a.channels + c]));
      }
    }
  };
  each([&](int64_t c, double rows, double pivot, double sum, double) { mean[c] += (pivot * rows + sum) * share; });
  each([&](int64_t c, double rows, double pivot, double sum, double square) {
    const double away = pivot + sum / rows - mean[c];
    variance[c] += (std::fmax(square - sum * sum / rows, 0.0) + rows * away * away) * share;
  });
  return moments;
}

// Of the gradient of z, and of that times x - mean: float64 (2, C), the parts one after the other.
Tensor sums_of(const FrameNorm& a) {
  Tensor sums = at::zeros({2, a.channels}, at::kDouble);
  double* to = sums.mutable_data_ptr<double>();
  for (int64_t task = 0; task < a.tasks(); ++task) {
    const float* part = a.parts + task * FrameNorm::kSums * a.channels;
    for (int64_t c = 0; c < 2 * a.channels; ++c) to[c] += static_cast<double>(part[c]);
  }
  return sums;
}

std::tuple<Tensor, Tensor> frame_norm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                      const std::optional<Tensor>& shortcut, bool relu, double eps) {
  Call call(x, weight, bias, shortcut, relu);
  const denoiser::Kernels& kernels = denoiser::kernels();
  run(kernels.frame_moments[call.type], call.a);
  const Tensor moments = moments_of(call.a);
  call.normalise_by(moments, weight, eps);
  Tensor out = at::empty_like(call.x);
  call.a.out = out.mutable_data_ptr();
  run(kernels.frame_norm[call.type], call.a);
  return {map_of(out), moments};
}

std::tuple<Tensor, Tensor, Tensor> frame_norm_backward(const Tensor& gradient, const Tensor& x, const Tensor& weight,
                                                       const Tensor& bias, const Tensor& moments,
                                                       const std::optional<Tensor>& out, bool relu, double eps) {
  Call call(x, weight, bias, out, relu);
  FrameNorm& a = call.a;
  TORCH_CHECK(gradient.sizes() == x.sizes() && gradient.scalar_type() == x.scalar_type(),
              "frame_norm_backward: the gradient must have the result's shape and type");
  TORCH_CHECK(moments.scalar_type() == at::kDouble && moments.is_contiguous() && moments.numel() == 2 * a.channels,
              "frame_norm_backward: moments must be those of the forward pass");
  call.normalise_by(moments, weight, eps);
  const Tensor grad = rows_of(gradient);
  Tensor of_x = at::empty_like(call.x), masked = at::empty(out.has_value() ? call.x.sizes() : at::IntArrayRef{0}, x.options());
  a.grad = grad.const_data_ptr();
  a.masked = masked.mutable_data_ptr();
  a.out = of_x.mutable_data_ptr();
  const denoiser::Kernels& kernels = denoiser::kernels();
  run(kernels.frame_norm_sums[call.type], a);

  const Tensor sums = sums_of(a);
  const Tensor inverse = (moments[1] + eps).rsqrt();
  const Tensor level = (sums[0] / a.rows).to(at::kFloat);
  const Tensor along = (sums[1] * inverse.square() / a.rows).to(at::kFloat);
  a.level = level.const_data_ptr<float>();
  a.along = along.const_data_ptr<float>();
  run(kernels.frame_norm_gradient[call.type], a);
  const Tensor parameters = at::stack({sums[1] * inverse, sums[0]}).to(at::kFloat);
  return {map_of(of_x), parameters, out.has_value() ? map_of(masked) : masked};
}

}  // namespace

TORCH_LIBRARY_IMPL(gaitfast, CPU, m) {
  m.impl("frame_norm", frame_norm);
  m.impl("frame_norm_backward", frame_norm_backward);
}

}  // namespace gaitfast
