// How much is done at once. No answer depends on it: tests/retrieval/emulated brings small sizes of its own.
#ifndef GAITFAST_RETRIEVAL_SIZES
#define GAITFAST_RETRIEVAL_SIZES

#include <cstdint>

namespace gaitfast::retrieval_cuda {

constexpr int64_t kDepth = 65536;  // values of a segment whose two products, high low + low high, fit int32
constexpr int64_t kTileItems = 4096, kQueriesOfBlock = 2048;  // multiples of 32
constexpr int64_t kSpareCandidates = 512;                     // beyond 2 k, of each query: more raise its threshold
constexpr int64_t kListBytes = 256 << 20;                     // of a block's candidates, about
constexpr int64_t kSettledTogether = 1 << 21;                 // candidates
constexpr int64_t kPositivesTogether = 1 << 16;
constexpr int64_t kPairsTogether = 1 << 20;
constexpr int64_t kScratch = 1 << 21;  // numbers of a scratch tensor, about

}  // namespace gaitfast::retrieval_cuda

#endif
