#include <algorithm>
#include <limits>

#include "block.h"
#include "passes.h"
#include "settle.h"

namespace gaitfast::retrieval {
namespace {

constexpr float kNever = std::numeric_limits<float>::infinity();
constexpr float kAlways = std::numeric_limits<float>::lowest();  // above the score of an excluded item

// The items of one query that may be among its k nearest.
class Shortlist {
 public:
  Shortlist(int64_t k, const Problem& problem) : k_(k), capacity_(2 * k + 128), problem_(&problem) {}

  // The largest score that k items surely reach; an item whose score cannot is out.
  float threshold() const { return threshold_; }

  // True: the list is full, tidy up before the next.
  bool push(float near, float far, int32_t item) {
    items_.push_back({near, far, item});
    return static_cast<int64_t>(items_.size()) >= capacity_;
  }

  void tidy(int64_t query, ExactDistances& exact) {
    shrink();
    constexpr int64_t kMany = 4096;
    const int64_t size = items_.size();
    if (2 * size <= capacity_) return;
    if (size < 4 * k_ + kMany) {
      capacity_ = 2 * size;
      return;
    }
    // More near-ties than the bounds can tell apart: keep exactly the k nearest so far.
    settle_items(query, exact);
    if (static_cast<int64_t>(nearest_.size()) == k_) raise(problem_->score_below(worst()));
  }

  std::vector<Neighbour>& finish(int64_t query, ExactDistances& exact) {
    shrink();
    settle_items(query, exact);
    return nearest_;
  }

 private:
  struct Item {
    float near, far;
    int32_t item;
  };

  double worst() const {
    const double distance = nearest_.back().distance;
    return distance + problem_->pairs.tolerance()(distance);
  }

  void raise(float threshold) { threshold_ = std::max(threshold_, threshold); }

  void shrink() {
    if (static_cast<int64_t>(items_.size()) >= k_) {
      std::vector<float> far(items_.size());
      for (size_t i = 0; i < far.size(); ++i) far[i] = items_[i].far;
      std::nth_element(far.begin(), far.begin() + (k_ - 1), far.end(), std::greater<>());
      raise(far[k_ - 1]);
    }
    std::erase_if(items_, [this](const Item& item) { return item.near < threshold_; });
  }

  void settle_items(int64_t query, ExactDistances& exact) {
    exact.start(query);
    for (size_t i = 0; i < items_.size(); ++i) {
      const int64_t item = items_[i].item, next = i + 1 < items_.size() ? items_[i + 1].item : item;
      nearest_.push_back({exact.quick(item, next), item});
    }
    items_.clear();
    capacity_ = 2 * k_ + 128;
    settle(nearest_, k_, problem_->pairs.tolerance(), exact);
  }

  int64_t k_, capacity_;
  const Problem* problem_;
  float threshold_ = kAlways;
  std::vector<Item> items_;
  std::vector<Neighbour> nearest_;
};

struct Hit {
  int32_t row, column;
};

// The places of a tile whose score reaches its column's threshold.
template <bool>
GAITFAST_INLINE void hits_body(const float* __restrict scores, int64_t stride, int64_t columns,
                               const float* item_error, int64_t rows, const float* __restrict thresholds,
                               std::vector<Hit>& out) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* line = scores + i * stride;
    for (int64_t first = 0; first < columns; first += kRowsOfPanel) {
      int32_t reached = 0;
      for (int64_t j = first; j < first + kRowsOfPanel; ++j) reached |= line[j] + item_error[i] >= thresholds[j];
      if (__builtin_expect(reached == 0, 1)) continue;
      for (int64_t j = first; j < first + kRowsOfPanel; ++j) {
        if (line[j] + item_error[i] >= thresholds[j]) out.push_back({static_cast<int32_t>(i), static_cast<int32_t>(j)});
      }
    }
  }
}

GAITFAST_MULTIVERSION(, hits,
                      (Simd level, const float* scores, int64_t stride, int64_t columns, const float* item_error,
                       int64_t rows, const float* thresholds, std::vector<Hit>& out),
                      (scores, stride, columns, item_error, rows, thresholds, out))

// The shortlists of a block's queries.
class Lists {
 public:
  Lists(const Problem& problem, const Block& block, int64_t k)
      : problem_(problem), block_(block), lists_(block.count(), Shortlist(k, problem)), thresholds_(block.columns(), kNever) {
    std::fill_n(thresholds_.begin(), block.count(), kAlways);
  }

  // Reads the tile of items [first, first + rows) in the columns [begin, end), a few rows at a time: thresholds rise.
  void read(int64_t first, int64_t rows, int64_t begin, int64_t end, ExactDistances& exact) {
    constexpr int64_t kRowsOfRun = 64;
    std::vector<Hit> found;
    for (int64_t row = 0; row < rows; row += kRowsOfRun) {
      found.clear();
      hits(problem_.level, block_.near(row) + begin, block_.columns(), end - begin, block_.item_errors() + row,
           std::min(kRowsOfRun, rows - row), thresholds_.data() + begin, found);
      take(found, first, row, begin, exact);
    }
  }

  std::vector<Neighbour>& finish(int64_t column, ExactDistances& exact) {
    return lists_[column].finish(block_.first() + column, exact);
  }

 private:
  // `row`: of the tile, where the run that was looked at begins.
  void take(const std::vector<Hit>& found, int64_t first, int64_t row, int64_t begin, ExactDistances& exact) {
    for (const Hit& hit : found) {
      const int64_t column = begin + hit.column, i = row + hit.row;
      Shortlist& list = lists_[column];
      const float query_error = block_.query_error(column), item_error = block_.item_errors()[i];
      const float near = block_.near(i)[column] + item_error;
      if (near < thresholds_[column]) continue;  // it rose since
      const float far = block_.far(i)[column] - item_error - query_error;
      if (list.push(near + query_error, far, static_cast<int32_t>(first + i))) {
        list.tidy(block_.first() + column, exact);
        thresholds_[column] = list.threshold() == kAlways ? kAlways : list.threshold() - query_error;
      }
    }
  }

  const Problem& problem_;
  const Block& block_;
  std::vector<Shortlist> lists_;
  std::vector<float> thresholds_;
};

}  // namespace

void search(const Problem& problem, int64_t k, const Excluded& excluded, double* distances, int64_t* indices) {
  const int64_t items = problem.gallery.shape().rows;
  EqualItems equal(problem.pairs);
  const auto write = [&](Lists& lists, int64_t first, int64_t column, ExactDistances& exact) {
    const std::vector<Neighbour>& nearest = lists.finish(column, exact);
    const int64_t row = (first + column) * k;
    for (int64_t i = 0; i < k; ++i) {
      const bool there = i < static_cast<int64_t>(nearest.size());
      distances[row + i] = there ? nearest[i].distance : std::numeric_limits<double>::infinity();
      indices[row + i] = there ? nearest[i].item : -1;
    }
  };
  for_blocks(problem, [&](Block& block) {
    Lists lists(problem, block, k);
    for (int64_t first = 0; first < items; first += block.tile_rows()) {
      const int64_t rows = std::min(block.tile_rows(), items - first);
      block.compute(first, rows, excluded);
      for_columns(problem, block, [&](int64_t begin, int64_t end) {
        ExactDistances exact(problem.pairs, equal);
        lists.read(first, rows, begin, end, exact);
      });
    }
    for_columns(problem, block, [&](int64_t begin, int64_t end) {
      ExactDistances exact(problem.pairs, equal);
      for (int64_t column = begin; column < std::min(end, block.count()); ++column) {
        write(lists, block.first(), column, exact);
      }
    });
  });
}

}  // namespace gaitfast::retrieval
