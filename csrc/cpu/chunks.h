// One LZ4 block <-> one frame, and the CRC-32 of a block. Format:
// https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md
#pragma once

#include <cstdint>

namespace gaitfast {

constexpr int64_t kFrameBytes = 64 * 64;
constexpr int64_t kFrameWidth = 64;
constexpr int64_t kLargestBlock = kFrameBytes + kFrameBytes / 255 + 16;

// True when [in, in_end) is a well-formed block that yields exactly [out, out_end). Neither is left, whatever the bytes.
bool inflate_block(const uint8_t* in, const uint8_t* in_end, uint8_t* out, uint8_t* out_end);

// As in zlib: reflected, 0xEDB88320.
uint32_t crc32(const uint8_t* in, int64_t size);

}  // namespace gaitfast
