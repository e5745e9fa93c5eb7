// Moving rows of bfloat16 into the two orders in which a tile unit reads the operands of a product over rows.
#pragma once

#include <cstdint>

#include "../retrieval/simd.h"

#if GAITFAST_X86
#include <immintrin.h>

namespace gaitfast::convolution {

#define GAITFAST_TARGET_ROWS __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))

// out[2 i] = a[i], out[2 i + 1] = b[i]: two consecutive rows of the right operand.
GAITFAST_TARGET_ROWS GAITFAST_INLINE void interleave(const uint16_t* a, const uint16_t* b, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i)));
    _mm512_storeu_si512(out + 2 * i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  if (i < n) {
    const __mmask16 known = (1u << (n - i)) - 1;
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(known, a + i));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(known, b + i));
    _mm512_mask_storeu_epi32(out + 2 * i, known, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

// 16 x 16 words of 32 bits, rows to columns.
GAITFAST_TARGET_ROWS inline void transpose_words(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) {
      t[8 * half + i] = _mm512_shuffle_i32x4(r[8 * half + i], r[8 * half + 4 + i], 0x88);
      t[8 * half + 4 + i] = _mm512_shuffle_i32x4(r[8 * half + i], r[8 * half + 4 + i], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}

// Rows (rows, width) -> out (width, stride), columns [0, padded) of it written: zero where there is no row.
// padded: a multiple of 32, at least rows.
GAITFAST_TARGET_ROWS inline void transpose_rows(
    const uint16_t* x, int64_t rows, int64_t width, int64_t padded, int64_t stride, uint16_t* out) {
  for (int64_t row = 0; row < padded; row += 32) {
    for (int64_t column = 0; column < width; column += 16) {
      const int64_t columns = width - column < 16 ? width - column : 16;
      const __mmask16 known = columns < 16 ? (1u << columns) - 1 : 0xffff;
      __m512i words[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t even = row + 2 * i;
        const uint16_t* from = x + even * width + column;
        const __mmask16 low = even < rows ? known : 0, high = even + 1 < rows ? known : 0;
        words[i] = _mm512_or_si512(
            _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(low, from)),
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high, from + width)), 16));
      }
      transpose_words(words);
      for (int64_t i = 0; i < columns; ++i) _mm512_storeu_si512(out + (column + i) * stride + row, words[i]);
    }
  }
}

// The sum of n values, n a multiple of 32, in float32.
GAITFAST_TARGET_ROWS inline float sum_row(const uint16_t* x, int64_t n) {
  __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 32) {
    const __m512i pairs = _mm512_loadu_si512(x + i);
    even = _mm512_add_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
    odd = _mm512_add_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536))));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
}

}  // namespace gaitfast::convolution
#endif
