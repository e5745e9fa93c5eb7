// Runs the bodies of retrieval/*.h on a device. Free of PyTorch's headers: nvcc alone compiles the kernels.
#pragma once

#include "retrieval/tiles.h"

namespace gaitfast::retrieval_cuda {

// body(i) for i in [0, count), in any order and at the same time, on `stream` (a cudaStream_t). Throws
// std::runtime_error when the launch fails.
template <class Body>
void launch(const Body& body, int64_t count, void* stream);

}  // namespace gaitfast::retrieval_cuda
