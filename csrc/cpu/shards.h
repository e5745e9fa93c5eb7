// What readers of mapped shards share: the request, each row's block, and the verdict.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include "ops.h"

namespace gaitfast {

// What gaitfast/data/shards.py turns into a message.
enum Problem : int64_t { kSound = 0, kChecksum = 1, kBlock = 2, kUnreadable = 3 };

struct Shard {
  const uint8_t* data;
  int64_t bytes;
  const int64_t* offsets;
  const int32_t* crc;
};

struct Request {
  std::vector<Shard> shards;
  at::Tensor shard, number;  // contiguous int64 (n)

  const Shard& of(int64_t row) const { return shards[shard.const_data_ptr<int64_t>()[row]]; }
  int64_t frame(int64_t row) const { return number.const_data_ptr<int64_t>()[row]; }
  int64_t rows() const { return number.numel(); }
};

inline Request request(const char* op, at::TensorList data, at::TensorList offsets, at::TensorList crc, const at::Tensor& shard,
                const at::Tensor& number) {
  TORCH_CHECK(data.size() == offsets.size() && data.size() == crc.size(), op, ": one of each for every shard");
  TORCH_CHECK(shard.dim() == 1 && shard.scalar_type() == at::kLong, op, ": shards must be int64 (n)");
  TORCH_CHECK(number.sizes() == shard.sizes() && number.scalar_type() == at::kLong, op, ": numbers must be int64 (n)");
  Request found{{}, shard.contiguous(), number.contiguous()};
  for (size_t i = 0; i < data.size(); ++i) {
    const bool typed = data[i].scalar_type() == at::kByte && offsets[i].scalar_type() == at::kLong &&
                       crc[i].scalar_type() == at::kInt;
    const bool flat = data[i].dim() == 1 && offsets[i].dim() == 1 && crc[i].dim() == 1 && data[i].is_contiguous() &&
                      offsets[i].is_contiguous() && crc[i].is_contiguous();
    TORCH_CHECK(typed && flat, op, ": data uint8, offsets int64, crc int32, each contiguous and of one axis");
    TORCH_CHECK(offsets[i].numel() == crc[i].numel() + 1, op, ": offsets are one more than crc");
    found.shards.push_back({data[i].const_data_ptr<uint8_t>(), data[i].numel(), offsets[i].const_data_ptr<int64_t>(),
                            crc[i].const_data_ptr<int32_t>()});
  }
  for (int64_t row = 0; row < found.rows(); ++row) {
    const int64_t which = found.shard.const_data_ptr<int64_t>()[row], frame = found.frame(row);
    TORCH_CHECK(which >= 0 && which < int64_t(data.size()), op, ": row ", row, " is of no shard");
    TORCH_CHECK(frame >= 0 && frame < crc[which].numel(), op, ": row ", row, " is not in its shard");
  }
  return found;
}

// Start and size of a frame's block; false where it leaves the shard.
inline bool locate(const Shard& shard, int64_t frame, int64_t& offset, int64_t& size) {
  offset = shard.offsets[frame];
  const int64_t end = shard.offsets[frame + 1];
  size = end >= offset && offset >= 0 ? end - offset : -1;
  return chunk_in_range(offset, size, shard.bytes);
}

inline at::Tensor verdict(int64_t row, Problem problem) {
  auto result = at::empty({2}, at::kLong);
  result.mutable_data_ptr<int64_t>()[0] = problem == kSound ? -1 : row;
  result.mutable_data_ptr<int64_t>()[1] = problem;
  return result;
}

}  // namespace gaitfast
