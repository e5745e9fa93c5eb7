// RandomPartDilate and RandomPartBlur on the CPU, in place: DALI has no dilation there, and the blur comes behind it.
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace gaitfast {
namespace {

constexpr int64_t kReach = 2;  // a structuring element reaches this far from its centre
constexpr int64_t kRowsOfElement = 2 * kReach + 1;
constexpr int kThreshold = 816;  // 0.2 of full scale (255) times 16, the sum of the blur's integer weights

// Maxima over the 1, 3 and 5 columns around each pixel, for all rows of a strip, with kReach rows of zeros above and
// below: zero is neutral, so what lies outside of the strip does not count.
class Dilation {
 public:
  Dilation(int64_t max_rows, int64_t width) : width_(width), padded_(width + 2 * kReach) {
    row_.resize(padded_);
    for (auto& plane : planes_) plane.resize((max_rows + 2 * kReach) * width);
  }

  void run(uint8_t* strip, int64_t rows, const int64_t* half_widths) {
    for (auto& plane : planes_) {
      std::fill_n(plane.begin(), kReach * width_, 0);
      std::fill_n(plane.begin() + (rows + kReach) * width_, kReach * width_, 0);
    }
    for (int64_t y = 0; y < rows; ++y) spread(strip + y * width_, y + kReach);
    for (int64_t y = 0; y < rows; ++y) {
      uint8_t* out = strip + y * width_;
      std::fill_n(out, width_, 0);
      for (int64_t dy = 0; dy < kRowsOfElement; ++dy) {
        if (half_widths[dy] < 0) continue;
        const uint8_t* in = planes_[half_widths[dy]].data() + (y + dy) * width_;
        for (int64_t x = 0; x < width_; ++x) out[x] = std::max(out[x], in[x]);
      }
    }
  }

 private:
  void spread(const uint8_t* in, int64_t y) {
    std::copy_n(in, width_, row_.begin() + kReach);  // row_ keeps its zeros at both ends
    const uint8_t* p = row_.data();
    uint8_t* reach[] = {planes_[0].data() + y * width_, planes_[1].data() + y * width_, planes_[2].data() + y * width_};
    for (int64_t x = 0; x < width_; ++x) {
      reach[0][x] = p[x + 2];
      reach[1][x] = std::max({p[x + 1], p[x + 2], p[x + 3]});
      reach[2][x] = std::max({p[x], reach[1][x], p[x + 4]});
    }
  }

  int64_t width_, padded_;
  std::vector<uint8_t> row_, planes_[kReach + 1];
};

// The neighbour beyond the edge of a strip, mirrored without repeating the edge (OpenCV's BORDER_REFLECT_101).
inline int64_t mirrored(int64_t i, int64_t size) {
  if (size == 1) return 0;
  return i < 0 ? -i : i >= size ? 2 * size - 2 - i : i;
}

// 3x3 Gaussian (1 2 1) x (1 2 1) / 16, then 255 where it exceeds 0.2 of full scale and 0 elsewhere, in exact integers.
class Blur {
 public:
  Blur(int64_t max_rows, int64_t width) : width_(width), sums_(max_rows * width), row_(width + 2) {}

  void run(uint8_t* strip, int64_t rows) {
    for (int64_t y = 0; y < rows; ++y) {
      const uint8_t* in = strip + y * width_;
      std::copy_n(in, width_, row_.begin() + 1);
      row_[0] = in[mirrored(-1, width_)];
      row_[width_ + 1] = in[mirrored(width_, width_)];
      uint16_t* sum = sums_.data() + y * width_;
      for (int64_t x = 0; x < width_; ++x) sum[x] = row_[x] + 2 * row_[x + 1] + row_[x + 2];
    }
    for (int64_t y = 0; y < rows; ++y) {
      const uint16_t* above = sums_.data() + mirrored(y - 1, rows) * width_;
      const uint16_t* here = sums_.data() + y * width_;
      const uint16_t* below = sums_.data() + mirrored(y + 1, rows) * width_;
      uint8_t* out = strip + y * width_;
      for (int64_t x = 0; x < width_; ++x) out[x] = above[x] + 2 * here[x] + below[x] > kThreshold ? 255 : 0;
    }
  }

 private:
  int64_t width_;
  std::vector<uint16_t> sums_;
  std::vector<uint8_t> row_;
};

void check_rows(const at::Tensor& rows, int64_t clips, int64_t height, const char* name) {
  TORCH_CHECK(rows.scalar_type() == at::kLong && rows.dim() == 2 && rows.size(0) == clips && rows.size(1) == 2,
              "part_ops_: ", name, " must be int64 (", clips, ", 2)");
  const auto row = rows.accessor<int64_t, 2>();
  for (int64_t i = 0; i < clips; ++i)
    TORCH_CHECK(0 <= row[i][0] && row[i][0] <= row[i][1] && row[i][1] <= height, "part_ops_: ", name, "[", i,
                "] must satisfy 0 <= first <= last <= ", height);
}

// clips uint8 (B, T, H, W), changed in place: dilation of rows [first, last) by the element with these half widths per
// row (-1: none), then blur and threshold of rows [first, last). Equal bounds: the operation was not drawn.
void part_ops_(at::Tensor& clips, const at::Tensor& half_widths, const at::Tensor& dilate_rows,
               const at::Tensor& blur_rows) {
  TORCH_CHECK(clips.scalar_type() == at::kByte && clips.dim() == 4 && clips.is_contiguous(),
              "part_ops_: clips must be contiguous uint8 (B, T, H, W)");
  const int64_t count = clips.size(0), frames = clips.size(1), height = clips.size(2), width = clips.size(3);
  check_rows(dilate_rows, count, height, "dilate_rows");
  check_rows(blur_rows, count, height, "blur_rows");
  TORCH_CHECK(half_widths.scalar_type() == at::kLong && half_widths.dim() == 2 && half_widths.size(0) == count &&
                  half_widths.size(1) == kRowsOfElement,
              "part_ops_: half_widths must be int64 (", count, ", ", kRowsOfElement, ")");
  const auto element = half_widths.contiguous(), dilate = dilate_rows.contiguous(), blur = blur_rows.contiguous();
  const int64_t* reach = element.const_data_ptr<int64_t>();
  TORCH_CHECK(std::all_of(reach, reach + count * kRowsOfElement, [](int64_t h) { return -1 <= h && h <= kReach; }),
              "part_ops_: half widths lie in -1..", kReach);

  Dilation dilation(height, width);
  Blur blurring(height, width);
  uint8_t* data = clips.mutable_data_ptr<uint8_t>();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* strip = dilate.const_data_ptr<int64_t>() + 2 * i;
    const int64_t* blurred = blur.const_data_ptr<int64_t>() + 2 * i;
    for (int64_t t = 0; t < frames; ++t) {
      uint8_t* frame = data + (i * frames + t) * height * width;
      if (strip[0] < strip[1])
        dilation.run(frame + strip[0] * width, strip[1] - strip[0], reach + i * kRowsOfElement);
      if (blurred[0] < blurred[1]) blurring.run(frame + blurred[0] * width, blurred[1] - blurred[0]);
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(gaitfast, CPU, m) { m.impl("part_ops_", part_ops_); }

}  // namespace gaitfast
