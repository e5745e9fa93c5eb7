// torch.ops.gaitfast: the denoiser's operations on the CPU. Checks arguments, lays out what is small, shares out tasks.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "kernels.h"
#include "operators.h"

namespace gaitfast::denoiser {
namespace {

constexpr int64_t kSmall = 16384;  // elements that are not worth a second thread
constexpr float kLog2e = 1.44269504f;

template <class Arguments>
void run(Kernel<Arguments> kernel, const Arguments& a, int64_t tasks, int64_t elements, int64_t scratch = 0) {
  at::parallel_for(0, tasks, elements < kSmall ? tasks : 1, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> memory;
    if (static_cast<int64_t>(memory.size()) < scratch) memory.resize(scratch);
    kernel(a, begin, end, memory.data());
  });
}

Type type_of(const char* operation, const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, operation,
              ": activations must be float32 or bfloat16, not ", x.scalar_type());
  return x.scalar_type() == at::kFloat ? kFloat32 : kBFloat16;
}

void check_like(const char* operation, const Tensor& grad, at::IntArrayRef sizes, const Tensor& x) {
  TORCH_CHECK(grad.sizes() == sizes && grad.scalar_type() == x.scalar_type(), operation,
              ": the gradient must have the result's shape and type");
}

Tensor floats(const Tensor& parameter) { return parameter.to(at::kFloat).contiguous(); }

Tensor new_floats(at::IntArrayRef sizes) { return at::empty(sizes, at::kFloat); }

// What the structure points into; it must outlive the call.
struct GroupNormCall {
  GroupNorm a{};
  Tensor x, weight, bias, scale, shift;

  GroupNormCall(const Tensor& x_, const Tensor& weight_, const Tensor& bias_, int64_t groups, const OptionalTensor& scale_,
                const OptionalTensor& shift_)
      : x(x_.contiguous()), weight(floats(weight_)), bias(floats(bias_)) {
    TORCH_CHECK(x.dim() == 5 && groups > 0 && x.size(4) % groups == 0, "group_norm_film_silu: x must be (B,T,H,W,C), and C a "
                "multiple of the groups");
    a.batch = x.size(0);
    a.channels = x.size(4);
    a.positions = x.size(1) * x.size(2) * x.size(3);
    a.groups = groups;
    TORCH_CHECK(a.per_group() <= kMostPerGroup, "group_norm_film_silu: more than ", kMostPerGroup, " channels in a group");
    TORCH_CHECK(weight.numel() == a.channels && bias.numel() == a.channels,
                "group_norm_film_silu: weight and bias must be (C,)");
    TORCH_CHECK(scale_.has_value() == shift_.has_value(), "group_norm_film_silu: scale and shift come together");
    a.x = x.const_data_ptr();
    a.weight = weight.const_data_ptr<float>();
    a.bias = bias.const_data_ptr<float>();
    if (scale_.has_value()) {
      TORCH_CHECK(scale_->sizes() == at::IntArrayRef({a.batch, a.channels}) && shift_->sizes() == scale_->sizes(),
                  "group_norm_film_silu: scale and shift must be (B, C)");
      scale = rows_of(*scale_);
      shift = rows_of(*shift_);
      a.scale = scale.const_data_ptr<float>();
      a.shift = shift.const_data_ptr<float>();
      a.scale_stride = scale.stride(0);
      a.shift_stride = shift.stride(0);
    }
  }

  static Tensor rows_of(const Tensor& rows) {
    const Tensor converted = rows.to(at::kFloat);
    return converted.size(1) == 1 || converted.stride(1) == 1 ? converted : converted.contiguous();
  }
};

std::tuple<Tensor, Tensor> group_norm_film_silu(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups,
                                                const OptionalTensor& scale, const OptionalTensor& shift, double eps) {
  const Type type = type_of("group_norm_film_silu", x);
  GroupNormCall call(x, weight, bias, groups, scale, shift);
  Tensor y = at::empty_like(call.x), stats = new_floats({call.a.batch, 2, groups});
  call.a.out = y.mutable_data_ptr();
  call.a.stats = stats.mutable_data_ptr<float>();
  call.a.eps = static_cast<float>(eps);
  if (x.numel() > 0) run(kernels().group_norm[type], call.a, call.a.tasks(), x.numel());
  return {y, stats};
}

// Gradients of x; of weight and bias (2, C); of scale and shift (2, B, C), (0, B, C) without them.
std::tuple<Tensor, Tensor, Tensor> group_norm_film_silu_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                                 const Tensor& bias, int64_t groups,
                                                                 const OptionalTensor& scale, const OptionalTensor& shift,
                                                                 const Tensor& stats) {
  const Type type = type_of("group_norm_film_silu", x);
  check_like("group_norm_film_silu", grad, x.sizes(), x);
  GroupNormCall call(x, weight, bias, groups, scale, shift);
  GroupNorm& a = call.a;
  TORCH_CHECK(stats.scalar_type() == at::kFloat && stats.is_contiguous() && stats.numel() == 2 * a.batch * groups,
              "group_norm_film_silu: stats must be those of the forward pass");
  const Tensor outer = grad.contiguous();
  Tensor grad_x = at::empty_like(call.x), parameters = new_floats({2, a.channels});
  const int64_t kinds = scale.has_value() ? 4 : 2, plane = a.batch * a.channels;
  Tensor sums = new_floats({kinds, a.batch, a.channels});
  a.grad = outer.const_data_ptr();
  a.out = grad_x.mutable_data_ptr();
  a.stats = const_cast<float*>(stats.const_data_ptr<float>());
  a.sums = sums.mutable_data_ptr<float>();
  if (x.numel() > 0) {
    run(kernels().group_norm_backward[type], a, a.tasks(), x.numel(), type == kFloat32 ? 0 : a.scratch());
  } else {
    sums.zero_();
  }
  float* total = parameters.mutable_data_ptr<float>();
  for (int64_t c = 0; c < 2 * a.channels; ++c) {
    const float* of = a.sums + c / a.channels * plane + c % a.channels;
    float sum = 0;
    for (int64_t sample = 0; sample < a.batch; ++sample) sum += of[sample * a.channels];
    total[c] = sum;
  }
  return {grad_x, parameters, sums.slice(0, 2).clone()};
}

LayerNorm layer_norm_of(const Tensor& x, const Tensor& weight, double eps) {
  TORCH_CHECK(x.dim() > 0 && weight.numel() == x.size(-1), "layer_norm: weight must be (C,)");
  TORCH_CHECK(x.size(-1) <= kMostChannels, "layer_norm: more than ", kMostChannels, " channels");
  LayerNorm a{};
  a.x = x.const_data_ptr();
  a.weight = weight.const_data_ptr<float>();
  a.channels = x.size(-1);
  a.rows = a.channels > 0 ? x.numel() / a.channels : 0;
  a.eps = static_cast<float>(eps);
  return a;
}

Tensor layer_norm(const Tensor& x_, const Tensor& weight_, double eps) {
  const Type type = type_of("layer_norm", x_);
  const Tensor x = x_.contiguous(), weight = floats(weight_);
  LayerNorm a = layer_norm_of(x, weight, eps);
  Tensor y = at::empty_like(x);
  a.out = y.mutable_data_ptr();
  run(kernels().layer_norm[type], a, a.tasks(), x.numel());
  return y;
}

std::tuple<Tensor, Tensor> layer_norm_backward(const Tensor& grad_, const Tensor& x_, const Tensor& weight_, double eps) {
  const Type type = type_of("layer_norm", x_);
  check_like("layer_norm", grad_, x_.sizes(), x_);
  const Tensor grad = grad_.contiguous(), x = x_.contiguous(), weight = floats(weight_);
  LayerNorm a = layer_norm_of(x, weight, eps);
  Tensor grad_x = at::empty_like(x), grad_weight = at::zeros({a.channels}, at::kFloat);
  const Tensor parts = new_floats({a.tasks(), a.channels});
  a.grad = grad.const_data_ptr();
  a.out = grad_x.mutable_data_ptr();
  a.parts = parts.mutable_data_ptr<float>();
  run(kernels().layer_norm_backward[type], a, a.tasks(), x.numel());
  float* total = grad_weight.mutable_data_ptr<float>();
  for (int64_t task = 0; task < a.tasks(); ++task) {
    for (int64_t c = 0; c < a.channels; ++c) total[c] += a.parts[task * a.channels + c];
  }
  return {grad_x, grad_weight};
}

// Rows are frames where `over_frames`, else sites.
Attention attention_of(const char* operation, const Tensor& qkv, int64_t heads, bool over_frames) {
  TORCH_CHECK(qkv.dim() == 4 && heads > 0 && qkv.size(3) == 3 * heads * kFeatures, operation,
              ": qkv must be (B, T, S, 3 * heads * ", kFeatures, ")");
  const int64_t frames = qkv.size(1), sites = qkv.size(2);
  Attention a{};
  a.qkv = qkv.const_data_ptr();
  a.heads = heads;
  a.batch = qkv.size(0);
  a.rows = over_frames ? frames : sites;
  a.count = over_frames ? sites : frames;
  a.outer = frames * sites;
  a.inner = over_frames ? 1 : sites;
  a.step = over_frames ? sites : 1;
  TORCH_CHECK(a.rows <= kMostRows, operation, ": more than ", kMostRows, over_frames ? " frames" : " sites");
  // About 32 tasks, and no more than a sample has.
  a.sequences = std::max<int64_t>(1, std::min(a.count, a.batch * a.count / 32));
  return a;
}

Tensor result_of(const Tensor& qkv) {
  return at::empty({qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) / 3}, qkv.options());
}

Tensor sites_forward(const char* operation, Kernel<Attention> const (&table)[kTypes], const Tensor& qkv_, int64_t heads) {
  const Type type = type_of(operation, qkv_);
  const Tensor qkv = qkv_.contiguous();
  Attention a = attention_of(operation, qkv, heads, false);
  Tensor out = result_of(qkv);
  a.out = out.mutable_data_ptr();
  if (qkv.numel() > 0) run(table[type], a, a.tasks(), qkv.numel());
  return out;
}

Tensor sites_backward(const char* operation, Kernel<Attention> const (&table)[kTypes], const Tensor& grad_,
                      const Tensor& qkv_, int64_t heads) {
  const Type type = type_of(operation, qkv_);
  const Tensor grad = grad_.contiguous(), qkv = qkv_.contiguous();
  Attention a = attention_of(operation, qkv, heads, false);
  check_like(operation, grad, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) / 3}, qkv);
  Tensor grad_qkv = at::empty_like(qkv);
  a.grad = grad.const_data_ptr();
  a.out = grad_qkv.mutable_data_ptr();
  if (qkv.numel() > 0) run(table[type], a, a.tasks(), qkv.numel());
  return grad_qkv;
}

Tensor spatial_attention(const Tensor& qkv, int64_t heads) {
  return sites_forward("spatial_attention", kernels().attention, qkv, heads);
}

Tensor spatial_attention_backward(const Tensor& grad, const Tensor& qkv, int64_t heads) {
  return sites_backward("spatial_attention", kernels().attention_backward, grad, qkv, heads);
}

Tensor linear_attention(const Tensor& qkv, int64_t heads) {
  return sites_forward("linear_attention", kernels().linear_attention, qkv, heads);
}

Tensor linear_attention_backward(const Tensor& grad, const Tensor& qkv, int64_t heads) {
  return sites_backward("linear_attention", kernels().linear_attention_backward, grad, qkv, heads);
}

// Bias and rotation as the kernels read them.
struct Positions {
  std::vector<float> bias, rotation;

  Positions(const Tensor& bias_, const Tensor& rotation_, Attention& a) {
    TORCH_CHECK(bias_.sizes() == at::IntArrayRef({a.heads, a.rows, a.rows}), "temporal_attention: bias must be (N, T, T)");
    TORCH_CHECK(rotation_.sizes() == at::IntArrayRef({a.rows, kFeatures / 2, 2}),
                "temporal_attention: rotation must be (T, D / 2, 2)");
    const int64_t rows = a.rows, padded = a.padded();
    const Tensor own = floats(bias_), angles = floats(rotation_);
    const float* from = own.const_data_ptr<float>();
    bias.resize(a.heads * rows * padded);
    for (int64_t head = 0; head < a.heads; ++head) {
      for (int64_t key = 0; key < rows; ++key) {
        float* to = bias.data() + (head * rows + key) * padded;
        for (int64_t query = 0; query < rows; ++query) to[query] = from[(head * rows + query) * rows + key] * kLog2e;
      }
    }
    const float* angle = angles.const_data_ptr<float>();
    rotation.resize(rows * kFeatures);
    for (int64_t i = 0; i < rows * kFeatures; ++i) {
      rotation[i] = angle[i / kFeatures * kFeatures + i % (kFeatures / 2) * 2 + i % kFeatures / (kFeatures / 2)];
    }
    a.bias = bias.data();
    a.rotation = rotation.data();
  }
};

Tensor temporal_attention(const Tensor& qkv_, const Tensor& bias, const Tensor& rotation, int64_t heads) {
  const Type type = type_of("temporal_attention", qkv_);
  const Tensor qkv = qkv_.contiguous();
  Attention a = attention_of("temporal_attention", qkv, heads, true);
  const Positions positions(bias, rotation, a);
  Tensor out = result_of(qkv);
  a.out = out.mutable_data_ptr();
  if (qkv.numel() > 0) run(kernels().attention[type], a, a.tasks(), qkv.numel());
  return out;
}

// Gradients of qkv and of the bias, float32 (N, T, T).
std::tuple<Tensor, Tensor> temporal_attention_backward(const Tensor& grad_, const Tensor& qkv_, const Tensor& bias,
                                                       const Tensor& rotation, int64_t heads) {
  const Type type = type_of("temporal_attention", qkv_);
  const Tensor grad = grad_.contiguous(), qkv = qkv_.contiguous();
  Attention a = attention_of("temporal_attention", qkv, heads, true);
  check_like("temporal_attention", grad, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) / 3}, qkv);
  const Positions positions(bias, rotation, a);
  const int64_t tasks = qkv.numel() > 0 ? a.tasks() : 0, rows = a.rows, padded = a.padded();
  Tensor grad_qkv = at::empty_like(qkv), grad_bias = new_floats({heads, rows, rows});
  const Tensor parts = new_floats({tasks, heads, rows, padded});
  a.grad = grad.const_data_ptr();
  a.out = grad_qkv.mutable_data_ptr();
  a.bias_parts = parts.mutable_data_ptr<float>();
  if (tasks > 0) run(kernels().attention_backward[type], a, tasks, qkv.numel());
  // The second stage: tasks in order.
  float* to = grad_bias.mutable_data_ptr<float>();
  at::parallel_for(0, heads * rows, heads * rows * padded * tasks < kSmall ? heads * rows : 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(padded);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(sums.begin(), sums.end(), 0.f);
      for (int64_t task = 0; task < tasks; ++task) {
        const float* part = a.bias_parts + (task * heads * rows + i) * padded;
        for (int64_t query = 0; query < rows; ++query) sums[query] += part[query];
      }
      const int64_t head = i / rows, key = i % rows;
      for (int64_t query = 0; query < rows; ++query) to[(head * rows + query) * rows + key] = sums[query];
    }
  });
  return {grad_qkv, grad_bias};
}

Tensor film(const Tensor& time, const Tensor& condition, const Tensor& weight, const Tensor& bias) {
  const Tensor embedding = at::cat({time, condition}, 1).to(weight.scalar_type());
  return at::linear(at::silu(embedding), weight, bias.to(weight.scalar_type()));
}

}  // namespace

TORCH_LIBRARY_IMPL(gaitfast, CPU, m) {
  m.impl("group_norm_film_silu", group_norm_film_silu);
  m.impl("group_norm_film_silu_backward", group_norm_film_silu_backward);
  m.impl("layer_norm", layer_norm);
  m.impl("layer_norm_backward", layer_norm_backward);
  m.impl("temporal_attention", temporal_attention);
  m.impl("temporal_attention_backward", temporal_attention_backward);
  m.impl("spatial_attention", spatial_attention);
  m.impl("spatial_attention_backward", spatial_attention_backward);
  m.impl("linear_attention", linear_attention);
  m.impl("linear_attention_backward", linear_attention_backward);
  m.impl("film", film);
}

}  // namespace gaitfast::denoiser
