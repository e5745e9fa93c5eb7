// Frames of many mapped shards in one call: located, checked by their CRC-32 and inflated. Nothing in a shard is
// trusted, and the file may change or shrink while it is read.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>
#include <tuple>

#include "cpu/bus_guard.h"
#include "cpu/chunks.h"
#include "cpu/shards.h"

namespace gaitfast {
namespace {

std::tuple<at::Tensor, at::Tensor> read_frames(at::TensorList data, at::TensorList offsets, at::TensorList crc,
                                               const at::Tensor& shards, const at::Tensor& numbers,
                                               int64_t frame_bytes) {
  TORCH_CHECK(frame_bytes > 0, "read_frames: frame_bytes must be positive, got ", frame_bytes);
  const Request wanted = request("read_frames", data, offsets, crc, shards, numbers);
  const int64_t rows = wanted.rows();
  auto frames = at::empty({rows, frame_bytes}, at::kByte);
  uint8_t* const target = frames.mutable_data_ptr<uint8_t>();
  volatile int64_t row = 0;  // volatile: read after the jump
  volatile int64_t problem = kSound;
  const bool sound = readable([&] {
    while (row < rows) {
      const int64_t r = row;
      const Shard& shard = wanted.of(r);
      const int64_t frame = wanted.frame(r);
      int64_t offset, size;
      if (!locate(shard, frame, offset, size) ||
          crc32(shard.data + offset, size) != uint32_t(shard.crc[frame])) {
        problem = kChecksum;
        return;
      }
      const uint8_t* const block = shard.data + offset;
      if (!inflate_block(block, block + size, target + r * frame_bytes, target + (r + 1) * frame_bytes,
                         target + rows * frame_bytes)) {
        problem = kBlock;
        return;
      }
      row = r + 1;
    }
  });
  return {frames, verdict(row, sound ? Problem(int64_t(problem)) : kUnreadable)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> read_chunks(at::TensorList data, at::TensorList offsets,
                                                           at::TensorList crc, const at::Tensor& shards,
                                                           const at::Tensor& numbers) {
  const Request wanted = request("read_chunks", data, offsets, crc, shards, numbers);
  const int64_t rows = wanted.rows();
  auto sizes = at::empty({rows}, at::kLong);
  int64_t* const size_of = sizes.mutable_data_ptr<int64_t>();
  volatile int64_t row = 0, problem = kSound, total = 0;
  bool sound = readable([&] {
    while (row < rows) {
      int64_t offset;
      if (!locate(wanted.of(row), wanted.frame(row), offset, size_of[row])) {
        problem = kChecksum;
        return;
      }
      total = total + size_of[row];
      row = row + 1;
    }
  });
  // A hostile index may claim one long block many times: no frame's block is larger than this.
  if (sound && problem == kSound && total > rows * kLargestBlock) {
    row = 0;
    while (size_of[row] <= kLargestBlock) row = row + 1;
    problem = kChecksum;
  }
  const bool located = sound && problem == kSound;
  auto bytes = at::empty({located ? int64_t(total) : 0}, at::kByte);
  if (located) {
    uint8_t* const target = bytes.mutable_data_ptr<uint8_t>();
    volatile int64_t filled = 0;
    row = 0;
    sound = readable([&] {
      while (row < rows) {
        const Shard& shard = wanted.of(row);
        const int64_t frame = wanted.frame(row), size = size_of[row];
        int64_t offset, again;
        // The copy is what is checked: the file may change between a check and a copy.
        if (!locate(shard, frame, offset, again) || again != size) {
          problem = kChecksum;
          return;
        }
        std::memcpy(target + filled, shard.data + offset, size);
        if (crc32(target + filled, size) != uint32_t(shard.crc[frame])) {
          problem = kChecksum;
          return;
        }
        filled = filled + size;
        row = row + 1;
      }
    });
  }
  return {bytes, sizes, verdict(row, sound ? Problem(int64_t(problem)) : kUnreadable)};
}

}  // namespace

TORCH_LIBRARY_IMPL(gaitfast, CPU, m) {
  m.impl("read_frames", read_frames);
  m.impl("read_chunks", read_chunks);
}

}  // namespace gaitfast
