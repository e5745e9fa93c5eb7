// torch.ops.gaitfast: exact retrieval on a CUDA device. What an operator takes and returns stands in ../library.cpp.
//
// As on the CPU, int8 products (here at::_int_mm) with a bound filter, float64 decides nearly all that is left, and
// twice float64's precision decides ties; so the answers are the CPU's, in whatever order threads come.
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "retrieval/passes.h"

namespace gaitfast::retrieval_cuda {
namespace {

// On the host, after checking: a list per query.
Tensor checked_offsets(const char* what, const Tensor& offsets, const Tensor& items, int64_t queries) {
  TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) == queries + 1 && offsets.scalar_type() == at::kLong &&
                  offsets.is_contiguous() && items.dim() == 1 && items.scalar_type() == at::kLong &&
                  items.is_contiguous(),
              what, ": must be contiguous int64, offsets (Q + 1,) and items (n,)");
  const Tensor host = offsets.cpu();
  const int64_t* o = host.const_data_ptr<int64_t>();
  TORCH_CHECK(o[0] == 0 && o[queries] == items.size(0) && std::is_sorted(o, o + queries + 1), what,
              ": offsets must ascend from 0 to the number of items");
  return host;
}

void check_planes(const Problem& problem, const Planes& given) {
  const Side& gallery = problem.gallery;
  TORCH_CHECK(gallery.count() > 0 && gallery.count() <= std::numeric_limits<int32_t>::max(),
              "gallery: holds 1 to 2^31 - 1 items");
  const auto [planes, lengths] = make_planes(gallery.rows(0, 0), problem.cosine, problem.scale, false);
  TORCH_CHECK(given.planes.dim() == 3 && given.planes.size(0) == planes.size(0) &&
                  given.planes.size(1) >= gallery.count() && given.planes.size(1) % 32 == 0 &&
                  given.planes.size(2) == planes.size(2) && given.planes.scalar_type() == at::kChar &&
                  given.planes.is_contiguous() && given.lengths.dim() == 3 &&
                  given.lengths.size(0) == gallery.count() && given.lengths.size(1) == planes.size(0) &&
                  given.lengths.size(2) == 3 && given.lengths.scalar_type() == at::kFloat &&
                  given.lengths.is_contiguous(),
              "plane: does not belong to this gallery and metric");
}

Tensor part_squares_op(const Tensor& features) {
  const c10::cuda::CUDAGuard guard(features.device());
  return part_squares(features);
}

std::tuple<Tensor, Tensor> gallery_plane_op(const Tensor& features, const Tensor& squares, c10::string_view metric,
                                            double scale) {
  const c10::cuda::CUDAGuard guard(features.device());
  const auto [planes, lengths] = make_planes(Side("features", features, squares), is_cosine(metric), scale, false);
  return {planes, lengths};
}

std::tuple<Tensor, Tensor> search_gallery_op(const Tensor& queries, const Tensor& query_squares, const Tensor& gallery,
                                             const Tensor& gallery_squares, const Tensor& plane, const Tensor& lengths,
                                             c10::string_view metric, double scale, int64_t k,
                                             const Tensor& excluded_offsets, const Tensor& excluded) {
  const c10::cuda::CUDAGuard guard(queries.device());
  const Problem problem(queries, query_squares, gallery, gallery_squares, metric, scale);
  check_planes(problem, {plane, lengths});
  TORCH_CHECK(k >= 1 && k <= gallery.size(0), "k: lies in 1..", gallery.size(0), ", got ", k);
  checked_offsets("excluded", excluded_offsets, excluded, queries.size(0));
  const Tensor distances = query_squares.new_empty({queries.size(0), k});
  const Tensor items = excluded_offsets.new_empty({queries.size(0), k});
  search(problem, {plane, lengths}, k, {excluded_offsets, excluded}, distances, items);
  return {distances, items};
}

std::tuple<Tensor, Tensor> count_before_op(const Tensor& queries, const Tensor& query_squares, const Tensor& gallery,
                                           const Tensor& gallery_squares, const Tensor& plane, const Tensor& lengths,
                                           c10::string_view metric, double scale, const Tensor& offsets,
                                           const Tensor& positives, const Tensor& distances, const Tensor& exact,
                                           const Tensor& excluded_offsets, const Tensor& excluded) {
  const c10::cuda::CUDAGuard guard(queries.device());
  const Problem problem(queries, query_squares, gallery, gallery_squares, metric, scale);
  check_planes(problem, {plane, lengths});
  const Tensor host_offsets = checked_offsets("positives", offsets, positives, queries.size(0));
  checked_offsets("excluded", excluded_offsets, excluded, queries.size(0));
  TORCH_CHECK(distances.sizes() == positives.sizes() && distances.scalar_type() == at::kDouble &&
                  distances.is_contiguous() && exact.sizes() == positives.sizes() && exact.scalar_type() == at::kBool &&
                  exact.is_contiguous(),
              "positives: distances must be float64 and exact bool, one per positive");
  const Tensor counts = positives.new_zeros(positives.sizes()), open = exact.new_zeros(exact.sizes());
  count_before(problem, {plane, lengths}, {offsets, host_offsets, positives, distances, exact},
               {excluded_offsets, excluded}, counts, open);
  return {counts, open};
}

Tensor pair_distances_op(const Tensor& queries, const Tensor& query_squares, const Tensor& gallery,
                         const Tensor& gallery_squares, const Tensor& rows, const Tensor& items,
                         c10::string_view metric, bool exact) {
  const c10::cuda::CUDAGuard guard(queries.device());
  const Problem problem(queries, query_squares, gallery, gallery_squares, metric, 1.0);
  TORCH_CHECK(rows.dim() == 1 && rows.sizes() == items.sizes() && rows.scalar_type() == at::kLong &&
                  items.scalar_type() == at::kLong && rows.is_contiguous() && items.is_contiguous(),
              "pairs: rows and items must be contiguous int64 (n,)");
  const auto inside = [](const Tensor& x, int64_t size) { return x.ge(0).logical_and(x.lt(size)).all().item<bool>(); };
  TORCH_CHECK(inside(rows, queries.size(0)) && inside(items, gallery.size(0)), "pairs: out of range");
  return exact ? exact_distances(problem, rows, items) : quick_distances(problem, rows, items);
}

}  // namespace
}  // namespace gaitfast::retrieval_cuda

TORCH_LIBRARY_IMPL(gaitfast, CUDA, m) {
  m.impl("part_squares", &gaitfast::retrieval_cuda::part_squares_op);
  m.impl("gallery_plane", &gaitfast::retrieval_cuda::gallery_plane_op);
  m.impl("search_gallery", &gaitfast::retrieval_cuda::search_gallery_op);
  m.impl("count_before", &gaitfast::retrieval_cuda::count_before_op);
  m.impl("pair_distances", &gaitfast::retrieval_cuda::pair_distances_op);
}
