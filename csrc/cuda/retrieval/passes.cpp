#include "passes.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

namespace gaitfast::retrieval_cuda {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Orders each row of distances (n, m) and items (n, m) by both: stably, so by items first.
void order(Tensor& distances, Tensor& items) {
  const auto [ascending, by_item] = at::sort(items, 1);
  const auto [sorted, by_distance] = at::sort(distances.gather(1, by_item), std::optional<bool>(true), 1);
  distances = sorted;
  items = ascending.gather(1, by_distance);
}

// The items (n, m), -1 where there is none, of the queries from `first` on, in exact order; distances (n, m) whose
// float32 is that of the exact ones, infinite where there is no item.
std::pair<Tensor, Tensor> settle(const Problem& problem, int64_t first, Tensor items) {
  const int64_t queries = items.size(0), count = items.size(1);
  const Tensor rows = at::arange(first, first + queries, items.options()).repeat_interleave(count);
  Tensor distances = quick_distances(problem, rows, items.contiguous()).view({queries, count});
  order(distances, items);
  const Tensor open = at::empty({queries * count}, items.options().dtype(at::kBool));
  run(MarkOpen{distances.const_data_ptr<double>(), count, problem.measure, open.mutable_data_ptr<bool>()},
      open.numel());
  const Tensor places = at::nonzero(open).view(-1);
  if (places.numel() > 0) {
    const Tensor exact = exact_distances(problem, rows.index_select(0, places), items.view(-1).index_select(0, places));
    distances.view(-1).index_copy_(0, places, exact);
    order(distances, items);
  }
  return {distances, items};
}

// The candidates of a block's queries.
class Candidates {
 public:
  Candidates(const Problem& problem, const Block& block, int64_t k)
      : problem_(problem),
        block_(block),
        k_(k),
        kept_(kept(k)),
        capacity_(capacity(problem, k)),
        thresholds_(at::full({block.count()}, kAlways, problem.gallery.squares.options().dtype(at::kFloat))) {
    for (Storage* storage : {&now_, &next_}) storage->make(block.count(), capacity_, thresholds_);
  }

  static int64_t capacity(const Problem& problem, int64_t k) {
    return std::min(problem.gallery.count(), kept(k) + kTileItems);
  }

  // Adds what the block's tile of items [first, first + items) holds.
  void read(int64_t first, int64_t items) {
    run(SelectItems{block_.near(), block_.far(), thresholds_.const_data_ptr<float>(), block_.columns(), block_.count(),
                    static_cast<int32_t>(first), now_.lists()},
        items * block_.columns());
    if (longest() <= kept_ || capacity_ == problem_.gallery.count()) return;
    shrink();
    if (longest() <= kept_) return;
    // More near-ties than the bounds can tell apart: keep exactly the k nearest so far.
    auto [distances, nearest] = finish();
    now_.sizes.zero_();
    run(RefillLists{distances.const_data_ptr<double>(), nearest.const_data_ptr<int64_t>(), k_, problem_.measure,
                    now_.lists()},
        nearest.numel());
    raise_thresholds(longest());
  }

  // The nearest: distances float64 (queries, k), items int64 (queries, k); infinite and -1 where there are fewer.
  std::pair<Tensor, Tensor> finish() {
    shrink();
    const int64_t queries = block_.count(), most = longest(), found = std::min(most, k_);
    Tensor distances = at::full({queries, k_}, kInfinity, problem_.gallery.squares.options());
    Tensor nearest = at::full({queries, k_}, -1, distances.options().dtype(at::kLong));
    if (most == 0) return {distances, nearest};
    const int64_t step = std::max<int64_t>(1, kSettledTogether / most);
    for (int64_t first = 0; first < queries; first += step) {
      const int64_t count = std::min(step, queries - first);
      const Tensor places = at::arange(most, nearest.options());
      const Tensor behind = places.ge(now_.sizes.narrow(0, first, count).unsqueeze(1));
      const Tensor items = now_.items.narrow(0, first, count).narrow(1, 0, most).to(at::kLong).masked_fill(behind, -1);
      const auto [settled, order] = settle(problem_, block_.first() + first, items);
      distances.narrow(0, first, count).narrow(1, 0, found).copy_(settled.narrow(1, 0, found));
      nearest.narrow(0, first, count).narrow(1, 0, found).copy_(order.narrow(1, 0, found));
    }
    return {distances, nearest};
  }

 private:
  struct Storage {
    void make(int64_t queries, int64_t capacity, const Tensor& like) {
      near = at::empty({queries, capacity}, like.options());
      far = at::empty(near.sizes(), near.options());
      items = at::empty({queries, capacity}, like.options().dtype(at::kInt));
      sizes = at::zeros({queries}, items.options());
    }
    Lists lists() {
      return {near.mutable_data_ptr<float>(), far.mutable_data_ptr<float>(), items.mutable_data_ptr<int32_t>(),
              sizes.mutable_data_ptr<int32_t>(), near.size(1)};
    }
    Tensor near, far, items, sizes;
  };

  // A tile is added to at most so many.
  static int64_t kept(int64_t k) { return 2 * k + kSpareCandidates; }

  int64_t longest() const {
    const int64_t size = now_.sizes.max().item<int32_t>();
    TORCH_INTERNAL_ASSERT(size <= capacity_);
    return size;
  }

  // To the score that k items surely reach.
  void raise_thresholds(int64_t most) {
    if (most < k_) return;
    const Tensor behind = at::arange(most, now_.sizes.options()).ge(now_.sizes.unsqueeze(1));
    const Tensor far = now_.far.narrow(1, 0, most).masked_fill(behind, kAlways);
    thresholds_ = thresholds_.maximum(std::get<0>(far.topk(k_, 1)).select(1, k_ - 1)).contiguous();
  }

  // Drops what cannot be among the k nearest.
  void shrink() {
    const int64_t most = longest();
    if (most <= k_) return;
    raise_thresholds(most);
    next_.sizes.zero_();
    run(ReselectItems{now_.lists(), next_.lists(), thresholds_.const_data_ptr<float>(), most}, block_.count() * most);
    std::swap(now_, next_);
  }

  const Problem& problem_;
  const Block& block_;
  int64_t k_, kept_, capacity_;
  Tensor thresholds_;
  Storage now_, next_;
};

// The positives of a block's queries, some at a time.
class Counter {
 public:
  Counter(const Problem& problem, const Block& block, const Positives& positives, int64_t count, int64_t* counts,
          bool* open)
      : problem_(problem), block_(block), positives_(positives), count_(count), counts_(counts), open_(open) {
    scores_ = at::empty({2, count}, problem.gallery.squares.options().dtype(at::kFloat));
    float* scores = scores_.mutable_data_ptr<float>();
    run(PositiveScores{positives, problem.measure, scores, scores + count}, count);
  }

  // Counts what the block's tile of items [first, first + items) holds.
  void read(int64_t first, int64_t items) {
    const float* scores = scores_.const_data_ptr<float>();
    const PositiveTile tile{block_.near(), block_.far(), scores, scores + count_, positives_, count_, block_.first(),
                            first, items, block_.columns()};
    const auto whole = problem_.gallery.squares.options().dtype(at::kLong);
    const Tensor undecided = at::empty({shares_of(items) * count_}, whole);
    run(CountSurelyCloser{tile, counts_, undecided.mutable_data_ptr<int64_t>()}, undecided.numel());
    const Tensor ends = at::cumsum(undecided, 0);
    const int64_t total = ends[-1].item<int64_t>();
    for (int64_t start = 0; start < total; start += kPairsTogether) {
      const int64_t pairs = std::min(kPairsTogether, total - start);
      const Tensor owners = at::empty({pairs}, whole), rows = at::empty({pairs}, whole);
      const Tensor others = at::empty({pairs}, whole);
      run(ListUndecided{tile, ends.const_data_ptr<int64_t>(), undecided.const_data_ptr<int64_t>(), start, start + pairs,
                        owners.mutable_data_ptr<int64_t>(), rows.mutable_data_ptr<int64_t>(),
                        others.mutable_data_ptr<int64_t>()},
          undecided.numel());
      decide(owners, rows, others);
    }
  }

 private:
  void decide(const Tensor& owners, const Tensor& rows, const Tensor& items) {
    const Tensor distances = quick_distances(problem_, rows, items);
    const Tensor undecided = at::empty({owners.numel()}, owners.options().dtype(at::kBool));
    run(DecidePairs{positives_, owners.const_data_ptr<int64_t>(), distances.const_data_ptr<double>(), problem_.measure,
                    counts_, open_, undecided.mutable_data_ptr<bool>()},
        owners.numel());
    const Tensor left = at::nonzero(undecided).view(-1);
    if (left.numel() == 0) return;
    const Tensor own = owners.index_select(0, left), item = items.index_select(0, left);
    const Tensor exact = exact_distances(problem_, rows.index_select(0, left), item);
    run(DecideExactly{positives_, own.const_data_ptr<int64_t>(), item.const_data_ptr<int64_t>(),
                      exact.const_data_ptr<double>(), counts_},
        left.numel());
  }

  const Problem& problem_;
  const Block& block_;
  Positives positives_;
  int64_t count_, *counts_;
  bool* open_;
  Tensor scores_;
};

}  // namespace

void search(const Problem& problem, const Planes& planes, int64_t k, const Excluded& excluded, const Tensor& distances,
            const Tensor& items) {
  const int64_t fitting = kListBytes / (Candidates::capacity(problem, k) * 24);
  const int64_t step = std::clamp<int64_t>(fitting, 1, kQueriesOfBlock), queries = problem.queries.count();
  for (int64_t first = 0; first < queries; first += step) {
    Block block(problem, planes, first, std::min(step, queries - first));
    Candidates candidates(problem, block, k);
    block.for_tiles(excluded, [&](int64_t item, int64_t count) { candidates.read(item, count); });
    const auto [nearest, numbers] = candidates.finish();
    distances.narrow(0, first, block.count()).copy_(nearest);
    items.narrow(0, first, block.count()).copy_(numbers);
  }
}

void count_before(const Problem& problem, const Planes& planes, const GivenPositives& given, const Excluded& excluded,
                  const Tensor& counts, const Tensor& open) {
  const int64_t* starts = given.host_offsets.const_data_ptr<int64_t>();
  const Tensor rows = at::repeat_interleave(given.offsets.diff(), std::optional<int64_t>(given.items.numel()));
  const int64_t queries = problem.queries.count();
  for (int64_t first = 0; first < queries; first += kQueriesOfBlock) {
    const int64_t count = std::min(kQueriesOfBlock, queries - first);
    if (starts[first] == starts[first + count]) continue;
    Block block(problem, planes, first, count);
    std::vector<Counter> counters;
    for (int64_t at = starts[first]; at < starts[first + count]; at += kPositivesTogether) {
      const Positives positives{rows.const_data_ptr<int64_t>() + at, given.items.const_data_ptr<int64_t>() + at,
                                given.distances.const_data_ptr<double>() + at, given.exact.const_data_ptr<bool>() + at};
      counters.emplace_back(problem, block, positives, std::min(kPositivesTogether, starts[first + count] - at),
                            counts.mutable_data_ptr<int64_t>() + at, open.mutable_data_ptr<bool>() + at);
    }
    block.for_tiles(excluded, [&](int64_t item, int64_t number) {
      for (Counter& counter : counters) counter.read(item, number);
    });
  }
}

}  // namespace gaitfast::retrieval_cuda
