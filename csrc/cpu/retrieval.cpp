// torch.ops.gaitfast: exact retrieval on the CPU. What an operator takes and returns stands in ../library.cpp.
#include <torch/library.h>

#include <tuple>

#include "../ops.h"
#include "retrieval/passes.h"

namespace gaitfast::retrieval {
namespace {

void check_squares(const char* what, const at::Tensor& squares, const Shape& shape) {
  TORCH_CHECK(squares.dim() == 2 && squares.size(0) == shape.rows && squares.size(1) == shape.parts &&
                  squares.scalar_type() == at::kDouble && squares.is_contiguous(),
              what, ": sums of squares must be contiguous float64 (N, P)");
}

void check_offsets(const char* what, const at::Tensor& offsets, const at::Tensor& items, int64_t queries) {
  TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) == queries + 1 && offsets.scalar_type() == at::kLong &&
                  offsets.is_contiguous() && items.dim() == 1 && items.scalar_type() == at::kLong &&
                  items.is_contiguous(),
              what, ": must be contiguous int64, offsets (Q + 1,) and items (n,)");
  const int64_t* o = offsets.const_data_ptr<int64_t>();
  TORCH_CHECK(o[0] == 0 && o[queries] == items.size(0) && std::is_sorted(o, o + queries + 1), what,
              ": offsets must ascend from 0 to the number of items");
}

Problem problem_of(const at::Tensor& queries, const at::Tensor& query_squares, const at::Tensor& gallery,
                   const at::Tensor& gallery_squares, const at::Tensor& plane, const at::Tensor& lengths,
                   c10::string_view metric, double scale) {
  const Shape q = shape_of("queries", queries), g = shape_of("gallery", gallery);
  TORCH_CHECK(q.channels == g.channels && q.parts == g.parts && queries.scalar_type() == gallery.scalar_type(),
              "queries and gallery: must have the same (C, P) and type");
  TORCH_CHECK(g.rows > 0 && g.rows <= std::numeric_limits<int32_t>::max(), "gallery: holds 1 to 2^31 - 1 items");
  check_squares("queries", query_squares, q);
  check_squares("gallery", gallery_squares, g);
  const Metric kind = metric_of(metric);
  const Form form = form_of(plane);
  const Segments segments(kind, g, form);
  const int64_t values = form == Form::floats ? segments.count * g.rows * segments.values
                                              : (form == Form::bytes ? 2 : 1) * plane_values(segments, g.rows);
  TORCH_CHECK(plane.numel() == values && plane.is_contiguous() && (form != Form::floats || plane.scalar_type() == at::kFloat) &&
                  lengths.numel() == g.rows * segments.count * 3 && lengths.scalar_type() == at::kFloat &&
                  lengths.is_contiguous(),
              "plane: does not belong to this gallery and metric");
  TORCH_CHECK(form == Form::floats || form == best_form(), "plane: is for instructions that are not at hand");
  return Problem(kind, queries, query_squares, gallery, gallery_squares, plane, lengths, scale);
}

at::Tensor part_squares(const at::Tensor& features) {
  const Shape shape = shape_of("features", features);
  at::Tensor squares = at::empty({shape.rows, shape.parts}, at::kDouble);
  sum_squares(features, squares.mutable_data_ptr<double>());
  return squares;
}

std::tuple<at::Tensor, at::Tensor> gallery_plane(const at::Tensor& features, const at::Tensor& squares,
                                                 c10::string_view metric, double scale) {
  check_squares("features", squares, shape_of("features", features));
  return make_plane(metric_of(metric), features, squares, scale);
}

std::tuple<at::Tensor, at::Tensor> search_gallery(const at::Tensor& queries, const at::Tensor& query_squares,
                                                  const at::Tensor& gallery, const at::Tensor& gallery_squares,
                                                  const at::Tensor& plane, const at::Tensor& lengths,
                                                  c10::string_view metric, double scale, int64_t k,
                                                  const at::Tensor& excluded_offsets, const at::Tensor& excluded) {
  const Problem problem =
      problem_of(queries, query_squares, gallery, gallery_squares, plane, lengths, metric, scale);
  TORCH_CHECK(k >= 1 && k <= gallery.size(0), "k: lies in 1..", gallery.size(0), ", got ", k);
  check_offsets("excluded", excluded_offsets, excluded, queries.size(0));
  at::Tensor distances = at::empty({queries.size(0), k}, at::kDouble), items = at::empty({queries.size(0), k}, at::kLong);
  const Excluded lists{excluded_offsets.const_data_ptr<int64_t>(), excluded.const_data_ptr<int64_t>()};
  search(problem, k, lists, distances.mutable_data_ptr<double>(), items.mutable_data_ptr<int64_t>());
  return {distances, items};
}

std::tuple<at::Tensor, at::Tensor> count_before(const at::Tensor& queries, const at::Tensor& query_squares,
                                                const at::Tensor& gallery, const at::Tensor& gallery_squares,
                                                const at::Tensor& plane, const at::Tensor& lengths,
                                                c10::string_view metric, double scale, const at::Tensor& offsets,
                                                const at::Tensor& positives, const at::Tensor& distances,
                                                const at::Tensor& exact, const at::Tensor& excluded_offsets,
                                                const at::Tensor& excluded) {
  const Problem problem =
      problem_of(queries, query_squares, gallery, gallery_squares, plane, lengths, metric, scale);
  check_offsets("positives", offsets, positives, queries.size(0));
  check_offsets("excluded", excluded_offsets, excluded, queries.size(0));
  TORCH_CHECK(distances.sizes() == positives.sizes() && distances.scalar_type() == at::kDouble &&
                  distances.is_contiguous() && exact.sizes() == positives.sizes() && exact.scalar_type() == at::kBool &&
                  exact.is_contiguous(),
              "positives: distances must be float64 and exact bool, one per positive");
  at::Tensor counts = at::empty_like(positives), open = at::empty_like(exact);
  const Positives given{offsets.const_data_ptr<int64_t>(), positives.const_data_ptr<int64_t>(),
                        distances.const_data_ptr<double>(), exact.const_data_ptr<bool>()};
  const Excluded lists{excluded_offsets.const_data_ptr<int64_t>(), excluded.const_data_ptr<int64_t>()};
  count_closer(problem, given, lists, counts.mutable_data_ptr<int64_t>(), open.mutable_data_ptr<bool>());
  return {counts, open};
}

at::Tensor pair_distances(const at::Tensor& queries, const at::Tensor& query_squares, const at::Tensor& gallery,
                          const at::Tensor& gallery_squares, const at::Tensor& rows, const at::Tensor& items,
                          c10::string_view metric, bool exact) {
  const Shape q = shape_of("queries", queries), g = shape_of("gallery", gallery);
  TORCH_CHECK(q.channels == g.channels && q.parts == g.parts && queries.scalar_type() == gallery.scalar_type(),
              "queries and gallery: must have the same (C, P) and type");
  check_squares("queries", query_squares, q);
  check_squares("gallery", gallery_squares, g);
  TORCH_CHECK(rows.dim() == 1 && rows.sizes() == items.sizes() && rows.scalar_type() == at::kLong &&
                  items.scalar_type() == at::kLong && rows.is_contiguous() && items.is_contiguous(),
              "pairs: rows and items must be contiguous int64 (n,)");
  const int64_t count = rows.size(0);
  const int64_t *row = rows.const_data_ptr<int64_t>(), *item = items.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK(row[i] >= 0 && row[i] < q.rows && item[i] >= 0 && item[i] < g.rows, "pairs: out of range");
  }
  const Pairs pairs(metric_of(metric), queries, query_squares.const_data_ptr<double>(), gallery,
                    gallery_squares.const_data_ptr<double>());
  at::Tensor result = at::empty({count}, at::kDouble);
  double* out = result.mutable_data_ptr<double>();
  constexpr int64_t kPairsOfTask = 256;
  parallel((count + kPairsOfTask - 1) / kPairsOfTask, [&](int64_t task) {
    Pairs::Scratch scratch;
    for (int64_t i = task * kPairsOfTask; i < std::min(count, (task + 1) * kPairsOfTask); ++i) {
      out[i] = exact ? pairs.exact(row[i], item[i], scratch) : pairs.value(row[i], item[i], item[std::min(i + 1, count - 1)], scratch);
    }
  });
  return result;
}

}  // namespace

std::string plane_type() {
  const Form form = best_form();
  return form == Form::bytes ? "int8" : form == Form::words ? "int16" : "float32";
}

}  // namespace gaitfast::retrieval

TORCH_LIBRARY_IMPL(gaitfast, CPU, m) {
  m.impl("part_squares", &gaitfast::retrieval::part_squares);
  m.impl("gallery_plane", &gaitfast::retrieval::gallery_plane);
  m.impl("search_gallery", &gaitfast::retrieval::search_gallery);
  m.impl("count_before", &gaitfast::retrieval::count_before);
  m.impl("pair_distances", &gaitfast::retrieval::pair_distances);
}
