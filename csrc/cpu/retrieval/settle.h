// Exact order among a few items of one query: quick distances decide nearly all, exact ones what is left.
#pragma once

#include <mutex>
#include <unordered_map>
#include <vector>

#include "distance.h"

namespace gaitfast::retrieval {

// Which gallery items are equal, byte for byte. Found when first asked for: only ties need it.
class EqualItems {
 public:
  explicit EqualItems(const Pairs& pairs) : pairs_(pairs) {}
  // The lowest item that equals `item`.
  int64_t first(int64_t item);

 private:
  void find();

  const Pairs& pairs_;
  std::once_flag found_;
  std::vector<int32_t> first_;
};

// Exact distances of one query, each computed once for all items that are equal.
class ExactDistances {
 public:
  ExactDistances(const Pairs& pairs, EqualItems& equal) : pairs_(pairs), equal_(equal) {}
  void start(int64_t query) { query_ = query, known_.clear(); }
  double operator()(int64_t item);
  // `next`: the item that is asked for next, so that its features are on their way.
  double quick(int64_t item, int64_t next) { return pairs_.value(query_, item, next, scratch_); }

 private:
  const Pairs& pairs_;
  EqualItems& equal_;
  Pairs::Scratch scratch_;
  int64_t query_ = 0;
  std::unordered_map<int64_t, double> known_;
};

struct Neighbour {
  double distance;
  int64_t item;
};

// Puts the `count` nearest first, in the order of (exact distance, item); with the distance of each good enough that its
// float32 is that of the exact one. On entry the distances are quick or exact.
void settle(std::vector<Neighbour>& items, int64_t count, const Tolerance& tolerance, ExactDistances& exact);

}  // namespace gaitfast::retrieval
