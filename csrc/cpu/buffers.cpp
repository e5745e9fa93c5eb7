#include "buffers.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <mutex>

namespace gaitfast {
namespace {

constexpr size_t kSpare = 8;  // two clips of each batch that a loader holds ahead, and a few more

struct Buffer {
  std::unique_ptr<uint8_t[]> memory;
  int64_t bytes;
};

class Pool {
 public:
  Buffer take(int64_t bytes) {
    {
      const std::lock_guard lock(guard_);
      const auto found = std::find_if(spare_.begin(), spare_.end(), [&](const Buffer& b) { return b.bytes == bytes; });
      if (found != spare_.end()) {
        Buffer buffer = std::move(*found);
        spare_.erase(found);
        return buffer;
      }
    }
    return {std::unique_ptr<uint8_t[]>(new uint8_t[bytes]), bytes};
  }

  void give(Buffer buffer) {
    const std::lock_guard lock(guard_);
    spare_.push_back(std::move(buffer));
    if (spare_.size() > kSpare) spare_.pop_front();  // the oldest: of a size that is not asked for any more
  }

 private:
  std::mutex guard_;
  std::deque<Buffer> spare_;
};

// Never destroyed: tensors may outlive every other static object.
Pool& pool() {
  static Pool* const pool = new Pool;
  return *pool;
}

}  // namespace

at::Tensor recycled_bytes(at::IntArrayRef shape) {
  const int64_t bytes = c10::multiply_integers(shape);
  auto* const buffer = new Buffer(pool().take(bytes));
  const auto release = [buffer](void*) {
    pool().give(std::move(*buffer));
    delete buffer;
  };
  return at::from_blob(buffer->memory.get(), shape, release, at::TensorOptions().dtype(at::kByte));
}

}  // namespace gaitfast
