// Compiled for AVX-512 with bfloat16 and for AMX tiles, whatever the builder's CPU. Headers of others come before the
// pragma, so that nothing of theirs is compiled for it.
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside GCC 12's own intrinsics
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define GAITFAST_LEVEL 3
#else
#define GAITFAST_LEVEL 0
#endif
#define GAITFAST_TABLE kAmxKernels
#include "table.h"
