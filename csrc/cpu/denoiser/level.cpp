// Which table runs: decided at every call, like retrieval's instructions.
#include "../../ops.h"
#include "../retrieval/simd.h"
#include "kernels.h"

#if GAITFAST_X86
#include <cpuid.h>
#endif

namespace gaitfast::denoiser {
namespace {

// AMX and AVX-512, both with bfloat16: retrieval asks for neither.
bool has_bfloat16_tiles() {
#if GAITFAST_X86
  static const bool found = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & (1u << 22));
    return tiles && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
  }();
  return found;
#else
  return false;
#endif
}

}  // namespace

const Kernels& kernels() {
  switch (retrieval::simd()) {
    case retrieval::Simd::generic:
      return kGenericKernels;
    case retrieval::Simd::avx2:
      return kAvx2Kernels;
    case retrieval::Simd::avx512:
      return kAvx512Kernels;
    default:
      return has_bfloat16_tiles() ? kAmxKernels : kAvx512Kernels;
  }
}

std::string instructions() {
  const Kernels* own = &kernels();
  return own == &kAmxKernels ? "amx" : own == &kAvx512Kernels ? "avx512" : own == &kAvx2Kernels ? "avx2" : "generic";
}

}  // namespace gaitfast::denoiser
