// Compressed chunks of a packed dataset -> augmented clips.
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "buffers.h"
#include "bus_guard.h"
#include "chunks.h"
#include "part_ops.h"
#include "retrieval/workers.h"
#include "shards.h"
#include "warp.h"

namespace gaitfast {
namespace {

constexpr int64_t kSize = Warp::kSize;
constexpr int64_t kBackboneWidth = 44;  // columns of s_G; s_E has kSize

// The first row of a request that cannot be delivered.
struct Failure {
  int64_t row = 0;
  Problem problem = kSound;
};

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

Failure augment_clip(const Request& wanted, int64_t i, int64_t frames, const Geometry& geometry, const PartOps& ops,
                     Scratch& scratch, uint8_t* out) {
  const int64_t width = geometry.width, bytes = kSize * width;
  const bool warped = geometry.warp[i], flip = geometry.flip[i];
  uint8_t* const decoded = scratch.decoded.data();
  volatile int64_t t = 0, problem = kSound;  // volatile: read after the jump
  const bool sound = readable([&] {
    while (t < frames) {
      const Shard& shard = wanted.of(i * frames + t);
      const int64_t number = wanted.frame(i * frames + t);
      int64_t offset, size;
      if (!locate(shard, number, offset, size) || crc32(shard.data + offset, size) != uint32_t(shard.crc[number])) {
        problem = kChecksum;
        return;
      }
      const uint8_t* const block = shard.data + offset;
      uint8_t* const frame = decoded + (warped ? t * Warp::kStride : 0);
      if (!inflate_block(block, block + size, frame, frame + kFrameBytes, frame + kFrameBytes + kSlack)) {
        problem = kBlock;
        return;
      }
      if (!warped) cut(frame, flip, width, out + t * bytes);
      t = t + 1;
    }
  });
  if (!sound || problem != kSound) return {i * frames + t, sound ? Problem(int64_t(problem)) : kUnreadable};
  if (warped) {
    scratch.warp.prepare(geometry.matrix + 9 * i, width);
    scratch.warp.run(decoded, frames, out);
  }
  for (int64_t k = 0; k < frames; ++k) ops.run(scratch.parts, i, out + k * bytes);
  return {};
}

std::tuple<at::Tensor, at::Tensor> augment_clips(at::TensorList data, at::TensorList offsets, at::TensorList crc,
                                                 const at::Tensor& shards, const at::Tensor& numbers, int64_t width,
                                                 const at::Tensor& matrix, const at::Tensor& warp,
                                                 const at::Tensor& flip, const at::Tensor& half_widths,
                                                 const at::Tensor& dilate_rows, const at::Tensor& blur_rows,
                                                 int64_t threads) {
  constexpr const char* op = "augment_clips";
  const Request wanted = request(op, data, offsets, crc, shards, numbers);
  TORCH_CHECK(matrix.dim() == 3 && matrix.size(0) > 0 && wanted.rows() % matrix.size(0) == 0, op,
              ": numbers must be the same number of frames for each matrix");
  const int64_t clips = matrix.size(0), length = wanted.rows() / clips;
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
    failures[i] = augment_clip(wanted, i, length, geometry, ops, *scratch, out + i * length * kSize * width);
    const std::lock_guard lock(guard);
    free.push_back(std::move(scratch));
  };
  retrieval::parallel(clips, task, threads);
  // The first in order, whatever thread came first.
  const auto failed = std::find_if(failures.begin(), failures.end(), [](const Failure& f) { return f.problem; });
  const Failure first = failed == failures.end() ? Failure{} : *failed;
  return {result, verdict(first.row, first.problem)};
}

}  // namespace

TORCH_LIBRARY_IMPL(gaitfast, CPU, m) { m.impl("augment_clips", augment_clips); }

}  // namespace gaitfast
