#include "problem.h"

#include <ATen/ops/_int_mm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace gaitfast::retrieval_cuda {
namespace {

// Rows of planes: products of int8 want more than 16, and a multiple of 8. Depth: 16-byte rows.
int64_t padded_rows(int64_t rows) { return (rows + 31) / 32 * 32; }
int64_t padded_depth(int64_t values) { return (values + 15) / 16 * 16; }

// Calls work(first, count) for pieces of [0, total) of at most kScratch / size members.
template <class Work>
void in_pieces(int64_t total, int64_t size, const Work& work) {
  const int64_t step = std::max<int64_t>(1, kScratch / size);
  for (int64_t first = 0; first < total; first += step) work(first, std::min(step, total - first));
}

// float32 (n, P): squares in units of the plane, and their roots, rounded up.
std::pair<Tensor, Tensor> part_sizes(const Tensor& squares, double scale) {
  const Tensor own = squares.mul(scale * scale);
  return {own.to(at::kFloat), own.sqrt().mul(1.0 + 1e-6).to(at::kFloat)};
}

}  // namespace

bool is_cosine(std::string_view metric) {
  TORCH_CHECK(metric == "cosine" || metric == "euclidean", "metric: is cosine or euclidean, got ", metric);
  return metric == "cosine";
}

Side::Side(const char* name, const Tensor& features, const Tensor& squares) : features(features), squares(squares) {
  TORCH_CHECK(features.dim() == 3 && features.is_contiguous(), name, ": must be contiguous (N, C, P)");
  TORCH_CHECK(features.size(1) > 0 && features.size(2) > 0, name, ": holds no values");
  TORCH_CHECK(squares.dim() == 2 && squares.size(0) == features.size(0) && squares.size(1) == features.size(2) &&
                  squares.scalar_type() == at::kDouble && squares.is_contiguous() &&
                  squares.device() == features.device(),
              name, ": sums of squares must be contiguous float64 (N, P)");
}

Problem::Problem(const Tensor& queries, const Tensor& query_squares, const Tensor& gallery,
                 const Tensor& gallery_squares, std::string_view metric, double scale)
    : cosine(is_cosine(metric)),
      scale(scale),
      queries("queries", queries, query_squares),
      gallery("gallery", gallery, gallery_squares),
      measure(cosine, scale, this->gallery.channels(), this->gallery.parts()) {
  TORCH_CHECK(this->queries.channels() == this->gallery.channels() && this->queries.parts() == this->gallery.parts() &&
                  queries.scalar_type() == gallery.scalar_type() && queries.device() == gallery.device(),
              "queries and gallery: must have the same (C, P), type and device");
}

Tensor part_squares(const Tensor& features) {
  const Tensor squares = at::empty({features.size(0), features.size(2)}, features.options().dtype(at::kDouble));
  const Side side("features", features, squares);
  with_type(features, [&](const auto* data) {
    in_pieces(side.count(), side.lanes(), [&](int64_t first, int64_t count) {
      const Tensor sums = at::empty({count, side.lanes()}, squares.options());
      const auto* x = data + first * side.width();
      run(LaneSums<std::decay_t<decltype(*data)>>{x, x, nullptr, nullptr, side.width(), side.lanes(), false,
                                                  sums.mutable_data_ptr<double>()},
          sums.numel());
      run(PartSquares{sums.const_data_ptr<double>(), side.lanes(), side.parts(),
                      squares.mutable_data_ptr<double>() + first * side.parts()},
          count * side.parts());
    });
  });
  return squares;
}

Planes make_planes(const Side& side, bool cosine, double scale, bool swapped) {
  const int64_t segments = cosine ? 1 : side.parts(), depth = padded_depth(cosine ? side.width() : side.channels());
  const int64_t padded = padded_rows(side.count());
  const Tensor planes = at::zeros({segments, padded, 2 * depth}, side.features.options().dtype(at::kChar));
  const Tensor lengths = at::empty({side.count(), segments, 3}, side.features.options().dtype(at::kFloat));
  with_type(side.features, [&](const auto* data) {
    using T = std::decay_t<decltype(*data)>;
    in_pieces(side.count(), side.lanes(), [&](int64_t first, int64_t count) {
      const Rows<T> rows{data + first * side.width(), side.squares.const_data_ptr<double>() + first * side.parts(),
                         side.channels(), side.parts(), side.lanes(), padded, depth, cosine, swapped, scale};
      const Tensor sums = at::empty({2, count, side.lanes()}, side.squares.options());
      double *low = sums.mutable_data_ptr<double>(), *rest = low + count * side.lanes();
      auto* own = reinterpret_cast<Lengths*>(lengths.mutable_data_ptr<float>()) + first * segments;
      run(LargestValues<T>{rows, low}, count * side.lanes());
      run(SegmentUnits{low, side.lanes(), segments, own}, count * segments);
      run(SplitRows<T>{rows, own, planes.mutable_data_ptr<int8_t>() + first * 2 * depth, low, rest},
          count * side.lanes());
      run(SegmentLengths{low, rest, side.lanes(), segments, own}, count * segments);
    });
  });
  return {planes, lengths};
}

Tensor quick_distances(const Problem& problem, const Tensor& rows, const Tensor& items) {
  const Side &queries = problem.queries, &gallery = problem.gallery;
  const int64_t lanes = gallery.lanes(), width = gallery.width();
  const Tensor distances = at::empty({rows.numel()}, gallery.squares.options());
  with_type(queries.features, [&](const auto* x) {
    const auto* y = static_cast<decltype(x)>(gallery.features.const_data_ptr());
    in_pieces(rows.numel(), lanes, [&](int64_t first, int64_t count) {
      const Tensor sums = at::empty({count, lanes}, gallery.squares.options());
      const int64_t *row = rows.const_data_ptr<int64_t>() + first, *item = items.const_data_ptr<int64_t>() + first;
      run(LaneSums<std::decay_t<decltype(*x)>>{x, y, row, item, width, lanes, !problem.cosine,
                                               sums.mutable_data_ptr<double>()},
          sums.numel());
      run(PairDistances{sums.const_data_ptr<double>(), queries.squares.const_data_ptr<double>(),
                        gallery.squares.const_data_ptr<double>(), row, item, lanes, gallery.parts(), problem.cosine,
                        distances.mutable_data_ptr<double>() + first},
          count);
    });
  });
  return distances;
}

Tensor exact_distances(const Problem& problem, const Tensor& rows, const Tensor& items) {
  const int64_t parts = problem.gallery.parts(), terms = problem.cosine ? 3 : 1;
  const Levels leaves(problem.gallery.channels());
  const Tensor distances = at::empty({rows.numel()}, problem.gallery.squares.options());
  const auto doubles = [&](int64_t count) { return at::empty({count, 2}, distances.options()); };
  const auto data = [](const Tensor& x) { return reinterpret_cast<Double*>(x.mutable_data_ptr<double>()); };
  with_type(problem.queries.features, [&](const auto* x) {
    const auto* y = static_cast<decltype(x)>(problem.gallery.features.const_data_ptr());
    in_pieces(rows.numel(), terms * parts * leaves.last(), [&](int64_t first, int64_t count) {
      Tensor sums = doubles(count * terms * leaves.last() * parts);
      const int64_t *row = rows.const_data_ptr<int64_t>() + first, *item = items.const_data_ptr<int64_t>() + first;
      run(ExactLeaves<std::decay_t<decltype(*x)>>{x, y, row, item, parts, terms, leaves, data(sums)},
          sums.size(0));
      for (int64_t left = leaves.last(); left > 1;) {
        const Levels levels(left);
        left = levels.last();
        const Tensor next = doubles(count * terms * left * parts);
        run(ExactSums{data(sums), parts, levels, data(next)}, next.size(0));
        sums = next;
      }
      run(ExactParts{data(sums), parts, terms}, count * parts);
      run(ExactMeans{data(sums), parts, terms, distances.mutable_data_ptr<double>() + first}, count);
    });
  });
  return distances;
}

Block::Block(const Problem& problem, const Planes& planes, int64_t first, int64_t count)
    : problem_(problem), gallery_(planes), first_(first), count_(count), columns_(padded_rows(count)) {
  const Side own = problem.queries.rows(first, count);
  const auto padded = [&](const Tensor& x) {
    Tensor result = at::zeros({columns_, x.size(1), x.size(2)}, x.options());
    result.narrow(0, 0, count).copy_(x);
    return result;
  };
  queries_ = make_planes(own, problem.cosine, problem.scale, true);
  queries_.lengths = padded(queries_.lengths);
  const int64_t items = std::min(kTileItems, padded_rows(problem.gallery.count()));
  const auto floats = queries_.lengths.options();
  high_ = at::empty({items, columns_}, floats.dtype(at::kInt));
  cross_ = at::empty(high_.sizes(), high_.options());
  for (Tensor* x : {&products_, &near_, &far_}) *x = at::empty({items, columns_}, floats);
  // An int32 becomes a float32, two are joined, and their units are multiplied: at most 5 roundings of sums that are at
  // most 3 times the product of the lengths.
  rounding_ = 16.0f * kFloatUnit * static_cast<float>(1 + planes.planes.size(2) / (2 * kDepth));
  if (!problem.cosine) {
    std::tie(squares_, roots_) = part_sizes(problem.gallery.squares, problem.scale);
    const auto [squares, roots] = part_sizes(own.squares, problem.scale);
    query_squares_ = padded(squares.unsqueeze(2)), query_roots_ = padded(roots.unsqueeze(2));
  }
}

void Block::product(int64_t segment, int64_t first, int64_t items) {
  const int64_t rows = padded_rows(items), depth = gallery_.planes.size(2) / 2;
  Tensor high = high_.narrow(0, 0, rows), cross = cross_.narrow(0, 0, rows);
  for (int64_t start = 0; start < depth; start += kDepth) {
    const int64_t length = std::min(kDepth, depth - start);
    const Tensor gallery = gallery_.planes[segment].narrow(0, first, rows).narrow(1, 2 * start, 2 * length);
    const Tensor queries = queries_.planes[segment].narrow(1, 2 * start, 2 * length);
    at::_int_mm_out(high, gallery.narrow(1, 0, length), queries.narrow(1, length, length).t());
    at::_int_mm_out(cross, gallery, queries.t());
    run(JoinProducts{high.const_data_ptr<int32_t>(), cross.const_data_ptr<int32_t>(), start == 0,
                     products_.mutable_data_ptr<float>()},
        items * columns_);
  }
}

void Block::compute(int64_t first, int64_t items, const Excluded& excluded) {
  const int64_t segments = gallery_.planes.size(0), parts = problem_.gallery.parts();
  const Lengths* item_lengths = lengths_of(gallery_.lengths) + first * segments;
  const Lengths* query_lengths = lengths_of(queries_.lengths);
  const float* products = products_.const_data_ptr<float>();
  float *near = near_.mutable_data_ptr<float>(), *far = far_.mutable_data_ptr<float>();
  for (int64_t segment = 0; segment < segments; ++segment) {
    product(segment, first, items);
    if (problem_.cosine) {
      run(CosineBounds{products, item_lengths, query_lengths, columns_, rounding_, near, far}, items * columns_);
    } else {
      const PartSizes item{item_lengths, squares_.const_data_ptr<float>() + first * parts,
                           roots_.const_data_ptr<float>() + first * parts};
      const PartSizes query{query_lengths, query_squares_.const_data_ptr<float>(),
                            query_roots_.const_data_ptr<float>()};
      run(EuclideanBounds{products, item, query, columns_, segment, parts, rounding_, near, far}, items * columns_);
    }
  }
  run(Exclude{excluded.offsets.const_data_ptr<int64_t>() + first_, excluded.items.const_data_ptr<int64_t>(), first,
              items, columns_, near, far},
      excluded.items.numel() > 0 ? count_ * kSharers : 0);
}

}  // namespace gaitfast::retrieval_cuda
