// The table of the level that the including file has chosen, as GAITFAST_TABLE.
#include "frame_norm.h"
#include "group_norm.h"
#include "layer_norm.h"
#include "linear_attention.h"

namespace gaitfast::denoiser {

const Kernels GAITFAST_TABLE = {
    {group_norm<float>, group_norm<BFloat16>},
    {group_norm_backward<float>, group_norm_backward<BFloat16>},
    {layer_norm<float>, layer_norm<BFloat16>},
    {layer_norm_backward<float>, layer_norm_backward<BFloat16>},
    {attention<float>, attention<BFloat16>},
    {attention_backward<float>, attention_backward<BFloat16>},
    {linear_attention<float>, linear_attention<BFloat16>},
    {linear_attention_backward<float>, linear_attention_backward<BFloat16>},
    {frame_moments<float>, frame_moments<BFloat16>},
    {frame_norm<float>, frame_norm<BFloat16>},
    {frame_norm_sums<float>, frame_norm_sums<BFloat16>},
    {frame_norm_gradient<float>, frame_norm_gradient<BFloat16>},
};

}  // namespace gaitfast::denoiser
