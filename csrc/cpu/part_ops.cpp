// RandomPartDilate and RandomPartBlur on the CPU, in place: DALI has no dilation there, and the blur comes behind it.
#include "part_ops.h"

#include <torch/library.h>

namespace gaitfast {
namespace {

// clips uint8 (B, T, H, W), changed in place.
void part_ops_(at::Tensor& clips, const at::Tensor& half_widths, const at::Tensor& dilate_rows,
               const at::Tensor& blur_rows) {
  TORCH_CHECK(clips.scalar_type() == at::kByte && clips.dim() == 4 && clips.is_contiguous(),
              "part_ops_: clips must be contiguous uint8 (B, T, H, W)");
  const int64_t count = clips.size(0), frames = clips.size(1), height = clips.size(2), width = clips.size(3);
  const PartOps ops("part_ops_", half_widths, dilate_rows, blur_rows, count, height, width);
  PartOps::Scratch scratch(ops);
  uint8_t* data = clips.mutable_data_ptr<uint8_t>();
  for (int64_t i = 0; i < count; ++i)
    for (int64_t t = 0; t < frames; ++t) ops.run(scratch, i, data + (i * frames + t) * height * width);
}

}  // namespace

TORCH_LIBRARY_IMPL(gaitfast, CPU, m) { m.impl("part_ops_", part_ops_); }

}  // namespace gaitfast
