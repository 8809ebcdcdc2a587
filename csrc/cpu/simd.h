// Which SIMD level the CPU kernels use, chosen once when the first kernel runs.
//
// Kernels are compiled once a level (see each_level.h) and never with -march=native, so that one
// binary runs on every x86-64 and on ARM. All levels give the same bits: kernels fix the order of
// every sum, and the build switches floating-point contraction off.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define COMMVQ_X86 1
#else
#define COMMVQ_X86 0
#endif

namespace commvq {

enum class Simd { portable = 0, avx2 = 1, avx512 = 2 };

// The best level that this machine and COMMVQ_SIMD (portable, avx2 or avx512) allow.
Simd simd_level();

} // namespace commvq
