// The gradients of the denoiser's operators. What is saved for the backward pass is what went in, and two numbers a group.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "operators.h"

namespace gaitfast::denoiser {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

template <class Signature, class... Arguments>
auto call(const char* name, Arguments&&... arguments) {
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  return handle.call(std::forward<Arguments>(arguments)...);
}

OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

struct GroupNormFunction : Function<GroupNormFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                               int64_t groups, const OptionalTensor& scale, const OptionalTensor& shift, double eps) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, stats] = call<GroupNormForward>("gaitfast::group_norm_film_silu", x, weight, bias, groups, scale, shift, eps);
    ctx->save_for_backward({x, weight, bias, scale.value_or(Tensor()), shift.value_or(Tensor()), stats});
    ctx->saved_data["groups"] = groups;
    ctx->mark_non_differentiable({stats});
    return {y, stats};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &bias = saved[2], &scale = saved[3], &shift = saved[4];
    const auto [grad_x, parameters, rows] =
        call<GroupNormBackward>("gaitfast::group_norm_film_silu_backward", grads[0], x, weight, bias,
                                ctx->saved_data["groups"].toInt(), optional(scale), optional(shift), saved[5]);
    const bool modulated = scale.defined();
    return {grad_x,
            parameters.select(0, 0).to(weight.scalar_type()),
            parameters.select(0, 1).to(bias.scalar_type()),
            Tensor(),
            modulated ? rows.select(0, 0).to(scale.scalar_type()) : Tensor(),
            modulated ? rows.select(0, 1).to(shift.scalar_type()) : Tensor(),
            Tensor()};
  }
};

struct LayerNormFunction : Function<LayerNormFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, double eps) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight});
    ctx->saved_data["eps"] = eps;
    return call<LayerNormForward>("gaitfast::layer_norm", x, weight, eps);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto [grad_x, grad_weight] = call<LayerNormBackward>("gaitfast::layer_norm_backward", grads[0], saved[0],
                                                               saved[1], ctx->saved_data["eps"].toDouble());
    return {grad_x, grad_weight.to(saved[1].scalar_type()), Tensor()};
  }
};

struct TemporalFunction : Function<TemporalFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& qkv, const Tensor& bias, const Tensor& rotation,
                        int64_t heads) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({qkv, bias, rotation});
    ctx->saved_data["heads"] = heads;
    return call<TemporalForward>("gaitfast::temporal_attention", qkv, bias, rotation, heads);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto [grad_qkv, grad_bias] =
        call<TemporalBackward>("gaitfast::temporal_attention_backward", grads[0], saved[0], saved[1], saved[2],
                               ctx->saved_data["heads"].toInt());
    return {grad_qkv, grad_bias.to(saved[1].scalar_type()), Tensor(), Tensor()};
  }
};

// Attention over sites: `Kind` names the operator and its backward.
template <class Kind>
struct SitesFunction : Function<SitesFunction<Kind>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& qkv, int64_t heads) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({qkv});
    ctx->saved_data["heads"] = heads;
    return call<SitesForward>(Kind::kForward, qkv, heads);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const int64_t heads = ctx->saved_data["heads"].toInt();
    return {call<SitesBackward>(Kind::kBackward, grads[0], ctx->get_saved_variables()[0], heads), Tensor()};
  }
};

struct Spatial {
  static constexpr const char *kForward = "gaitfast::spatial_attention", *kBackward = "gaitfast::spatial_attention_backward";
};

struct Linear {
  static constexpr const char *kForward = "gaitfast::linear_attention", *kBackward = "gaitfast::linear_attention_backward";
};

struct FilmFunction : Function<FilmFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& time, const Tensor& condition, const Tensor& weight,
                        const Tensor& bias) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({time, condition, weight, bias});
    return call<FilmForward>("gaitfast::film", time, condition, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &time = saved[0], &condition = saved[1], &weight = saved[2], &grad = grads[0];
    const Tensor embedding = at::cat({time, condition}, 1).to(weight.scalar_type());
    const Tensor slope = at::silu_backward(grad.matmul(weight), embedding);
    const auto parts = slope.split_with_sizes_symint({time.sym_size(1), condition.sym_size(1)}, 1);
    return {parts[0].to(time.scalar_type()), parts[1].to(condition.scalar_type()), grad.t().matmul(at::silu(embedding)),
            grad.sum(0).to(saved[3].scalar_type())};
  }
};

std::tuple<Tensor, Tensor> group_norm_film_silu(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups,
                                                const OptionalTensor& scale, const OptionalTensor& shift, double eps) {
  const variable_list out = GroupNormFunction::apply(x, weight, bias, groups, scale, shift, eps);
  return {out[0], out[1]};
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, double eps) { return LayerNormFunction::apply(x, weight, eps); }

Tensor temporal_attention(const Tensor& qkv, const Tensor& bias, const Tensor& rotation, int64_t heads) {
  return TemporalFunction::apply(qkv, bias, rotation, heads);
}

Tensor spatial_attention(const Tensor& qkv, int64_t heads) { return SitesFunction<Spatial>::apply(qkv, heads); }

Tensor linear_attention(const Tensor& qkv, int64_t heads) { return SitesFunction<Linear>::apply(qkv, heads); }

Tensor film(const Tensor& time, const Tensor& condition, const Tensor& weight, const Tensor& bias) {
  return FilmFunction::apply(time, condition, weight, bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(gaitfast, Autograd, m) {
  m.impl("group_norm_film_silu", group_norm_film_silu);
  m.impl("layer_norm", layer_norm);
  m.impl("temporal_attention", temporal_attention);
  m.impl("spatial_attention", spatial_attention);
  m.impl("linear_attention", linear_attention);
  m.impl("film", film);
}

}  // namespace gaitfast::denoiser
