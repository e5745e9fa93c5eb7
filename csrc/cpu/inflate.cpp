// LZ4 blocks -> frames on the CPU, and the CRC-32 of the blocks.
// One thread a call: the loader calls from a thread of its own, beside the step's.
#include <torch/library.h>

#include <cstdint>

#include "chunks.h"
#include "ops.h"

namespace gaitfast {
namespace {

at::Tensor inflate_frames(const at::Tensor& bytes, const at::Tensor& offset, const at::Tensor& size,
                          int64_t frame_bytes) {
  check_chunks("inflate_frames", bytes, offset, size);
  TORCH_CHECK(frame_bytes > 0, "inflate_frames: frame_bytes must be positive, got ", frame_bytes);
  const auto data = bytes.contiguous(), starts = offset.contiguous(), sizes = size.contiguous();
  const int64_t rows = starts.numel(), total = data.numel();
  auto frames = at::empty({rows, frame_bytes}, data.options());
  const auto* source = data.const_data_ptr<uint8_t>();
  const auto* start = starts.const_data_ptr<int64_t>();
  const auto* length = sizes.const_data_ptr<int64_t>();
  auto* target = frames.mutable_data_ptr<uint8_t>();

  for (int64_t row = 0; row < rows; ++row) {
    const bool good = chunk_in_range(start[row], length[row], total) &&
                      inflate_block(source + start[row], source + start[row] + length[row], target + row * frame_bytes,
                                    target + (row + 1) * frame_bytes, target + rows * frame_bytes);
    TORCH_CHECK(good, "inflate_frames: row ", row, " is not an LZ4 block of one frame");
  }
  return frames;
}

// The CRC-32 of each chunk as int64 (n); -1 for a chunk that leaves `bytes`.
at::Tensor chunk_crc32(const at::Tensor& bytes, const at::Tensor& offset, const at::Tensor& size) {
  check_chunks("chunk_crc32", bytes, offset, size);
  const auto data = bytes.contiguous(), starts = offset.contiguous(), sizes = size.contiguous();
  const int64_t rows = starts.numel(), total = data.numel();
  auto sums = at::empty({rows}, starts.options());
  const auto* source = data.const_data_ptr<uint8_t>();
  const auto* start = starts.const_data_ptr<int64_t>();
  const auto* length = sizes.const_data_ptr<int64_t>();
  auto* sum = sums.mutable_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row) {
    const bool inside = chunk_in_range(start[row], length[row], total);
    sum[row] = inside ? int64_t(crc32(source + start[row], length[row])) : -1;
  }
  return sums;
}

}  // namespace

TORCH_LIBRARY_IMPL(gaitfast, CPU, m) {
  m.impl("inflate_frames", inflate_frames);
  m.impl("chunk_crc32", chunk_crc32);
}

}  // namespace gaitfast
