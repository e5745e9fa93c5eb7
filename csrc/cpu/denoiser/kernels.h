// The denoiser's operations on plain memory, and the table of what runs at one level of instructions.
//
// B batch, T frames, S = H*W sites, C channels, N heads of 32 features. A kernel does tasks [begin, end) of a call; tasks
// and their order of summation follow from shapes alone, so that results have the same bits on any number of threads.
#pragma once

#include <cstdint>

namespace gaitfast::denoiser {

struct BFloat16 {
  uint16_t bits;
};

enum Type { kFloat32 = 0, kBFloat16 = 1, kTypes = 2 };

constexpr int64_t kMostPerGroup = 512;  // channels of a group
constexpr int64_t kMostChannels = 4096;  // of a layer norm
constexpr int64_t kFeatures = 32;        // of a head
constexpr int64_t kMostRows = 64;        // frames or sites that attend to each other

// GroupNorm over (P, C / groups), modulation, SiLU. A task is a sample's block of whole groups.
struct GroupNorm {
  const void *x, *grad;             // (B, P, C)
  void* out;                        // (B, P, C): y, or the gradient of x
  const float *weight, *bias;       // (C,)
  const float *scale, *shift;       // (B, C), rows `stride` apart, or null
  float* stats;                     // (B, 2, G): mean, 1 / deviation
  float *sums;                      // (2 or 4, B, C): each sample's gradients of weight, bias, scale, shift
  int64_t batch, positions, channels, groups, scale_stride, shift_stride;
  float eps;

  int64_t per_group() const { return channels / groups; }
  // About 64 channels: rows of them in float32 stay in the second-level cache for all three passes.
  int64_t block() const {
    const int64_t per = per_group(), some = per < 64 ? 64 / per * per : per;
    return some < channels ? some : channels;
  }
  int64_t blocks() const { return (channels + block() - 1) / block(); }
  int64_t tasks() const { return batch * blocks(); }
  // Floats that a thread needs backward where the output cannot hold the gradient at the SiLU's argument.
  int64_t scratch() const { return positions * block(); }
};

// Layer norm of rows. A task is kRows rows.
struct LayerNorm {
  static constexpr int64_t kRows = 256;
  const void *x, *grad;  // (R, C)
  void* out;             // (R, C): y, or the gradient of x
  const float* weight;   // (C,)
  float* parts;          // (tasks, C): gradients of the weight
  int64_t rows, channels;
  float eps;

  int64_t tasks() const { return (rows + kRows - 1) / kRows; }
};

// Attention among the rows of a sequence, for every head. Sequence (b, i) has rows at b * outer + i * inner + r * step
// in units of kFeatures * heads elements of the result, three times that in qkv. A task is `sequences` of them, all of one b.
struct Attention {
  const void *qkv, *grad;
  void* out;              // the result, or the gradient of qkv
  const float* bias;      // (N, rows, padded): key row x query lane, times log2(e); or null
  const float* rotation;  // (rows, 2, 16): cosines, sines; or null
  float* bias_parts;      // (tasks, N, rows, padded): gradients of the bias, in that order
  int64_t batch, count, rows, heads;  // B, sequences of a sample, rows of a sequence
  int64_t outer, inner, step;
  int64_t sequences;

  int64_t padded() const { return (rows + 31) / 32 * 32; }
  int64_t tasks_of_sample() const { return (count + sequences - 1) / sequences; }
  int64_t tasks() const { return batch * tasks_of_sample(); }
};

enum class Ending { plain, relu, shortcut };  // y = z, relu(z), relu(z + shortcut)

// Batch norm of a backbone's maps (csrc/cpu/frame_norm.cpp): R rows of C channels. A task is a part of the rows, whose sums
// are in float32.
struct FrameNorm {
  const void *x, *grad;              // (R, C)
  const void* other;                 // (R, C): forward a shortcut, backward the result of a norm with one; or null
  void* out;                         // (R, C): y, or the gradient of x
  void* masked;                      // (R, C): backward the shortcut's gradient, with `other`
  const float *mean, *gain, *bias;   // (C,): z = (x - mean) * gain + bias
  const float *level, *along;        // (C,): the gradient of x is gain * (gradient of z - level - (x - mean) * along)
  float* parts;                      // (tasks, kSums, C)
  int64_t rows, channels;
  Ending ending;

  static constexpr int64_t kSums = 3;
  // Some 64 Ki elements, which stay in the second-level cache.
  static constexpr int64_t kMostRows = 1024;
  int64_t part() const {
    const int64_t some = 65536 / channels;
    return some < 1 ? 1 : some > kMostRows ? kMostRows : some;
  }
  int64_t tasks() const { return (rows + part() - 1) / part(); }
};

template <class Arguments>
using Kernel = void (*)(const Arguments&, int64_t begin, int64_t end, float* scratch);

struct Kernels {
  Kernel<GroupNorm> group_norm[kTypes], group_norm_backward[kTypes];
  Kernel<LayerNorm> layer_norm[kTypes], layer_norm_backward[kTypes];
  Kernel<Attention> attention[kTypes], attention_backward[kTypes];
  Kernel<Attention> linear_attention[kTypes], linear_attention_backward[kTypes];
  Kernel<FrameNorm> frame_moments[kTypes], frame_norm[kTypes], frame_norm_sums[kTypes], frame_norm_gradient[kTypes];
};

extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels, kAmxKernels;

// Those for this CPU, capped by GAITFAST_CPU.
const Kernels& kernels();

}  // namespace gaitfast::denoiser
