// RandomPartDilate and RandomPartBlur of one strip of rows, in place.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace gaitfast {

inline constexpr int64_t kReach = 2;  // a structuring element reaches this far from its centre
inline constexpr int64_t kRowsOfElement = 2 * kReach + 1;
inline constexpr uint16_t kThreshold = 816;  // 0.2 of full scale (255) times 16, the sum of the blur's integer weights

// Rows of a strip in working memory: kColumns wide and no narrower than the frame, so that loops over a row have a fixed
// length, with room for the neighbours at both ends.
inline constexpr int64_t kColumns = 64, kMargin = 16, kStride = kColumns + 2 * kMargin;

// Zero is neutral for the maximum, so what lies outside of the strip is zero and does not count.
class Dilation {
 public:
  Dilation(int64_t max_rows, int64_t width) : width_(width), strip_((max_rows + 2 * kReach) * kStride) {
    for (auto& plane : planes_) plane.resize((max_rows + 2 * kReach) * kColumns);
  }

  void run(uint8_t* strip, int64_t rows, const int64_t* half_widths) {
    uint8_t* const padded = strip_.data() + kReach * kStride + kMargin;
    for (int64_t y = 0; y < rows; ++y) std::copy_n(strip + y * width_, width_, padded + y * kStride);
    const uint8_t* from[kRowsOfElement];
    int64_t count = 0;
    for (int64_t dy = 0; dy < kRowsOfElement; ++dy)
      if (half_widths[dy] >= 0) from[count++] = plane(padded, rows, half_widths[dy]) + dy * kColumns;
    for (auto& made : made_) made = false;
    for (; count < kRowsOfElement; ++count) from[count] = from[0];
    uint8_t most[kColumns];
    for (int64_t y = 0; y < rows; ++y) {
      largest(from, y * kColumns, most);
      std::copy_n(most, width_, strip + y * width_);
    }
  }

 private:
  static uint8_t larger(uint8_t a, uint8_t b) { return a > b ? a : b; }

  static void largest(const uint8_t* const* from, int64_t at, uint8_t* __restrict__ out) {
    static_assert(kRowsOfElement == 5);
    const uint8_t *a = from[0] + at, *b = from[1] + at, *c = from[2] + at, *d = from[3] + at, *e = from[4] + at;
    for (int64_t x = 0; x < kColumns; ++x) out[x] = larger(larger(larger(a[x], b[x]), larger(c[x], d[x])), e[x]);
  }

  // The maxima over the columns -h..h around each pixel, kReach rows of zeros before and behind.
  const uint8_t* plane(const uint8_t* padded, int64_t rows, int64_t h) {
    uint8_t* const out = planes_[h].data();
    if (made_[h]) return out;
    made_[h] = true;
    std::fill_n(out, kReach * kColumns, 0);
    std::fill_n(out + (rows + kReach) * kColumns, kReach * kColumns, 0);
    for (int64_t y = 0; y < rows; ++y) spread(padded + y * kStride, h, out + (y + kReach) * kColumns);
    return out;
  }

  static void spread(const uint8_t* __restrict__ in, int64_t h, uint8_t* __restrict__ out) {
    if (h == 0) {
      std::copy_n(in, kColumns, out);
    } else if (h == 1) {
      for (int64_t x = 0; x < kColumns; ++x) out[x] = larger(larger(in[x - 1], in[x]), in[x + 1]);
    } else {
      for (int64_t x = 0; x < kColumns; ++x)
        out[x] = larger(larger(larger(in[x - 2], in[x - 1]), larger(in[x + 1], in[x + 2])), in[x]);
    }
  }

  bool made_[kReach + 1] = {};
  int64_t width_;
  std::vector<uint8_t> strip_, planes_[kReach + 1];
};

// The neighbour beyond the edge of a strip, mirrored without repeating the edge (OpenCV's BORDER_REFLECT_101).
inline int64_t mirrored(int64_t i, int64_t size) {
  if (size == 1) return 0;
  return i < 0 ? -i : i >= size ? 2 * size - 2 - i : i;
}

// 3x3 Gaussian (1 2 1) x (1 2 1) / 16, then 255 where it exceeds 0.2 of full scale and 0 elsewhere, in exact integers.
class Blur {
 public:
  Blur(int64_t max_rows, int64_t width) : width_(width), sums_(max_rows * kColumns) {}

  void run(uint8_t* strip, int64_t rows) {
    for (int64_t y = 0; y < rows; ++y) {
      const uint8_t* in = strip + y * width_;
      uint8_t row[kStride] = {};
      std::copy_n(in, width_, row + kMargin);
      row[kMargin - 1] = in[mirrored(-1, width_)];
      row[kMargin + width_] = in[mirrored(width_, width_)];
      along(row + kMargin, sums_.data() + y * kColumns);
    }
    for (int64_t y = 0; y < rows; ++y) {
      uint8_t out[kColumns];
      across(sums_.data() + mirrored(y - 1, rows) * kColumns, sums_.data() + y * kColumns,
             sums_.data() + mirrored(y + 1, rows) * kColumns, out);
      std::copy_n(out, width_, strip + y * width_);
    }
  }

 private:
  static void along(const uint8_t* __restrict__ row, uint16_t* __restrict__ sum) {
    for (int64_t x = 0; x < kColumns; ++x) sum[x] = static_cast<uint16_t>(row[x - 1] + 2 * row[x] + row[x + 1]);
  }

  static void across(const uint16_t* __restrict__ above, const uint16_t* __restrict__ here,
                     const uint16_t* __restrict__ below, uint8_t* __restrict__ out) {
    for (int64_t x = 0; x < kColumns; ++x) {
      const auto sum = static_cast<uint16_t>(above[x] + 2 * here[x] + below[x]);  // at most 16 x 255
      out[x] = sum > kThreshold ? 255 : 0;
    }
  }

  int64_t width_;
  std::vector<uint16_t> sums_;
};

// The part operations of B clips, checked: dilation of rows [first, last) by the element with these half widths per row
// (-1: none), then blur and threshold of rows [first, last). Equal bounds: the operation was not drawn.
class PartOps {
 public:
  PartOps(const char* op, const at::Tensor& half_widths, const at::Tensor& dilate_rows, const at::Tensor& blur_rows,
          int64_t clips, int64_t height, int64_t width)
      : element_(half_widths.contiguous()),
        dilate_(dilate_rows.contiguous()),
        blur_(blur_rows.contiguous()),
        height_(height),
        width_(width) {
    TORCH_CHECK(width <= kColumns, op, ": frames have at most ", kColumns, " columns, got ", width);
    check_rows(op, dilate_rows, clips, "dilate_rows");
    check_rows(op, blur_rows, clips, "blur_rows");
    TORCH_CHECK(half_widths.scalar_type() == at::kLong && half_widths.dim() == 2 && half_widths.size(0) == clips &&
                    half_widths.size(1) == kRowsOfElement,
                op, ": half_widths must be int64 (", clips, ", ", kRowsOfElement, ")");
    const int64_t* reach = element_.const_data_ptr<int64_t>();
    TORCH_CHECK(std::all_of(reach, reach + clips * kRowsOfElement, [](int64_t h) { return -1 <= h && h <= kReach; }),
                op, ": half widths lie in -1..", kReach);
  }

  // Memory that one thread works in.
  struct Scratch {
    explicit Scratch(const PartOps& ops) : dilation(ops.height_, ops.width_), blur(ops.height_, ops.width_) {}
    Dilation dilation;
    Blur blur;
  };

  // One frame (H, W) of clip `i`, in place.
  void run(Scratch& scratch, int64_t i, uint8_t* frame) const {
    const int64_t* dilated = dilate_.const_data_ptr<int64_t>() + 2 * i;
    const int64_t* blurred = blur_.const_data_ptr<int64_t>() + 2 * i;
    const int64_t* reach = element_.const_data_ptr<int64_t>() + kRowsOfElement * i;
    if (dilated[0] < dilated[1])
      scratch.dilation.run(frame + dilated[0] * width_, dilated[1] - dilated[0], reach);
    if (blurred[0] < blurred[1]) scratch.blur.run(frame + blurred[0] * width_, blurred[1] - blurred[0]);
  }

 private:
  void check_rows(const char* op, const at::Tensor& rows, int64_t clips, const char* name) const {
    TORCH_CHECK(rows.scalar_type() == at::kLong && rows.dim() == 2 && rows.size(0) == clips && rows.size(1) == 2, op,
                ": ", name, " must be int64 (", clips, ", 2)");
    const auto row = rows.accessor<int64_t, 2>();
    for (int64_t i = 0; i < clips; ++i)
      TORCH_CHECK(0 <= row[i][0] && row[i][0] <= row[i][1] && row[i][1] <= height_, op, ": ", name, "[", i,
                  "] must satisfy 0 <= first <= last <= ", height_);
  }

  at::Tensor element_, dilate_, blur_;
  int64_t height_, width_;
};

}  // namespace gaitfast
