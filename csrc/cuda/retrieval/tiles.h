// What is done with a tile of scores, one index at a time: bounds, lists of candidates, counts, and what is left open.
//
// A tile holds gallery items [first, first + items) in its rows and the queries of a block in its columns, padded to
// `columns`. The true score of item i for query q lies in [far[i, q], near[i, q]]; both are -inf where it is excluded.
#pragma once

#include "features.h"

namespace gaitfast::retrieval_cuda {

constexpr float kFloatUnit = 0x1p-24f;
constexpr float kSpare = 1.01f;              // for the rounding of the bounds themselves
constexpr float kAlways = -0x1.fffffep127f;  // above the score of an excluded item, below any other

static_assert(kTileItems * kQueriesOfBlock <= INT32_MAX);

// Row and column of a place of the tile: in 32 bits, whose division is several times faster.
struct Place {
  uint32_t item, query;
  GAITFAST_BOTH Place(int64_t index, int64_t columns)
      : item(static_cast<uint32_t>(index) / static_cast<uint32_t>(columns)),
        query(static_cast<uint32_t>(index) - item * static_cast<uint32_t>(columns)) {}
};

// --- scores ----------------------------------------------------------------------------------------------------------

// products = high + cross / 254, or added to them where the depth goes on.
struct JoinProducts {
  const int32_t *high, *cross;
  bool first;
  float* products;

  GAITFAST_BOTH void operator()(int64_t index) const {
    const float sum = static_cast<float>(high[index]) + static_cast<float>(cross[index]) * (1.0f / 254.0f);
    products[index] = first ? sum : products[index] + sum;
  }
};

// What products leave out: csrc/cpu/retrieval/block.h. `rounding`: of a product in float32, relative to the lengths.
struct CosineBounds {
  const float* products;
  const Lengths *items, *queries;  // (items), (columns)
  int64_t columns;
  float rounding;
  float *near, *far;

  GAITFAST_BOTH void operator()(int64_t index) const {
    const Place place(index, columns);
    const Lengths item = items[place.item], query = queries[place.query];
    const float left_out = item.rest + query.rest + 0.5f * (item.low * item.low + query.low * query.low) + rounding;
    const float error = kSpare * left_out + 8.0f * kFloatUnit, score = products[index] * (item.unit * query.unit);
    near[index] = score + error;
    far[index] = score - error;
  }
};

// Of one part of one side: lengths (n, P), sums of squares in float32 and the roots of those rounded up, both (n, P).
struct PartSizes {
  const Lengths* lengths;
  const float *squares, *roots;
};

// Adds one part's distances; after the last one the sums become means.
struct EuclideanBounds {
  const float* products;
  PartSizes items, queries;
  int64_t columns, part, parts;
  float rounding;
  float *near, *far;

  GAITFAST_BOTH void operator()(int64_t index) const {
    const Place place(index, columns);
    const int64_t i = place.item * parts + part, q = place.query * parts + part;
    const Lengths item = items.lengths[i], query = queries.lengths[q];
    const float item_root = items.roots[i], query_root = queries.roots[q];
    const float both = items.squares[i] + queries.squares[q];
    const float square = both - 2.0f * (products[index] * (item.unit * query.unit));
    const float left_out = query_root * item.rest + query.rest * (item_root + item.rest) + query.low * item.low +
                           rounding * query_root * item_root;
    const float error = 2.0f * kSpare * left_out + 8.0f * kFloatUnit * both + 1e-30f;
    float nearest = part == 0 ? 0.0f : near[index], farthest = part == 0 ? 0.0f : far[index];
    nearest -= sqrtf(fmaxf(square - error, 0.0f));
    farthest -= sqrtf(fmaxf(square + error, 0.0f));
    if (part == parts - 1) {  // the roots and the sum are rounded too
      const float count = static_cast<float>(parts), slack = (count + 8.0f) * 2.0f * kFloatUnit;
      nearest *= (1.0f - slack) / count;
      farthest *= (1.0f + slack) / count;
    }
    near[index] = nearest;
    far[index] = farthest;
  }
};

// Takes out what does not exist for a query: `kSharers` threads for each.
constexpr int64_t kSharers = 32;

struct Exclude {
  const int64_t *offsets, *excluded;  // of the block's first query
  int64_t first, items, columns;
  float *near, *far;

  GAITFAST_BOTH void operator()(int64_t index) const {
    const int64_t query = index / kSharers;
    int64_t low = offsets[query], high = offsets[query + 1];
    const int64_t end = high;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (excluded[middle] < first) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    for (int64_t at = low + index % kSharers; at < end && excluded[at] < first + items; at += kSharers) {
      const int64_t place = (excluded[at] - first) * columns + query;
      near[place] = far[place] = -INFINITY;
    }
  }
};

// --- the nearest -----------------------------------------------------------------------------------------------------

// For each query the items that may be among its nearest, in any order: (queries, capacity), the first `sizes` filled.
struct Lists {
  float *near, *far;
  int32_t *items, *sizes;
  int64_t capacity;

  GAITFAST_BOTH void push(int64_t query, float near_score, float far_score, int32_t item) const {
    const int32_t slot = fetch_add(&sizes[query], 1);
    if (slot >= capacity) return;  // never: the caller leaves room for a whole tile, and looks at the sizes
    const int64_t at = query * capacity + slot;
    near[at] = near_score;
    far[at] = far_score;
    items[at] = item;
  }
};

// Adds the items of a tile that reach their query's threshold.
struct SelectItems {
  const float *near, *far, *thresholds;
  int64_t columns, queries;
  int32_t first;
  Lists lists;

  GAITFAST_BOTH void operator()(int64_t index) const {
    const Place place(index, columns);
    if (place.query < queries && near[index] >= thresholds[place.query]) {
      lists.push(place.query, near[index], far[index], first + static_cast<int32_t>(place.item));
    }
  }
};

// Copies of the first `most` places of each list what still reaches the threshold.
struct ReselectItems {
  Lists from, to;
  const float* thresholds;
  int64_t most;

  GAITFAST_BOTH void operator()(int64_t index) const {
    const int64_t query = index / most, slot = index % most, at = query * from.capacity + slot;
    if (slot < from.sizes[query] && from.near[at] >= thresholds[query]) {
      to.push(query, from.near[at], from.far[at], from.items[at]);
    }
  }
};

// Lists from settled distances and items (queries, count), -1 behind the last: the bounds are as tight as can be.
struct RefillLists {
  const double* distances;
  const int64_t* items;
  int64_t count;
  Measure measure;
  Lists lists;

  GAITFAST_BOTH void operator()(int64_t index) const {
    if (items[index] < 0) return;
    const double off = measure.tolerance(distances[index]);
    lists.push(index / count, measure.score_above(distances[index] - off), measure.score_below(distances[index] + off),
               static_cast<int32_t>(items[index]));
  }
};

// Of distances (n, count), ascending: which must be exact, because one of their neighbours is too close to tell, or
// because their float32 is in doubt.
struct MarkOpen {
  const double* distances;
  int64_t count;
  Measure measure;
  bool* open;

  GAITFAST_BOTH bool touch(int64_t index) const {  // this one and the one after
    const double a = distances[index], b = distances[index + 1];
    return b < INFINITY && b - measure.tolerance(b) <= a + measure.tolerance(a);
  }
  GAITFAST_BOTH void operator()(int64_t index) const {
    const double distance = distances[index];
    if (distance == INFINITY) {
      open[index] = false;
      return;
    }
    const int64_t place = index % count;
    const double off = measure.tolerance(distance);
    open[index] = (place > 0 && touch(index - 1)) || (place + 1 < count && touch(index)) ||
                  static_cast<float>(distance - off) != static_cast<float>(distance + off);
  }
};

// --- what comes before a positive ------------------------------------------------------------------------------------

// Positives (n) of a block's queries: item items[i] (any number outside of the gallery if it lies elsewhere) at
// distance distances[i] from query rows[i].
struct Positives {
  const int64_t *rows, *items;
  const double* distances;
  const bool* exact;
};

// A score above above[i] surely belongs to an item that is closer than positive i, one under below[i] to none.
struct PositiveScores {
  Positives positives;
  Measure measure;
  float *above, *below;

  GAITFAST_BOTH void operator()(int64_t i) const {
    const double distance = positives.distances[i], off = positives.exact[i] ? 0.0 : measure.tolerance(distance);
    above[i] = measure.score_above(distance - off);
    below[i] = fmaxf(measure.score_below(distance + off), kAlways);
  }
};

// The tile as positives see it, `kItemsOfShare` items at a time: share s of positive i is number s count + i.
constexpr int64_t kItemsOfShare = 64;
inline int64_t shares_of(int64_t items) { return (items + kItemsOfShare - 1) / kItemsOfShare; }

struct PositiveTile {
  const float *near, *far, *above, *below;
  Positives positives;
  int64_t count, first_query, first, items, columns;

  // Calls closer() and undecided(item of the gallery).
  template <class Closer, class Undecided>
  GAITFAST_BOTH void look(int64_t index, const Closer& closer, const Undecided& undecided) const {
    const int64_t i = index % count, query = positives.rows[i] - first_query, start = index / count * kItemsOfShare;
    const int64_t end = start + kItemsOfShare < items ? start + kItemsOfShare : items, own = positives.items[i] - first;
    const float surely = above[i], maybe = below[i];
    for (int64_t item = start; item < end; ++item) {
      if (far[item * columns + query] > surely) {
        closer();
      } else if (near[item * columns + query] >= maybe && item != own) {
        undecided(first + item);
      }
    }
  }
};

// Adds to counts (count) what is surely closer; undecided (shares, count): how many pairs the bounds leave open.
struct CountSurelyCloser {
  PositiveTile tile;
  int64_t *counts, *undecided;

  GAITFAST_BOTH void operator()(int64_t index) const {
    int64_t closer = 0, open = 0;
    tile.look(index, [&] { ++closer; }, [&](int64_t) { ++open; });
    if (closer > 0) add_to(&counts[index % tile.count], closer);
    undecided[index] = open;
  }
};

// Of the pairs that the bounds leave open those numbered [first, last), where share s ends before number ends[s].
struct ListUndecided {
  PositiveTile tile;
  const int64_t *ends, *undecided;
  int64_t first, last;
  int64_t *owners, *rows, *items;  // (last - first): the positive, its query, the item

  GAITFAST_BOTH void operator()(int64_t index) const {
    int64_t number = ends[index] - undecided[index];
    if (ends[index] <= first || number >= last) return;
    tile.look(index, [] {}, [&](int64_t item) {
      if (number >= first && number < last) {
        owners[number - first] = index % tile.count;
        rows[number - first] = tile.positives.rows[index % tile.count];
        items[number - first] = item;
      }
      ++number;
    });
  }
};

// Decides pairs by their float64 distances; what these cannot tell is `undecided` where the positive's own distance is
// exact, and makes the positive `open` where it is not.
struct DecidePairs {
  Positives positives;
  const int64_t* owners;
  const double* distances;
  Measure measure;
  int64_t* counts;
  bool *open, *undecided;

  GAITFAST_BOTH void operator()(int64_t pair) const {
    const int64_t i = owners[pair];
    const double own = positives.distances[i], own_off = positives.exact[i] ? 0.0 : measure.tolerance(own);
    const double distance = distances[pair], off = measure.tolerance(distance);
    undecided[pair] = false;
    if (distance + off < own - own_off) {
      add_to(&counts[i], 1);
    } else if (!(distance - off > own + own_off)) {
      if (positives.exact[i]) {
        undecided[pair] = true;
      } else {
        open[i] = true;
      }
    }
  }
};

// Decides pairs by their exact distances, ties by the lower item.
struct DecideExactly {
  Positives positives;
  const int64_t *owners, *items;
  const double* distances;
  int64_t* counts;

  GAITFAST_BOTH void operator()(int64_t pair) const {
    const int64_t i = owners[pair];
    const double own = positives.distances[i], distance = distances[pair];
    if (distance < own || (distance == own && items[pair] < positives.items[i])) add_to(&counts[i], 1);
  }
};

}  // namespace gaitfast::retrieval_cuda
