// The CUDA implementation of exact retrieval, whole, on the CPU: the folder of this file stands before PyTorch's
// headers, a C++ compiler makes loops of the kernels, and the operators get a namespace of their own.
#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(name, device, m) \
  static void register_emulated(torch::Library&); \
  static const torch::detail::TorchLibraryInit emulated( \
      torch::Library::IMPL, &register_emulated, "gaitfast_emulated", c10::DispatchKey::CPU, __FILE__, __LINE__); \
  static void register_emulated(torch::Library& m)

#include "sizes.h"

#include "cuda/retrieval.cpp"
#include "cuda/retrieval/passes.cpp"
#include "cuda/retrieval/problem.cpp"
#include "cuda/retrieval_kernels.cu"

namespace gaitfast::retrieval_cuda {
namespace {

// The bounds of all scores, float32 (G, Q) each, which no operator shows.
std::tuple<Tensor, Tensor> score_bounds(const Tensor& queries, const Tensor& query_squares, const Tensor& gallery,
                                        const Tensor& gallery_squares, const Tensor& plane, const Tensor& lengths,
                                        c10::string_view metric, double scale) {
  const Problem problem(queries, query_squares, gallery, gallery_squares, metric, scale);
  const int64_t columns = queries.size(0);
  const Tensor near = lengths.new_empty({gallery.size(0), columns}), far = near.new_empty(near.sizes());
  Block block(problem, {plane, lengths}, 0, columns);
  block.for_tiles({query_squares.new_zeros({columns + 1}, at::kLong), query_squares.new_zeros({0}, at::kLong)},
                  [&](int64_t first, int64_t items) {
                    for (int64_t i = 0; i < items; ++i) {
                      const int64_t from = i * block.columns(), to = (first + i) * columns;
                      std::copy_n(block.near() + from, columns, near.mutable_data_ptr<float>() + to);
                      std::copy_n(block.far() + from, columns, far.mutable_data_ptr<float>() + to);
                    }
                  });
  return {near, far};
}

}  // namespace
}  // namespace gaitfast::retrieval_cuda

static void register_bounds(torch::Library& m) { m.impl("score_bounds", &gaitfast::retrieval_cuda::score_bounds); }
static const torch::detail::TorchLibraryInit bounds(torch::Library::IMPL, &register_bounds, "gaitfast_emulated",
                                                    c10::DispatchKey::CPU, __FILE__, __LINE__);
