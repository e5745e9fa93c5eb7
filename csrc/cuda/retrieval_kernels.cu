#include "retrieval_kernels.cuh"

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#endif

namespace gaitfast::retrieval_cuda {

#ifdef __CUDACC__

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 20;

template <class Body>
__global__ void __launch_bounds__(kThreads) each(const Body body, const int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) body(i);
}

template <class Body>
void launch(const Body& body, int64_t count, void* stream) {
  if (count <= 0) return;
  const auto blocks = static_cast<unsigned>(std::min((count + kThreads - 1) / kThreads, kMostBlocks));
  each<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(body, count);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("retrieval: ") + cudaGetErrorString(error));
}

#else

// A C++ compiler alone makes an emulation of it: backwards, so that nothing leans on an order.
template <class Body>
void launch(const Body& body, int64_t count, void*) {
  while (count > 0) body(--count);
}

#endif

#define GAITFAST_LAUNCH(...) template void launch(const __VA_ARGS__&, int64_t, void*);
#define GAITFAST_LAUNCH_FEATURES(T)  \
  GAITFAST_LAUNCH(LaneSums<T>)       \
  GAITFAST_LAUNCH(ExactLeaves<T>)    \
  GAITFAST_LAUNCH(LargestValues<T>)  \
  GAITFAST_LAUNCH(SplitRows<T>)

GAITFAST_LAUNCH_FEATURES(float)
GAITFAST_LAUNCH_FEATURES(Half)
GAITFAST_LAUNCH_FEATURES(BFloat16)
GAITFAST_LAUNCH(PartSquares)
GAITFAST_LAUNCH(PairDistances)
GAITFAST_LAUNCH(ExactSums)
GAITFAST_LAUNCH(ExactParts)
GAITFAST_LAUNCH(ExactMeans)
GAITFAST_LAUNCH(SegmentUnits)
GAITFAST_LAUNCH(SegmentLengths)
GAITFAST_LAUNCH(JoinProducts)
GAITFAST_LAUNCH(CosineBounds)
GAITFAST_LAUNCH(EuclideanBounds)
GAITFAST_LAUNCH(Exclude)
GAITFAST_LAUNCH(SelectItems)
GAITFAST_LAUNCH(ReselectItems)
GAITFAST_LAUNCH(RefillLists)
GAITFAST_LAUNCH(MarkOpen)
GAITFAST_LAUNCH(PositiveScores)
GAITFAST_LAUNCH(CountSurelyCloser)
GAITFAST_LAUNCH(ListUndecided)
GAITFAST_LAUNCH(DecidePairs)
GAITFAST_LAUNCH(DecideExactly)

}  // namespace gaitfast::retrieval_cuda
