// The CUDA implementation of exact retrieval, whole, on the CPU: the folder of this file stands before PyTorch's headers,
// a C++ compiler makes loops of the kernels, and the operators get a namespace of their own.
#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(name, device, m) \
  static void register_emulated(torch::Library&);  \
  static const torch::detail::TorchLibraryInit emulated(torch::Library::IMPL, &register_emulated, "gaitfast_emulated", \
                                                        c10::DispatchKey::CPU, __FILE__, __LINE__); \
  static void register_emulated(torch::Library& m)

#include "sizes.h"
//
#include "cuda/retrieval.cpp"
#include "cuda/retrieval/passes.cpp"
#include "cuda/retrieval/problem.cpp"
#include "cuda/retrieval_kernels.cu"
