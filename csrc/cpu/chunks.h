// One compressed frame: its LZ4 block, and the CRC-32 of the block. The bytes are hostile: no read leaves the block, no
// write leaves the frame, and a block that does not fill its frame exactly is an error.
// Format: https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace gaitfast {

inline constexpr int64_t kFrameWidth = 64, kFrameBytes = 64 * 64;
inline constexpr int64_t kLargestBlock = kFrameBytes + kFrameBytes / 255 + 16;

// Copies of literals move this many bytes at once, copies of matches kRowBytes, and both may write as many too far where
// there is room: what lies behind is written later anyway. A silhouette is a hundred short copies, and branches that cannot
// be foreseen cost the most: so lengths are not told apart (0.78 us a frame; 1.00 with loops of the exact length).
inline constexpr int64_t kWide = 16, kRowBytes = 64;

// Memory that should lie behind a frame, or behind the last of several, for the fast copies to serve its last row too.
inline constexpr int64_t kSlack = 2 * kRowBytes;

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

// Copies `length` bytes from `distance` bytes back; the ranges may overlap, which repeats the pattern between them.
inline void copy_match(uint8_t* out, int64_t distance, int64_t length) {
  uint8_t* const end = out + length;
  const uint8_t* const from = out - distance;
  while (out < end) {  // what can be copied without overlap doubles each time
    const int64_t step = std::min<int64_t>(end - out, out - from);
    std::memcpy(out, from, step);
    out += step;
  }
}

// `length` bytes from `distance` bytes back, where the distance is 1 or at least kWide; in steps of kRowBytes.
inline void copy_usual(uint8_t* out, int64_t distance, int64_t length) {
  const uint8_t* const end = out + length;
  if (distance == 1) {
    uint8_t run[kWide];
    std::memset(run, out[-1], kWide);
    for (; out < end; out += kRowBytes)
      for (int64_t k = 0; k < kRowBytes; k += kWide) std::memcpy(out + k, run, kWide);
  } else {
    for (; out < end; out += kRowBytes)
      for (int64_t k = 0; k < kRowBytes; k += kWide) std::memcpy(out + k, out + k - distance, kWide);
  }
}

// Sequences of a block, as long as they are the usual ones and there is room; `in` and `out` then stand before the first
// that is not. Reads stay within [in, in_end), writes within [out, cap).
inline void inflate_usual(const uint8_t*& in_, const uint8_t* const in_end, uint8_t* const out_begin, uint8_t*& out_,
                          uint8_t* const out_end, uint8_t* const cap) {
  const uint8_t* in = in_;
  uint8_t* out = out_;
  while (in_end - in >= 1 + kWide + 3 && cap - out >= kWide) {
    const int64_t token = *in, literals = token >> 4;
    if (literals == 15) break;
    std::memcpy(out, in + 1, kWide);
    const uint8_t* const next = in + 1 + literals;
    uint8_t* const to = out + literals;
    const int64_t distance = next[0] | (next[1] << 8);
    const int64_t longer = (token & 15) == 15, more = next[2] & -longer;
    const int64_t length = (token & 15) + 4 + more;
    if (more == 255 || distance > to - out_begin || length > out_end - to || cap - to < length + kRowBytes) break;
    if (distance != 1 && distance < kWide) break;
    copy_usual(to, distance, length);
    in = next + 2 + longer;
    out = to + length;
  }
  in_ = in;
  out_ = out;
}

// True when [in, in_end) is a well-formed block that yields exactly [out, out_end). Up to `cap`, which is not before out_end,
// memory may be written.
inline bool inflate_block(const uint8_t* in, const uint8_t* in_end, uint8_t* out, uint8_t* const out_end,
                          uint8_t* const cap) {
  uint8_t* const out_begin = out;
  while (in < in_end) {
    inflate_usual(in, in_end, out_begin, out, out_end, cap);
    const uint8_t token = *in++;
    int64_t literals = token >> 4;
    if (literals == 15 && !extend(in, in_end, literals)) return false;
    if (literals > in_end - in || literals > out_end - out) return false;
    std::memcpy(out, in, literals);
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
    copy_match(out, distance, length);
    out += length;
  }
  return false;  // an empty block, or one that ends with a match
}

inline bool inflate_block(const uint8_t* in, const uint8_t* in_end, uint8_t* out, uint8_t* out_end) {
  return inflate_block(in, in_end, out, out_end, out_end);
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

inline constexpr Table kCrc = crc_table();

// `crc`: the register after the bytes before, ~0 at the start of a message; the CRC is its complement at the end.
inline uint32_t crc32_by_table(uint32_t crc, const uint8_t* in, int64_t size) {
  for (; size >= 8; size -= 8, in += 8) {
    crc ^= uint32_t(in[0]) | uint32_t(in[1]) << 8 | uint32_t(in[2]) << 16 | uint32_t(in[3]) << 24;
    crc = kCrc[7][crc & 255] ^ kCrc[6][crc >> 8 & 255] ^ kCrc[5][crc >> 16 & 255] ^ kCrc[4][crc >> 24] ^
          kCrc[3][in[4]] ^ kCrc[2][in[5]] ^ kCrc[1][in[6]] ^ kCrc[0][in[7]];
  }
  for (; size > 0; --size, ++in) crc = (crc >> 8) ^ kCrc[0][(crc ^ *in) & 255];
  return crc;
}

#if defined(__x86_64__) && defined(__GNUC__)
// A message whose first 64 bytes are four lanes of 16, each folded onto the next 64 bytes by a carry-less product with
// x^(8 * 64) (twice: for the two halves) modulo the polynomial; what is left is congruent to the message and short.
// Source: Gopal et al., "Fast CRC computation for generic polynomials using PCLMULQDQ instruction", Intel 2009.
__attribute__((target("pclmul,sse2"))) inline __m128i fold(__m128i lane, __m128i keys, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(lane, keys, 0x00), high = _mm_clmulepi64_si128(lane, keys, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

__attribute__((target("pclmul,sse2"))) inline uint32_t crc32_by_folding(const uint8_t* in, int64_t size) {
  const auto load = [](const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
  const __m128i by_64 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4), by_16 = _mm_set_epi64x(0xccaa009e, 0x1751997d0);
  __m128i a = _mm_xor_si128(load(in), _mm_cvtsi32_si128(-1)), b = load(in + 16), c = load(in + 32), d = load(in + 48);
  for (in += 64, size -= 64; size >= 64; in += 64, size -= 64) {
    a = fold(a, by_64, load(in));
    b = fold(b, by_64, load(in + 16));
    c = fold(c, by_64, load(in + 32));
    d = fold(d, by_64, load(in + 48));
  }
  a = fold(fold(fold(a, by_16, b), by_16, c), by_16, d);
  for (; size >= 16; in += 16, size -= 16) a = fold(a, by_16, load(in));
  uint8_t rest[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), a);
  return ~crc32_by_table(crc32_by_table(0, rest, 16), in, size);
}
#endif

inline uint32_t crc32(const uint8_t* in, int64_t size) {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool folds = __builtin_cpu_supports("pclmul");
  if (folds && size >= 64) return crc32_by_folding(in, size);
#endif
  return ~crc32_by_table(~0u, in, size);
}

}  // namespace gaitfast
