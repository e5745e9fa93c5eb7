// Sizes so small that every loop of the CUDA implementation goes round more than once.
#define GAITFAST_RETRIEVAL_SIZES

#include <cstdint>

namespace gaitfast::retrieval_cuda {

constexpr int64_t kDepth = 32;
constexpr int64_t kTileItems = 64, kQueriesOfBlock = 32;
constexpr int64_t kSpareCandidates = 4;
constexpr int64_t kListBytes = 40000;
constexpr int64_t kSettledTogether = 400;
constexpr int64_t kPositivesTogether = 50;
constexpr int64_t kPairsTogether = 90;
constexpr int64_t kScratch = 2000;

}  // namespace gaitfast::retrieval_cuda
