#include "settle.h"

#include <cstring>
#include <numeric>
#include <string_view>

#include "workers.h"

namespace gaitfast::retrieval {

void EqualItems::find() {
  const int64_t count = pairs_.gallery_shape().rows;
  const auto view = [&](int64_t item) {
    const auto [data, size] = pairs_.bytes(item);
    return std::string_view(data, size);
  };
  std::vector<size_t> hashes(count);
  constexpr int64_t kItemsOfTask = 256;
  parallel((count + kItemsOfTask - 1) / kItemsOfTask, [&](int64_t task) {
    for (int64_t i = task * kItemsOfTask; i < std::min(count, (task + 1) * kItemsOfTask); ++i) {
      // Of a sample: whole items would have to be read. Equal items have equal sums of squares.
      constexpr size_t kBeginning = 64, kOdd = 0x9e3779b97f4a7c15;
      const auto [sums, size] = pairs_.squares(i);
      const std::hash<std::string_view> hash;
      hashes[i] = hash({sums, size}) * kOdd + hash(view(i).substr(0, kBeginning));
    }
  });
  std::vector<int32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int32_t a, int32_t b) { return hashes[a] != hashes[b] ? hashes[a] < hashes[b] : a < b; });
  first_.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t item = order[i];
    first_[item] = item;
    // Equal hashes mostly mean equal items; of different ones that collide the later ones stay on their own.
    if (i > 0 && hashes[item] == hashes[order[i - 1]]) {
      const int32_t earlier = first_[order[i - 1]];
      if (view(item) == view(earlier)) first_[item] = earlier;
    }
  }
}

int64_t EqualItems::first(int64_t item) {
  std::call_once(found_, [&] { find(); });
  return first_[item];
}

double ExactDistances::operator()(int64_t item) {
  const int64_t first = equal_.first(item);
  const auto [place, unknown] = known_.try_emplace(first, 0.0);
  if (unknown) place->second = pairs_.exact(query_, first, scratch_);
  return place->second;
}

void settle(std::vector<Neighbour>& items, int64_t count, const Tolerance& tolerance, ExactDistances& exact) {
  const auto nearer = [](const Neighbour& a, const Neighbour& b) {
    return a.distance != b.distance ? a.distance < b.distance : a.item < b.item;
  };
  std::sort(items.begin(), items.end(), nearer);
  const int64_t size = items.size();
  for (int64_t start = 0, end; start < std::min(size, count); start = end) {
    const auto reach = [&](int64_t i) { return tolerance(items[i].distance); };
    // A run of items whose intervals touch, each that of its neighbour.
    for (end = start + 1; end < size && items[end].distance - reach(end) <= items[end - 1].distance + reach(end - 1);) {
      ++end;
    }
    if (end - start > 1) {
      for (int64_t i = start; i < end; ++i) items[i].distance = exact(items[i].item);
      std::sort(items.begin() + start, items.begin() + end, nearer);
    } else {
      double& distance = items[start].distance;
      const double off = reach(start);
      if (static_cast<float>(distance - off) != static_cast<float>(distance + off)) distance = exact(items[start].item);
    }
  }
  if (size > count) items.resize(count);
}

}  // namespace gaitfast::retrieval
