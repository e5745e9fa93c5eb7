// The schemas of torch.ops.gaitfast's denoiser operators as C++ sees them; what they compute stands in gaitfast.kernels.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace gaitfast::denoiser {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

using GroupNormForward = std::tuple<Tensor, Tensor>(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                    int64_t groups, const OptionalTensor& scale,
                                                    const OptionalTensor& shift, double eps);
using GroupNormBackward = std::tuple<Tensor, Tensor, Tensor>(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                             const Tensor& bias, int64_t groups,
                                                             const OptionalTensor& scale, const OptionalTensor& shift,
                                                             const Tensor& stats);
using LayerNormForward = Tensor(const Tensor& x, const Tensor& weight, double eps);
using LayerNormBackward = std::tuple<Tensor, Tensor>(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                     double eps);
using TemporalForward = Tensor(const Tensor& qkv, const Tensor& bias, const Tensor& rotation, int64_t heads);
using TemporalBackward = std::tuple<Tensor, Tensor>(const Tensor& grad, const Tensor& qkv, const Tensor& bias,
                                                    const Tensor& rotation, int64_t heads);
using SitesForward = Tensor(const Tensor& qkv, int64_t heads);
using SitesBackward = Tensor(const Tensor& grad, const Tensor& qkv, int64_t heads);
using FilmForward = Tensor(const Tensor& time, const Tensor& condition, const Tensor& weight, const Tensor& bias);

}  // namespace gaitfast::denoiser
