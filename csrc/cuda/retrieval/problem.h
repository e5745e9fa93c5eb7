// Tensors as the kernels see them, and the steps that searching and counting share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <string_view>
#include <utility>

#include "../retrieval_kernels.cuh"

namespace gaitfast::retrieval_cuda {

using at::Tensor;

template <class Body>
void run(const Body& body, int64_t count) {
  launch(body, count, c10::cuda::getCurrentCUDAStream().stream());
}

// Calls `work` with a pointer to the features, of their type.
template <class Work>
void with_type(const Tensor& features, const Work& work) {
  const void* data = features.const_data_ptr();
  if (features.scalar_type() == at::kFloat) return work(static_cast<const float*>(data));
  if (features.scalar_type() == at::kHalf) return work(static_cast<const Half*>(data));
  TORCH_CHECK(features.scalar_type() == at::kBFloat16, "features: must be float32, float16 or bfloat16");
  work(static_cast<const BFloat16*>(data));
}

inline const Lengths* lengths_of(const Tensor& lengths) {
  return reinterpret_cast<const Lengths*>(lengths.const_data_ptr<float>());
}

// One side: features (N, C, P), contiguous, and their sums of squares, float64 (N, P).
struct Side {
  Side(const char* name, const Tensor& features, const Tensor& squares);
  Side rows(int64_t first, int64_t count) const {
    return {features.narrow(0, first, count), squares.narrow(0, first, count)};
  }

  int64_t count() const { return features.size(0); }
  int64_t channels() const { return features.size(1); }
  int64_t parts() const { return features.size(2); }
  int64_t width() const { return channels() * parts(); }
  int64_t lanes() const { return lanes_of(parts()); }

  Tensor features, squares;

 private:
  Side(Tensor features, Tensor squares) : features(std::move(features)), squares(std::move(squares)) {}
};

struct Problem {
  Problem(const Tensor& queries, const Tensor& query_squares, const Tensor& gallery, const Tensor& gallery_squares,
          std::string_view metric, double scale);

  bool cosine;
  double scale;
  Side queries, gallery;
  Measure measure;
};

bool is_cosine(std::string_view metric);

// Of a gallery: planes int8 (segments, rows padded to 32, 2 depth), lengths float32 (N, segments, 3).
struct Planes {
  Tensor planes, lengths;
};

// Per query the gallery items that do not exist for it, ascending: items[offsets[q]:offsets[q + 1]].
struct Excluded {
  Tensor offsets, items;
};

Tensor part_squares(const Tensor& features);

Planes make_planes(const Side& side, bool cosine, double scale, bool swapped);

// Distances of the pairs (rows[i], items[i]), float64 (n), within the tolerance; infinite where an item is negative.
Tensor quick_distances(const Problem& problem, const Tensor& rows, const Tensor& items);
// The exact ones; no item is negative.
Tensor exact_distances(const Problem& problem, const Tensor& rows, const Tensor& items);

// Scores of a block of queries, a tile of gallery items at a time.
class Block {
 public:
  // Queries [first, first + count) against a gallery with these planes.
  Block(const Problem& problem, const Planes& planes, int64_t first, int64_t count);

  // Calls work(first, items) for tiles of the gallery, with near and far filled for items [first, first + items).
  template <class Work>
  void for_tiles(const Excluded& excluded, const Work& work) {
    const int64_t total = problem_.gallery.count();
    for (int64_t first = 0; first < total; first += kTileItems) {
      const int64_t items = std::min(kTileItems, total - first);
      compute(first, items, excluded);
      work(first, items);
    }
  }

  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  int64_t columns() const { return columns_; }
  const float* near() const { return near_.const_data_ptr<float>(); }  // (items, columns)
  const float* far() const { return far_.const_data_ptr<float>(); }

 private:
  void compute(int64_t first, int64_t items, const Excluded& excluded);
  void product(int64_t segment, int64_t first, int64_t items);

  const Problem& problem_;
  Planes gallery_, queries_;
  int64_t first_, count_, columns_;  // columns_: count_, padded
  Tensor squares_, roots_, query_squares_, query_roots_;  // Euclidean: float32 (n, P)
  Tensor high_, cross_, products_, near_, far_;
  float rounding_;
};

}  // namespace gaitfast::retrieval_cuda
