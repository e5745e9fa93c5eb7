// The two passes over a gallery that answer questions, and how their work is shared out among threads.
#pragma once

#include "block.h"
#include "workers.h"

namespace gaitfast::retrieval {

// The k nearest items of each query in the order of (exact distance, item): distances (Q, k), good enough that their
// float32 is the exact one's, and items (Q, k). Where fewer than k exist: infinite and -1.
void search(const Problem& problem, int64_t k, const Excluded& excluded, double* distances, int64_t* items);

// Given items of the queries: positive n, owned by the query q with offsets[q] <= n < offsets[q + 1], is gallery item
// items[n] (its number in this gallery; any number outside of it if it lies elsewhere) at distance distances[n].
struct Positives {
  const int64_t* offsets;
  const int64_t* items;
  const double* distances;
  const bool* exact;  // whether the distance is the exact one
};

// For each positive how many items of this gallery come before it. open[n]: its distance was not exact, and one of the
// items is too close to tell; its count then means nothing.
void count_closer(const Problem& problem, const Positives& positives, const Excluded& excluded, int64_t* counts,
                  bool* open);

// Queries of a block for integer products: as many as stay in the second-level cache, or half of them where this shares the
// work out more evenly.
inline int64_t tiled_columns(int64_t queries, const Segments& segments, Form form) {
  constexpr int64_t kBytes = 15 << 16;  // half of a second-level cache
  const int64_t threads = at::get_num_threads();
  const int64_t row_bytes = form == Form::bytes ? 2 * kTileDepth * std::min(segments.tiles, kTilesOfStep)
                                                : kTileDepth * std::min(segments.tiles, kWordTilesOfStep);
  const int64_t most = std::clamp<int64_t>(kBytes / row_bytes / kRowsOfPanel, 1, 8) * kRowsOfPanel;
  const auto longest = [&](int64_t columns) {  // queries of the busiest thread
    return ((queries + columns - 1) / columns + threads - 1) / threads * columns;
  };
  int64_t best = most;
  for (int64_t columns = most - kRowsOfPanel; 2 * columns >= most; columns -= kRowsOfPanel) {
    if (columns > 0 && longest(columns) < longest(best)) best = columns;
  }
  return best;
}

// With integers a thread works on a block of its own; a float32 product uses all threads by itself, and they share
// the reading of its result.
template <class Work>
void for_blocks(const Problem& problem, const Work& work) {
  constexpr int64_t kFloatColumns = 1024;
  const int64_t queries = problem.queries.shape().rows;
  if (!problem.tiled()) {
    for (int64_t first = 0; first < queries; first += kFloatColumns) {
      Block block(problem, first, std::min(kFloatColumns, queries - first));
      work(block);
    }
    return;
  }
  const int64_t columns = tiled_columns(queries, problem.queries.segments(), problem.form);
  parallel((queries + columns - 1) / columns, [&](int64_t task) {
    Block block(problem, task * columns, std::min(columns, queries - task * columns));
    work(block);
  });
}

template <class Work>
void for_columns(const Problem& problem, const Block& block, const Work& work) {
  if (problem.tiled()) return work(0, block.columns());
  constexpr int64_t kColumnsOfTask = 64;
  const int64_t columns = block.columns();
  parallel((columns + kColumnsOfTask - 1) / kColumnsOfTask, [&](int64_t task) {
    work(task * kColumnsOfTask, std::min(columns, (task + 1) * kColumnsOfTask));
  });
}

}  // namespace gaitfast::retrieval
