// The gradient of a convolution's weight: a product over all sites of all frames, patches gathered on the way.
//
// gradient[m, n, ky, kx] = sum over rows r of left[r, m] * right[site(r) * stride - padding + (ky, kx), n]. `left` is
// turned (m, r) once; 128 columns of patches at a time come into a block in the second cache, in the order in which the
// tile unit reads them, and their product with `left` into float32. The rows fall into parts whatever the number of
// threads, and the parts are added in order: the same bits on any number of threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "rows.h"

namespace gaitfast::convolution {
namespace {

#if GAITFAST_X86 && defined(CPUBLAS_BRGEMM_BF16BF16F32)
constexpr bool kBuilt = true;
#else
constexpr bool kBuilt = false;
#endif

bool available() {
  if (!kBuilt || retrieval::simd() < retrieval::Simd::avx512) return false;
  return at::native::cpublas::could_pack(at::kBFloat16);
}

#if GAITFAST_X86 && defined(CPUBLAS_BRGEMM_BF16BF16F32)

constexpr int64_t kChunk = 2048;      // most rows of a product
constexpr int64_t kColumns = 128;     // columns of a product: a call costs as much as a sixth of one of 64
constexpr int64_t kLeastRows = 480;   // rows that are worth a sum of their own
constexpr int64_t kMostParts = 8;
constexpr int32_t kFar = 1 << 20;  // beyond every grid: where rows that do not exist have their patch

int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Sites {
  int64_t frames, height, width;              // of left: the sites that are summed over
  int64_t right_height, right_width, channels;  // of right
  int64_t kernel, stride, padding;

  int64_t rows() const { return frames * height * width; }
  int64_t columns() const { return kernel * kernel * channels; }
};

// Where the patches of one chunk of rows begin.
struct Corner {
  int64_t first;  // its element in right, were the grid larger
  int32_t y, x;
};

// What one part reads and writes besides its own memory.
struct Operands {
  const uint16_t* left;
  const uint16_t* right;
  int64_t width;    // channels of left
  float* total;     // (width, columns)
  float* sums;      // (width)
};

// Where each row's patch has its tap: zeros outside of the frame and for rows beyond the last.
GAITFAST_TARGET_ROWS void locate(
    const Sites& sites, const uint16_t* right, const uint16_t* zeros, const Corner* corners, int64_t rows, int64_t tap,
    const uint16_t** out) {
  const int32_t dy = tap / sites.kernel, dx = tap % sites.kernel;
  const int32_t height = sites.right_height, width = sites.right_width;
  const int64_t ahead = (dy * width + dx) * sites.channels;
  for (int64_t i = 0; i < rows; ++i) {
    const uint32_t y = corners[i].y + dy, x = corners[i].x + dx;  // outside: negative, so large
    const bool inside = (y < static_cast<uint32_t>(height)) & (x < static_cast<uint32_t>(width));
    out[i] = inside ? right + corners[i].first + ahead : zeros;
  }
}

// Channels [channel, channel + count) of `rows` rows as pairs of rows, (pair, columns, 2) from `out` on.
GAITFAST_TARGET_ROWS void pair_up(
    const uint16_t* const* from, int64_t rows, int64_t channel, int64_t count, uint16_t* out, int64_t columns) {
  for (int64_t i = 0; i < rows; i += 2) interleave(from[i] + channel, from[i + 1] + channel, count, out + i * columns);
}

// The sum over rows [begin, end) of left.
void sum_part(const Sites& sites, const Operands& given, int64_t begin, int64_t end, int64_t chunk) {
  const int64_t rows = end - begin, chunks = (rows + chunk - 1) / chunk, padded = chunks * chunk;
  const int64_t stride = padded + 32;  // a power of two would put all rows of a tile into the same lines of the cache
  const auto turned_memory = at::empty({given.width * stride}, at::kBFloat16);
  const auto block_memory = at::empty({chunk * std::min(kColumns, sites.columns())}, at::kBFloat16);
  const std::vector<uint16_t> zeros(sites.channels, 0);
  auto* turned = static_cast<uint16_t*>(turned_memory.data_ptr());
  auto* block = static_cast<uint16_t*>(block_memory.data_ptr());
  transpose_rows(given.left + begin * given.width, rows, given.width, padded, stride, turned);
  for (int64_t m = 0; m < given.width; ++m) given.sums[m] = sum_row(turned + m * stride, padded);

  std::vector<Corner> corners(padded, Corner{0, -kFar, 0});
  std::vector<const uint16_t*> places(chunk);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t area = sites.height * sites.width, site = (begin + r) % area;
    const int64_t y = site / sites.width * sites.stride - sites.padding;
    const int64_t x = site % sites.width * sites.stride - sites.padding;
    const int64_t place = ((begin + r) / area * sites.right_height + y) * sites.right_width + x;
    corners[r] = {place * sites.channels, static_cast<int32_t>(y), static_cast<int32_t>(x)};
  }
  for (int64_t first = 0; first < sites.columns(); first += kColumns) {
    const int64_t count = std::min(kColumns, sites.columns() - first);
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t column = first; column < first + count;) {
        const int64_t tap = column / sites.channels, channel = column % sites.channels;
        const int64_t take = std::min(sites.channels - channel, first + count - column);
        locate(sites, given.right, zeros.data(), corners.data() + c * chunk, chunk, tap, places.data());
        pair_up(places.data(), chunk, channel, take, block + 2 * (column - first), count);
        column += take;
      }
      at::native::cpublas::brgemm(
          given.width, count, chunk, stride, count, sites.columns(), c > 0,
          reinterpret_cast<const at::BFloat16*>(turned + c * chunk), reinterpret_cast<const at::BFloat16*>(block),
          given.total + first);
    }
  }
  at::native::cpublas::brgemm_release();
}

std::tuple<at::Tensor, at::Tensor> weight_gradient(
    const at::Tensor& left, const at::Tensor& right, int64_t kernel, int64_t stride, int64_t padding) {
  for (const auto* x : {&left, &right}) {
    TORCH_CHECK(x->dim() == 4 && x->scalar_type() == at::kBFloat16, "weight_gradient: bfloat16 (F, H, W, C) wanted");
    TORCH_CHECK(x->is_contiguous(), "weight_gradient: contiguous input wanted");
  }
  const Sites sites{left.size(0), left.size(1), left.size(2), right.size(1), right.size(2),
                    right.size(3), kernel, stride, padding};
  TORCH_CHECK(right.size(0) == sites.frames, "weight_gradient: as many frames left as right wanted");
  TORCH_CHECK(kernel > 0 && stride > 0 && padding >= 0, "weight_gradient: kernel, stride or padding out of range");
  TORCH_CHECK(available(), "weight_gradient: this machine or this PyTorch has no product for it");
  const int64_t width = left.size(3), columns = sites.columns(), rows = sites.rows(), taps = kernel * kernel;
  const auto options = left.options().dtype(at::kFloat);
  if (rows == 0 || width == 0 || columns == 0) {
    return {at::zeros({width, sites.channels, kernel, kernel}, options), at::zeros({width}, options)};
  }
  const int64_t parts = std::clamp<int64_t>(rows / kLeastRows, 1, kMostParts);
  const int64_t share = rounded_up((rows + parts - 1) / parts, 32);
  const int64_t chunk = rounded_up((share + (share - 1) / kChunk) / ((share - 1) / kChunk + 1), 32);
  const auto totals = at::empty({parts, width, columns}, options), sums = at::empty({parts, width}, options);
  auto gradient = at::empty({width, sites.channels, kernel, kernel}, options);
  float* total = totals.mutable_data_ptr<float>();
  float* sum = sums.mutable_data_ptr<float>();
  const auto* from_left = static_cast<const uint16_t*>(left.const_data_ptr());
  const auto* from_right = static_cast<const uint16_t*>(right.const_data_ptr());
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = std::min(rows, part * share), end = std::min(rows, begin + share);
      const Operands given{from_left, from_right, width, total + part * width * columns, sum + part * width};
      sum_part(sites, given, begin, end, chunk);
    }
  });
  float* out = gradient.mutable_data_ptr<float>();
  at::parallel_for(0, width, 16, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      float* first = total + m * columns;
      for (int64_t part = 1; part < parts; ++part) {
        const float* more = first + part * width * columns;
        for (int64_t i = 0; i < columns; ++i) first[i] += more[i];
      }
      float* to = out + m * columns;
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t n = 0; n < sites.channels; ++n) to[n * taps + tap] = first[tap * sites.channels + n];
      }
    }
  });
  return {gradient, sums.sum(0)};
}

#else

std::tuple<at::Tensor, at::Tensor> weight_gradient(const at::Tensor&, const at::Tensor&, int64_t, int64_t, int64_t) {
  TORCH_CHECK(false, "weight_gradient: not built for this machine or this PyTorch");
}

#endif

}  // namespace

bool has_row_products() { return available(); }

TORCH_LIBRARY_IMPL(gaitfast, CPU, m) { m.impl("weight_gradient", &weight_gradient); }

}  // namespace gaitfast::convolution
