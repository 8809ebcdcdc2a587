#include "cpu/simd.h"

#include <cstdlib>
#include <cstring>

namespace commvq {
namespace {

Simd of_machine() {
#if COMMVQ_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    return Simd::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Simd::avx2;
  }
#endif
  return Simd::portable;
}

Simd allowed() {
  const char* name = std::getenv("COMMVQ_SIMD");
  if (name != nullptr && std::strcmp(name, "portable") == 0) {
    return Simd::portable;
  }
  if (name != nullptr && std::strcmp(name, "avx2") == 0) {
    return Simd::avx2;
  }
  return Simd::avx512;
}

} // namespace

Simd simd_level() {
  static const Simd level = of_machine() < allowed() ? of_machine() : allowed();
  return level;
}

} // namespace commvq

// For `commvq doctor`, which reads it through ctypes.
extern "C" __attribute__((visibility("default"))) const char* commvq_simd_level() {
  switch (commvq::simd_level()) {
    case commvq::Simd::avx512:
      return "avx512";
    case commvq::Simd::avx2:
      return "avx2";
    default:
      return "portable";
  }
}
