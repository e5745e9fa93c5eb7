// LZ4 blocks -> frames on the CPU, and the CRC-32 of the blocks. The bytes are hostile: no read leaves the block, no
// write leaves the frame, and a block that does not fill its frame exactly is an error.
// One thread a call: the loader calls from a thread of its own, beside the step's.
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "cpu/chunks.h"
#include "ops.h"

namespace gaitfast {
namespace {

// Copies move this many bytes at once, and may write up to as many too far where the frame has the room: what lies
// behind is written later anyway. A silhouette is some hundred short copies, so this is where the time goes.
constexpr int64_t kWide = 16;

// Adds the 255-terminated extension bytes to `length`. False when the block ends first.
inline bool extend(const uint8_t*& in, const uint8_t* in_end, int64_t& length) {
  uint8_t byte;
  do {
    if (in == in_end) return false;
    byte = *in++;
    length += byte;
  } while (byte == 255);
  return true;
}

inline void copy_literals(uint8_t* out, const uint8_t* out_end, const uint8_t* in, const uint8_t* in_end,
                          int64_t length) {
  if (length <= kWide && in_end - in >= kWide && out_end - out >= kWide) {
    std::memcpy(out, in, kWide);
  } else {
    std::memcpy(out, in, length);
  }
}

// Copies `length` bytes from `distance` bytes back; the ranges may overlap, which repeats the pattern between them.
inline void copy_match(uint8_t* out, const uint8_t* out_end, int64_t distance, int64_t length) {
  uint8_t* const end = out + length;
  const bool room = out_end - end >= kWide;
  if (distance == 1 && room) {
    uint8_t run[kWide];
    std::memset(run, out[-1], kWide);
    for (; out < end; out += kWide) std::memcpy(out, run, kWide);
  } else if (distance >= kWide && room) {
    for (; out < end; out += kWide) std::memcpy(out, out - distance, kWide);
  } else {
    const uint8_t* from = out - distance;
    while (out < end) {  // what can be copied without overlap doubles each time
      const int64_t step = std::min<int64_t>(end - out, out - from);
      std::memcpy(out, from, step);
      out += step;
    }
  }
}

}  // namespace

bool inflate_block(const uint8_t* in, const uint8_t* in_end, uint8_t* out, uint8_t* const out_end) {
  uint8_t* const out_begin = out;
  while (in < in_end) {
    const uint8_t token = *in++;
    int64_t literals = token >> 4;
    if (literals == 15 && !extend(in, in_end, literals)) return false;
    if (literals > in_end - in || literals > out_end - out) return false;
    copy_literals(out, out_end, in, in_end, literals);
    in += literals;
    out += literals;
    if (in == in_end) return out == out_end;  // the last sequence has literals only

    if (in_end - in < 2) return false;
    const int64_t distance = in[0] | (in[1] << 8);
    in += 2;
    int64_t length = token & 15;
    if (length == 15 && !extend(in, in_end, length)) return false;
    length += 4;
    if (distance == 0 || distance > out - out_begin || length > out_end - out) return false;
    copy_match(out, out_end, distance, length);
    out += length;
  }
  return false;  // an empty block, or one that ends with a match
}

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
                                    target + (row + 1) * frame_bytes);
    TORCH_CHECK(good, "inflate_frames: row ", row, " is not an LZ4 block of one frame");
  }
  return frames;
}

using Table = std::array<std::array<uint32_t, 256>, 8>;

// table[k][b]: the CRC (reflected 0xEDB88320, as in zlib) of byte b followed by k zero bytes.
constexpr Table crc_table() {
  Table table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xEDB88320u : 0u);
    table[0][byte] = crc;
  }
  for (int k = 1; k < 8; ++k)
    for (int byte = 0; byte < 256; ++byte)
      table[k][byte] = (table[k - 1][byte] >> 8) ^ table[0][table[k - 1][byte] & 255];
  return table;
}

constexpr Table kCrc = crc_table();

}  // namespace

uint32_t crc32(const uint8_t* in, int64_t size) {
  uint32_t crc = ~0u;
  for (; size >= 8; size -= 8, in += 8) {
    crc ^= uint32_t(in[0]) | uint32_t(in[1]) << 8 | uint32_t(in[2]) << 16 | uint32_t(in[3]) << 24;
    crc = kCrc[7][crc & 255] ^ kCrc[6][crc >> 8 & 255] ^ kCrc[5][crc >> 16 & 255] ^ kCrc[4][crc >> 24] ^
          kCrc[3][in[4]] ^ kCrc[2][in[5]] ^ kCrc[1][in[6]] ^ kCrc[0][in[7]];
  }
  for (; size > 0; --size, ++in) crc = (crc >> 8) ^ kCrc[0][(crc ^ *in) & 255];
  return ~crc;
}

namespace {

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
