// The two passes over a gallery that answer questions. What they take and return stands in ../../library.cpp.
#pragma once

#include "problem.h"

namespace gaitfast::retrieval_cuda {

// Writes the k nearest: distances float64 (Q, k), items int64 (Q, k).
void search(const Problem& problem, const Planes& planes, int64_t k, const Excluded& excluded, const Tensor& distances,
            const Tensor& items);

// Given items of the queries, `offsets` int64 (Q + 1) and a copy of them on the host: query q has the positives
// [offsets[q], offsets[q + 1]) of items int64 (n), distances float64 (n), exact bool (n).
struct GivenPositives {
  Tensor offsets, host_offsets, items, distances, exact;
};

// Adds to counts int64 (n), sets open bool (n).
void count_before(const Problem& problem, const Planes& planes, const GivenPositives& given,
                  const Excluded& excluded, const Tensor& counts, const Tensor& open);

}  // namespace gaitfast::retrieval_cuda
