// Compiles the header named by COMMVQ_KERNEL once for every SIMD level, each in its own namespace:
// commvq::portable, commvq::avx2 and commvq::avx512. No include guard: include it once per kernel.
//
// Inside these regions call nothing from the standard library. A template or inline function that
// was first used here could be compiled for AVX-512 and then be the copy that the linker keeps for
// everybody. Include what a kernel needs before this file.
#include "cpu/simd.h"

#include <cstdint>
#if COMMVQ_X86
#include <immintrin.h>
#endif

#define COMMVQ_INLINE static inline __attribute__((always_inline))

#define COMMVQ_LANES 4
namespace commvq::portable {
#include "cpu/lanes.h"
#include COMMVQ_KERNEL
} // namespace commvq::portable
#undef COMMVQ_LANES

#if COMMVQ_X86

#define COMMVQ_LANES 8
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#endif
namespace commvq::avx2 {
#include "cpu/lanes.h"
#include COMMVQ_KERNEL
} // namespace commvq::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef COMMVQ_LANES

#define COMMVQ_LANES 16
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi2"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi2")
#endif
namespace commvq::avx512 {
#include "cpu/lanes.h"
#include COMMVQ_KERNEL
} // namespace commvq::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef COMMVQ_LANES

#endif // COMMVQ_X86

namespace commvq {
// What the header calls `kernels`, of the level that simd_level() names.
static inline decltype(portable::kernels)& level_kernels() {
#if COMMVQ_X86
  if (simd_level() == Simd::avx512) {
    return avx512::kernels;
  }
  if (simd_level() == Simd::avx2) {
    return avx2::kernels;
  }
#endif
  return portable::kernels;
}
} // namespace commvq

#undef COMMVQ_INLINE
#undef COMMVQ_KERNEL
