// Compiled for AVX2 with FMA, whatever the builder's CPU. Headers of others come before the pragma, so that nothing of
// theirs is compiled for it.
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define GAITFAST_LEVEL 1
#else
#define GAITFAST_LEVEL 0
#endif
#define GAITFAST_TABLE kAvx2Kernels
#include "table.h"
