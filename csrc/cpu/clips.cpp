// Compressed chunks of a packed dataset -> augmented clips, and -> one run of bytes for a decoder on the device.
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "buffers.h"
#include "part_ops.h"
#include "retrieval/workers.h"
#include "shards.h"
#include "warp.h"

namespace gaitfast {
namespace {

constexpr int64_t kSize = Warp::kSize, kFrameBytes = kSize * kSize;
constexpr int64_t kBackboneWidth = 44;  // columns of s_G; s_E has kSize

// The first frame of a request that cannot be delivered.
struct Failure {
  int64_t number = 0;
  Complaint complaint = nullptr;
};

void check_numbers(const char* op, const at::Tensor& numbers, const Shards& shards) {
  TORCH_CHECK(numbers.scalar_type() == at::kLong && numbers.is_contiguous(), op, ": numbers must be contiguous int64");
  const int64_t* number = numbers.const_data_ptr<int64_t>();
  TORCH_CHECK(std::all_of(number, number + numbers.numel(),
                          [&](int64_t n) { return 0 <= n && n < shards.num_frames(); }),
              op, ": numbers lie in 0..", shards.num_frames() - 1);
}

// gaitfast/data/chunk_store.py reads this message.
void complain(const char* op, const Failure& failure) {
  TORCH_CHECK(!failure.complaint, op, ": frame ", failure.number, ": ", failure.complaint);
}

// A row backwards, in words and then bytes.
inline void mirror(const uint8_t* row, int64_t width, uint8_t* out) {
  constexpr int64_t kWord = sizeof(uint64_t);
  int64_t x = 0;
  for (; x + kWord <= width; x += kWord) {
    uint64_t word;
    std::memcpy(&word, row + width - kWord - x, kWord);
    word = __builtin_bswap64(word);
    std::memcpy(out + x, &word, kWord);
  }
  for (; x < width; ++x) out[x] = row[width - 1 - x];
}

// Always inlined, so that where the width is known the copies are of a known size.
__attribute__((always_inline)) inline void cut_to(const uint8_t* frame, bool flip, int64_t width, uint8_t* out) {
  frame += (kSize - width) / 2;
  for (int64_t y = 0; y < kSize; ++y, frame += kSize, out += width) {
    if (flip) {
      mirror(frame, width, out);
    } else {
      std::memcpy(out, frame, width);
    }
  }
}

// The middle `width` columns of a frame, mirrored if `flip`.
void cut(const uint8_t* frame, bool flip, int64_t width, uint8_t* out) {
  if (width == kSize) {
    cut_to(frame, flip, kSize, out);
  } else if (width == kBackboneWidth) {
    cut_to(frame, flip, kBackboneWidth, out);
  } else {
    cut_to(frame, flip, width, out);
  }
}

struct Geometry {
  int64_t width;
  const double* matrix;
  const bool *warp, *flip;
};

// One thread's memory.
struct Scratch {
  Scratch(int64_t frames, const PartOps& ops) : decoded(frames * Warp::kStride + kSlack), parts(ops) {}
  std::vector<uint8_t> decoded;
  Warp warp;
  PartOps::Scratch parts;
};

Failure augment_clip(const Shards& shards, const int64_t* numbers, int64_t frames, const Geometry& geometry,
                     const PartOps& ops, int64_t i, Scratch& scratch, uint8_t* out) {
  const int64_t width = geometry.width, bytes = kSize * width;
  const bool warped = geometry.warp[i], flip = geometry.flip[i];
  for (int64_t t = 0; t < frames; ++t) {
    Chunk chunk;
    if (const Complaint complaint = shards.find(numbers[t], chunk)) return {numbers[t], complaint};
    uint8_t* const frame = scratch.decoded.data() + (warped ? t * Warp::kStride : 0);
    if (!inflate_block(chunk.data, chunk.data + chunk.size, frame, frame + kFrameBytes, frame + kFrameBytes + kSlack))
      return {numbers[t], "is not an LZ4 block of one frame"};
    if (!warped) cut(frame, flip, width, out + t * bytes);
  }
  if (warped) {
    scratch.warp.prepare(geometry.matrix + 9 * i, width);
    scratch.warp.run(scratch.decoded.data(), frames, out);
  }
  for (int64_t t = 0; t < frames; ++t) ops.run(scratch.parts, i, out + t * bytes);
  return {};
}

at::Tensor augment_clips(at::TensorList frames, at::TensorList offsets, at::TensorList sums, const at::Tensor& first,
                         const at::Tensor& numbers, int64_t width, const at::Tensor& matrix, const at::Tensor& warp,
                         const at::Tensor& flip, const at::Tensor& half_widths, const at::Tensor& dilate_rows,
                         const at::Tensor& blur_rows, int64_t threads) {
  constexpr const char* op = "augment_clips";
  const Shards shards(op, frames, offsets, sums, first);
  check_numbers(op, numbers, shards);
  TORCH_CHECK(numbers.dim() == 2, op, ": numbers must be int64 (B, T)");
  const int64_t clips = numbers.size(0), length = numbers.size(1);
  TORCH_CHECK(1 <= width && width <= kSize && width % 2 == 0, op, ": width is even and lies in 2..", kSize);
  TORCH_CHECK(matrix.scalar_type() == at::kDouble && matrix.sizes() == at::IntArrayRef({clips, 3, 3}) &&
                  matrix.is_contiguous(),
              op, ": matrix must be contiguous float64 (", clips, ", 3, 3)");
  for (const auto* drawn : {&warp, &flip})
    TORCH_CHECK(drawn->scalar_type() == at::kBool && drawn->sizes() == at::IntArrayRef({clips}) &&
                    drawn->is_contiguous(),
                op, ": warp and flip must be contiguous bool (", clips, ")");
  TORCH_CHECK(threads >= 1, op, ": threads must be positive, got ", threads);
  const PartOps ops(op, half_widths, dilate_rows, blur_rows, clips, kSize, width);
  const Geometry geometry{width, matrix.const_data_ptr<double>(), warp.const_data_ptr<bool>(),
                          flip.const_data_ptr<bool>()};

  at::Tensor result = recycled_bytes({clips, length, kSize, width});
  uint8_t* const out = result.mutable_data_ptr<uint8_t>();
  const int64_t* const number = numbers.const_data_ptr<int64_t>();
  std::vector<Failure> failures(clips);
  std::vector<std::unique_ptr<Scratch>> free;
  std::mutex guard;
  const auto task = [&](int64_t i) {
    std::unique_ptr<Scratch> scratch;
    {
      const std::lock_guard lock(guard);
      if (!free.empty()) {
        scratch = std::move(free.back());
        free.pop_back();
      }
    }
    if (!scratch) scratch = std::make_unique<Scratch>(length, ops);
    failures[i] = augment_clip(shards, number + i * length, length, geometry, ops, i, *scratch,
                               out + i * length * kSize * width);
    const std::lock_guard lock(guard);
    free.push_back(std::move(scratch));
  };
  retrieval::parallel(clips, task, threads);
  for (const Failure& failure : failures) complain(op, failure);  // the first in order, whatever thread came first
  return result;
}

std::tuple<at::Tensor, at::Tensor> gather_chunks(at::TensorList frames, at::TensorList offsets, at::TensorList sums,
                                                 const at::Tensor& first, const at::Tensor& numbers) {
  constexpr const char* op = "gather_chunks";
  const Shards shards(op, frames, offsets, sums, first);
  check_numbers(op, numbers, shards);
  const int64_t count = numbers.numel();
  const int64_t* const number = numbers.const_data_ptr<int64_t>();
  auto sizes = at::empty({count}, numbers.options());
  auto* const size = sizes.mutable_data_ptr<int64_t>();
  std::vector<Chunk> chunks(count);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    complain(op, {number[i], shards.find(number[i], chunks[i])});
    total += size[i] = chunks[i].size;
  }
  auto bytes = at::empty({total}, at::TensorOptions().dtype(at::kByte));
  auto* out = bytes.mutable_data_ptr<uint8_t>();
  for (const Chunk& chunk : chunks) {
    std::memcpy(out, chunk.data, chunk.size);
    out += chunk.size;
  }
  return {bytes, sizes};
}

}  // namespace

TORCH_LIBRARY_IMPL(gaitfast, CPU, m) {
  m.impl("augment_clips", augment_clips);
  m.impl("gather_chunks", gather_chunks);
}

}  // namespace gaitfast
