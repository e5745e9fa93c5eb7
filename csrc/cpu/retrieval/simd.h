// Which vector instructions run, decided once per call: the code is compiled for all of them, whatever the builder's CPU.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define GAITFAST_X86 1
#define GAITFAST_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define GAITFAST_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define GAITFAST_TARGET_VNNI \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define GAITFAST_TARGET_AMX \
  __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#else
#define GAITFAST_X86 0
#endif
#define GAITFAST_INLINE __attribute__((always_inline)) inline

namespace gaitfast::retrieval {

enum class Simd { generic, avx2, avx512, amx };

// The best that CPU and operating system offer, capped by GAITFAST_CPU=generic|avx2|avx512|amx (for tests and for
// measuring). Any other value of the variable is an error.
Simd simd();

// Whether the level avx512 has the products of int16 that are summed in int32 (VNNI).
bool has_vnni();

// Defines `name`, whose first parameter is `Simd level`: it runs name_body<use_fma> with `args`, compiled for the
// instructions of that level.
#if GAITFAST_X86
#define GAITFAST_MULTIVERSION(prefix, name, params, args)                                        \
  prefix GAITFAST_TARGET_AVX512 inline void name##_avx512 params { name##_body<true> args; }     \
  prefix GAITFAST_TARGET_AVX2 inline void name##_avx2 params { name##_body<true> args; }         \
  prefix inline void name##_generic params { name##_body<false> args; }                          \
  prefix inline void name params {                                                               \
    if (level == Simd::generic) {                                                                \
      name##_generic GAITFAST_WITH_LEVEL args;                                                   \
    } else if (level == Simd::avx2) {                                                            \
      name##_avx2 GAITFAST_WITH_LEVEL args;                                                      \
    } else {                                                                                     \
      name##_avx512 GAITFAST_WITH_LEVEL args;                                                    \
    }                                                                                            \
  }
#else
#define GAITFAST_MULTIVERSION(prefix, name, params, args) \
  prefix inline void name params { name##_body<false> args; }
#endif
#define GAITFAST_WITH_LEVEL(...) (level, __VA_ARGS__)

constexpr int64_t kLanes = 16;  // of the widest registers

}  // namespace gaitfast::retrieval
