#include <algorithm>
#include <limits>

#include "passes.h"
#include "settle.h"

namespace gaitfast::retrieval {
namespace {

// Thresholds of 16 queries side by side, positive by positive, for one tile. The score of item i for query j is surely
// above that of the positive when far - item_error > above, and may be when near + item_error >= below.
template <bool>
GAITFAST_INLINE void compare_body(const float* __restrict near, const float* __restrict far, int64_t stride,
                                  const float* __restrict item_error, int64_t rows, int64_t positives,
                                  const float* __restrict above, const float* __restrict below,
                                  int32_t* __restrict closer, int32_t* __restrict undecided) {
  for (int64_t p = 0; p < positives; ++p, above += kLanes, below += kLanes, closer += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) closer[lane] = 0;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int32_t surely = far[i * stride + lane] - item_error[i] > above[lane];
        const int32_t maybe = near[i * stride + lane] + item_error[i] >= below[lane];
        closer[lane] += surely;
        undecided[i * kLanes + lane] |= maybe & (surely ^ 1);
      }
    }
  }
}

GAITFAST_MULTIVERSION(, compare,
                      (Simd level, const float* near, const float* far, int64_t stride, const float* item_error,
                       int64_t rows, int64_t positives, const float* above, const float* below, int32_t* closer,
                       int32_t* undecided),
                      (near, far, stride, item_error, rows, positives, above, below, closer, undecided))

// The positives of 16 neighbouring queries of a block.
class Group {
 public:
  Group(const Problem& problem, const Block& block, int64_t column, const Positives& positives)
      : problem_(problem), block_(block), column_(column), positives_(positives) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      size_ = std::max(size_, query(lane) < last_query() ? end(lane) - begin(lane) : 0);
    }
    above_.assign(size_ * kLanes, std::numeric_limits<float>::infinity());  // no positive: nothing is closer
    below_.assign(size_ * kLanes, std::numeric_limits<float>::infinity());
    closer_.resize(size_ * kLanes);
    undecided_.resize(block.tile_rows() * kLanes);
    for (int64_t lane = 0; lane < kLanes && query(lane) < last_query(); ++lane) {
      for (int64_t n = begin(lane); n < end(lane); ++n) {
        const double distance = positives.distances[n];
        const double off = positives.exact[n] ? 0.0 : problem.pairs.tolerance()(distance);
        const float error = block.query_error(column + lane);
        above_[place(n, lane)] = problem.score_above(distance - off) + error;
        below_[place(n, lane)] =
            std::max(problem.score_below(distance + off) - error, std::numeric_limits<float>::lowest());
      }
    }
  }

  // Adds what a tile holds before the positives; pairs that the bounds leave open are decided one by one.
  void count(int64_t first, int64_t rows, ExactDistances& exact, int64_t* counts, bool* open) {
    if (size_ == 0) return;
    std::fill_n(undecided_.begin(), rows * kLanes, 0);
    compare(problem_.level, block_.near(0) + column_, block_.far(0) + column_, block_.columns(), block_.item_errors(),
            rows, size_, above_.data(), below_.data(), closer_.data(), undecided_.data());
    for (int64_t lane = 0; lane < kLanes && query(lane) < last_query(); ++lane) {
      for (int64_t n = begin(lane); n < end(lane); ++n) counts[n] += closer_[place(n, lane)];
      exact.start(query(lane));
      for (int64_t i = 0; i < rows; ++i) {
        if (undecided_[i * kLanes + lane] != 0) decide(first, i, lane, exact, counts, open);
      }
    }
  }

 private:
  void decide(int64_t first, int64_t row, int64_t lane, ExactDistances& exact, int64_t* counts, bool* open) {
    const int64_t item = first + row, column = column_ + lane;
    const float error = block_.item_errors()[row];
    const float near = block_.near(row)[column] + error, far = block_.far(row)[column] - error;
    double distance = std::numeric_limits<double>::quiet_NaN();
    for (int64_t n = begin(lane); n < end(lane); ++n) {
      const int64_t at = place(n, lane);
      if (far > above_[at] || near < below_[at] || item == positives_.items[n]) continue;
      if (std::isnan(distance)) distance = exact.quick(item, item);
      const Tolerance& tolerance = problem_.pairs.tolerance();
      const double own = positives_.distances[n], own_off = positives_.exact[n] ? 0.0 : tolerance(own);
      const double off = tolerance(distance);
      if (distance + off < own - own_off) {
        ++counts[n];
      } else if (distance - off > own + own_off) {
        continue;
      } else if (!positives_.exact[n]) {
        open[n] = true;
      } else {
        const double true_distance = exact(item);
        if (true_distance < own || (true_distance == own && item < positives_.items[n])) ++counts[n];
      }
    }
  }

  int64_t query(int64_t lane) const { return block_.first() + column_ + lane; }
  int64_t last_query() const { return block_.first() + block_.count(); }
  int64_t begin(int64_t lane) const { return positives_.offsets[query(lane)]; }
  int64_t end(int64_t lane) const { return positives_.offsets[query(lane) + 1]; }
  int64_t place(int64_t n, int64_t lane) const { return (n - begin(lane)) * kLanes + lane; }

  const Problem& problem_;
  const Block& block_;
  int64_t column_, size_ = 0;
  const Positives& positives_;
  std::vector<float> above_, below_;  // (positives, 16)
  std::vector<int32_t> closer_, undecided_;
};

}  // namespace

void count_closer(const Problem& problem, const Positives& positives, const Excluded& excluded, int64_t* counts,
                  bool* open) {
  const int64_t items = problem.gallery.shape().rows, total = positives.offsets[problem.queries.shape().rows];
  std::fill_n(counts, total, 0);
  std::fill_n(open, total, false);
  EqualItems equal(problem.pairs);
  for_blocks(problem, [&](Block& block) {
    if (positives.offsets[block.first()] == positives.offsets[block.first() + block.count()]) return;
    std::vector<Group> groups;
    for (int64_t column = 0; column < block.columns(); column += kLanes) {
      groups.emplace_back(problem, block, column, positives);
    }
    for (int64_t first = 0; first < items; first += block.tile_rows()) {
      const int64_t rows = std::min(block.tile_rows(), items - first);
      block.compute(first, rows, excluded);
      for_columns(problem, block, [&](int64_t begin, int64_t end) {
        ExactDistances exact(problem.pairs, equal);
        for (int64_t column = begin; column < end; column += kLanes) {
          groups[column / kLanes].count(first, rows, exact, counts, open);
        }
      });
    }
  });
}

}  // namespace gaitfast::retrieval
