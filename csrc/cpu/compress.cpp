// Frames -> LZ4 blocks. Made for silhouettes: where a run goes on (distance 1) and how far a row equals the one above
// (distance 64) is read off bit masks; other matches come from a small hash table that leaves runs out. On silhouettes
// a twentieth smaller than LZ4's level 3, in two thirds of its time. What comes out depends on the frame alone.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "cpu/chunks.h"

namespace gaitfast {
namespace {

constexpr int kBytes = kFrameBytes;
constexpr int kShortest = 4;                // of a match
constexpr int kLastStart = kBytes - 12;     // the format: no match starts later,
constexpr int kLastEnd = kBytes - 5;        // and the last bytes are literals
constexpr int kDepth = 4;                   // places that are looked up for one hash
constexpr int kLong = 64;                   // a match of this length is taken without looking for a better one
constexpr int kHashBits = 12;
constexpr uint16_t kNone = 0xFFFF;
constexpr std::array<int, 2> kDistances = {1, int(kFrameWidth)};

template <typename T>
inline T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline int hash(uint32_t bytes) { return int((bytes * 2654435761u) >> (32 - kHashBits)); }

// How many bytes from `a` and from `b` on are equal, up to `end` of b.
inline int common(const uint8_t* a, const uint8_t* b, const uint8_t* end) {
  const uint8_t* const start = b;
  for (; b + 8 <= end; a += 8, b += 8)
    if (const uint64_t differ = load<uint64_t>(a) ^ load<uint64_t>(b)) return int(b - start) + std::countr_zero(differ) / 8;
  while (b < end && *a == *b) ++a, ++b;
  return int(b - start);
}

struct Match {
  int length, distance;
};

class Encoder {
 public:
  // The block of `frame` (kBytes), at most kLargestBlock bytes, at `out`; returns its end.
  uint8_t* encode(const uint8_t* frame, uint8_t* out) {
    frame_ = frame;
    inserted_ = 0;
    head_.fill(kNone);
    for (size_t k = 0; k < kDistances.size(); ++k) compare(kDistances[k], equal_[k]);
    int written = 0, at = 0;  // [0, written) is in the block
    while (at <= kLastStart) {
      Match match = best(at);
      if (match.length < kShortest) {
        ++at;
        continue;
      }
      while (at < kLastStart && match.length < kLong) {  // a literal more may buy a longer match
        const Match next = best(at + 1);
        if (next.length <= match.length) break;
        match = next;
        ++at;
      }
      for (; at > written && at > match.distance && frame[at - 1] == frame[at - 1 - match.distance]; --at) ++match.length;
      out = sequence(out, frame + written, at - written, match);
      written = at += match.length;
    }
    return sequence(out, frame + written, kBytes - written, {0, 0});
  }

 private:
  using Mask = std::array<uint64_t, kBytes / 64>;

  // Bit i: byte i equals the one `distance` before it.
  void compare(int distance, Mask& mask) const {
    for (int word = 0; word < kBytes / 64; ++word) {
      uint64_t bits = 0;
      for (int byte = 0; byte < 64; byte += 8) {
        const int at = word * 64 + byte;
        uint64_t equal = 0;  // 0x80 in the bytes that are equal
        if (at >= distance) {
          const uint64_t differ = load<uint64_t>(frame_ + at) ^ load<uint64_t>(frame_ + at - distance);
          constexpr uint64_t low = 0x7F7F7F7F7F7F7F7F;
          equal = ~(((differ & low) + low) | differ | low);
        } else {
          for (int i = std::max(at, distance); i < at + 8; ++i)
            if (frame_[i] == frame_[i - distance]) equal |= uint64_t(0x80) << 8 * (i - at);
        }
        bits |= ((equal >> 7) * 0x0102040810204080 >> 56) << byte;
      }
      mask[word] = bits;
    }
  }

  // Ones from bit `at` on.
  static int run(const Mask& mask, int at) {
    int word = at / 64;
    const int bit = at % 64;
    int ones = std::countr_one(mask[word] >> bit);
    if (bit + ones < 64) return ones;
    while (++word < int(mask.size())) {
      const int more = std::countr_one(mask[word]);
      ones += more;
      if (more < 64) break;
    }
    return ones;
  }

  // Places before `end` enter the table, except within a run.
  void insert(int end) {
    for (; inserted_ < end; ++inserted_) {
      const uint32_t bytes = load<uint32_t>(frame_ + inserted_);
      if (inserted_ > 0 && bytes == load<uint32_t>(frame_ + inserted_ - 1)) continue;
      const int slot = hash(bytes);
      before_[inserted_] = head_[slot];
      head_[slot] = uint16_t(inserted_);
    }
  }

  Match best(int at) {
    Match found{0, 0};
    for (size_t k = 0; k < kDistances.size(); ++k) {
      const int length = run(equal_[k], at);
      if (length > found.length) found = {length, kDistances[k]};
    }
    if (found.length < kLong) {
      insert(at);
      uint16_t place = head_[hash(load<uint32_t>(frame_ + at))];
      for (int tried = 0; tried < kDepth && place != kNone && at + found.length < kLastEnd;
           ++tried, place = before_[place]) {
        // Only a match that goes on where the best one ends can be longer.
        if (frame_[place + found.length] != frame_[at + found.length]) continue;
        const int length = common(frame_ + place, frame_ + at, frame_ + kLastEnd);
        if (length > found.length) found = {length, at - place};
      }
    }
    found.length = std::min(found.length, kLastEnd - at);
    return found;
  }

  static uint8_t* extension(uint8_t* out, int rest) {
    for (; rest >= 255; rest -= 255) *out++ = 255;
    *out++ = uint8_t(rest);
    return out;
  }

  // Literals, then a match unless it has no length (the last sequence of a block).
  static uint8_t* sequence(uint8_t* out, const uint8_t* literals, int count, Match match) {
    uint8_t* const token = out++;
    *token = uint8_t(std::min(count, 15) << 4);
    if (count >= 15) out = extension(out, count - 15);
    std::memcpy(out, literals, count);
    out += count;
    if (match.length == 0) return out;
    *out++ = uint8_t(match.distance);
    *out++ = uint8_t(match.distance >> 8);
    const int rest = match.length - kShortest;
    *token |= uint8_t(std::min(rest, 15));
    return rest >= 15 ? extension(out, rest - 15) : out;
  }

  const uint8_t* frame_ = nullptr;
  int inserted_ = 0;
  std::array<Mask, kDistances.size()> equal_;
  std::array<uint16_t, 1 << kHashBits> head_;
  std::array<uint16_t, kBytes> before_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> compress_frames(const at::Tensor& frames) {
  TORCH_CHECK(frames.dim() == 2 && frames.size(1) == kBytes && frames.scalar_type() == at::kByte,
              "compress_frames: frames must be uint8 (n, ", kBytes, ")");
  const auto source = frames.contiguous();
  const int64_t rows = source.size(0);
  auto bytes = at::empty({rows * kLargestBlock}, source.options());
  auto sizes = at::empty({rows}, at::kLong), sums = at::empty({rows}, at::kLong);
  uint8_t *const begin = bytes.mutable_data_ptr<uint8_t>(), *out = begin;
  Encoder encoder;
  for (int64_t row = 0; row < rows; ++row) {
    uint8_t* const block = out;
    out = encoder.encode(source.const_data_ptr<uint8_t>() + row * kBytes, block);
    sizes.mutable_data_ptr<int64_t>()[row] = out - block;
    sums.mutable_data_ptr<int64_t>()[row] = crc32(block, out - block);
  }
  return {bytes.narrow(0, 0, out - begin), sizes, sums};
}

}  // namespace

TORCH_LIBRARY_IMPL(gaitfast, CPU, m) { m.impl("compress_frames", compress_frames); }

}  // namespace gaitfast
