// One homography over the frames of a clip, bilinear, black outside; the frames lie side by side in the lanes of a vector.
//
// All frames of a clip share the homography, so where a pixel comes from and the weights of its four neighbours are found
// once per clip, and one product serves as many frames as a register has lanes. In whole numbers: the same bytes whatever
// the instructions.
#pragma once

#include <cstdint>
#include <vector>

namespace gaitfast {

class Warp {
 public:
  static constexpr int64_t kSize = 64;  // rows and columns of a stored frame

  Warp();

  // Sets the homography, output pixel -> input pixel (row-major 3 x 3), for output of `width` columns.
  void prepare(const double* matrix, int64_t width);

  // Bytes from one frame of the input to the next. Not 4,096: frames at that distance share their places in the first cache.
  static constexpr int64_t kStride = kSize * kSize + 64;

  // frames (count, 64, 64), kStride apart -> out (count, 64, width).
  //
  // Weights are whole multiples of 2^-16 that sum to 1 - 2^-16, and each product is cut at 2^-8 grey levels. So a value
  // is off by less than 0.02 grey levels before it is rounded, and a pixel that falls on an input pixel is copied exactly.
  void run(const uint8_t* frames, int64_t count, uint8_t* out);

 private:
  struct Weights {
    uint16_t here, right, below, diagonal;
  };
  void find_black(const uint8_t* frames, int64_t count);
  void transpose_in(const uint8_t* frames, int64_t count);
  void transpose_out(int64_t count, uint8_t* out) const;

  int64_t width_ = kSize;
  std::vector<uint16_t> lanes_;   // (66, 66, kLanes): pixels times 256, with a border of zeros
  std::vector<uint8_t> canvas_;   // (66, 66): whether a pixel or its neighbour right, below or diagonal is not always black
  std::vector<uint8_t> result_;   // (64, width, kLanes)
  std::vector<int32_t> base_;     // (64, width): the upper left neighbour in the canvas of 66 x 66
  std::vector<Weights> weights_;  // (64, width)
};

}  // namespace gaitfast
