// The shards of a packed dataset (gaitfast/data/shards.py), from frame number to compressed chunk. The bytes are hostile:
// what the index says is checked for every frame that is read.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "chunks.h"
#include "ops.h"

namespace gaitfast {

struct Chunk {
  const uint8_t* data;
  int64_t size;
};

// What is wrong with a frame; null: nothing. The text goes on from "frame 7 of sequence x ".
using Complaint = const char*;

class Shards {
 public:
  Shards(const char* op, at::TensorList frames, at::TensorList offsets, at::TensorList sums, const at::Tensor& first) {
    TORCH_CHECK(first.dim() == 1 && first.scalar_type() == at::kLong && first.is_contiguous(), op,
                ": first must be contiguous int64 (shards + 1)");
    const int64_t count = first.size(0) - 1;
    const int64_t* number = first.const_data_ptr<int64_t>();
    TORCH_CHECK(count >= 1 && int64_t(frames.size()) == count && int64_t(offsets.size()) == count &&
                    int64_t(sums.size()) == count && number[0] == 0 && std::is_sorted(number, number + count + 1),
                op, ": frames, offsets, sums and first must describe the same shards");
    first_.assign(number, number + count + 1);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t n = first_[k + 1] - first_[k];
      TORCH_CHECK(frames[k].dim() == 1 && frames[k].scalar_type() == at::kByte && frames[k].is_contiguous(), op,
                  ": frames must be contiguous uint8 (any)");
      TORCH_CHECK(offsets[k].dim() == 1 && offsets[k].scalar_type() == at::kLong && offsets[k].is_contiguous() &&
                      offsets[k].size(0) == n + 1,
                  op, ": offsets must be contiguous int64 (n + 1)");
      TORCH_CHECK(sums[k].dim() == 1 && sums[k].scalar_type() == at::kUInt32 && sums[k].is_contiguous() &&
                      sums[k].size(0) == n,
                  op, ": sums must be contiguous uint32 (n)");
      shards_.push_back({frames[k].const_data_ptr<uint8_t>(), frames[k].size(0), offsets[k].const_data_ptr<int64_t>(),
                         static_cast<const uint32_t*>(sums[k].const_data_ptr())});
    }
  }

  int64_t num_frames() const { return first_.back(); }

  // The chunk of a frame in 0..num_frames() - 1, checked against its CRC.
  Complaint find(int64_t number, Chunk& chunk) const {
    const int64_t k = std::upper_bound(first_.begin(), first_.end(), number) - first_.begin() - 1;
    const Shard& shard = shards_[k];
    const int64_t local = number - first_[k], offset = shard.offsets[local];
    // Subtracted without overflow, whatever the bytes say.
    const int64_t size = int64_t(uint64_t(shard.offsets[local + 1]) - uint64_t(offset));
    if (!chunk_in_range(offset, size, shard.total)) return kWrongSum;
    chunk = {shard.data + offset, size};
    return crc32(chunk.data, size) == shard.sums[local] ? nullptr : kWrongSum;
  }

 private:
  static constexpr Complaint kWrongSum = "does not match its checksum";
  struct Shard {
    const uint8_t* data;
    int64_t total;
    const int64_t* offsets;
    const uint32_t* sums;
  };
  std::vector<int64_t> first_;
  std::vector<Shard> shards_;
};

}  // namespace gaitfast
