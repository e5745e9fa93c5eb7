// Checks that every device's implementation of an operator on compressed chunks makes before it touches memory.
#pragma once

#include <ATen/ATen.h>

#include <string>

namespace gaitfast {

// bytes: uint8 (any); offset, size: int64 (n). Says nothing about the ranges themselves: see chunk_in_range.
inline void check_chunks(const char* op, const at::Tensor& bytes, const at::Tensor& offset, const at::Tensor& size) {
  TORCH_CHECK(bytes.dim() == 1 && bytes.scalar_type() == at::kByte, op, ": bytes must be uint8 (any)");
  TORCH_CHECK(offset.dim() == 1 && offset.scalar_type() == at::kLong, op, ": offset must be int64 (n)");
  TORCH_CHECK(size.sizes() == offset.sizes() && size.scalar_type() == at::kLong, op, ": size must be int64 (n)");
  TORCH_CHECK(bytes.device() == offset.device() && bytes.device() == size.device(), op, ": one device for all inputs");
}

// Written so that no sum can overflow, whatever the index claims.
inline bool chunk_in_range(int64_t offset, int64_t size, int64_t total) {
  return offset >= 0 && size >= 0 && size <= total && offset <= total - size;
}

namespace retrieval {
std::string plane_type();
}

namespace convolution {
bool has_row_products();
}

namespace denoiser {
std::string instructions();
}

}  // namespace gaitfast
