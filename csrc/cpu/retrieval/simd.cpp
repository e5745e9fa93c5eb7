#include "simd.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

#if GAITFAST_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gaitfast::retrieval {
namespace {

#if GAITFAST_X86
// Tiles need the kernel's permission once per process: their registers make every saved context 8 KiB larger.
bool amx_permitted() {
#if defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool amx_in_hardware() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  return (d & kTile) && (d & kInt8);
}
#endif

Simd detect() {
#if GAITFAST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return amx_in_hardware() && amx_permitted() ? Simd::amx : Simd::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Simd::avx2;
#endif
  return Simd::generic;
}

}  // namespace

bool has_vnni() {
#if GAITFAST_X86
  static const bool there = detect() >= Simd::avx512 && __builtin_cpu_supports("avx512vnni");
  return there;
#else
  return false;
#endif
}

Simd simd() {
  static const Simd best = detect();
  const char* cap = std::getenv("GAITFAST_CPU");
  if (cap == nullptr || *cap == '\0') return best;
  const std::string name = cap;
  const char* names[] = {"generic", "avx2", "avx512", "amx"};
  for (int level = 0; level < 4; ++level) {
    if (name == names[level]) return best < static_cast<Simd>(level) ? best : static_cast<Simd>(level);
  }
  TORCH_CHECK(false, "GAITFAST_CPU=", name, ": unknown; choose generic, avx2, avx512 or amx");
}

}  // namespace gaitfast::retrieval
