// A thread block's algorithm, written once: nvcc compiles it for a GPU, any C++20 compiler for the
// tests, which run all threads of a block in turn.
//
// A block's code is a row of phases. Within a phase every thread (each_thread) or warp (each_warp)
// works for itself; sync_block() stands between phases. What a thread keeps in registers beyond a
// phase is PerThread: one value on a GPU, one a thread on the host. Operations of a whole warp
// (mma, transpose, warp_max, warp_sum) take functions that give a thread's operands.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define COMMVQ_HD __host__ __device__ __forceinline__
#define COMMVQ_UNROLL _Pragma("unroll")
#define COMMVQ_UNROLL_SOME _Pragma("unroll 4")
#else
#define COMMVQ_HD inline
#define COMMVQ_UNROLL
#define COMMVQ_UNROLL_SOME
#endif

#if defined(__CUDA_ARCH__)
#define COMMVQ_DEVICE 1
#else
#define COMMVQ_DEVICE 0
#include <cmath>
#include <cstring>
#endif

namespace commvq::gpu {

constexpr int kWarp = 32;

#if !COMMVQ_DEVICE
// Threads and warps in falling order: a result that depends on the order is a race.
inline bool run_backwards = false;
#endif

template <class T, int kThreads>
struct PerThread {
#if COMMVQ_DEVICE
  T own;
  __device__ __forceinline__ T& operator[](int) { return own; }
#else
  T all[kThreads];
  T& operator[](int thread) { return all[thread]; }
#endif
};

template <int kThreads, class Phase>
COMMVQ_HD void each_thread(const Phase& phase) {
#if COMMVQ_DEVICE
  phase(static_cast<int>(threadIdx.x));
#else
  for (int i = 0; i < kThreads; ++i) {
    phase(run_backwards ? kThreads - 1 - i : i);
  }
#endif
}

template <int kWarps, class Phase>
COMMVQ_HD void each_warp(const Phase& phase) {
#if COMMVQ_DEVICE
  phase(static_cast<int>(threadIdx.x) / kWarp);
#else
  for (int i = 0; i < kWarps; ++i) {
    phase(run_backwards ? kWarps - 1 - i : i);
  }
#endif
}

// The threads of one warp, which stay in step.
template <class Work>
COMMVQ_HD void each_lane([[maybe_unused]] int warp, const Work& work) {
#if COMMVQ_DEVICE
  work(static_cast<int>(threadIdx.x));
#else
  for (int lane = 0; lane < kWarp; ++lane) {
    work(warp * kWarp + lane);
  }
#endif
}

COMMVQ_HD void sync_block() {
#if COMMVQ_DEVICE
  __syncthreads();
#endif
}

COMMVQ_HD void sync_warp() {
#if COMMVQ_DEVICE
  __syncwarp();
#endif
}

// Two numbers in half precision. On the host a half is a float that is rounded after every step.
#if COMMVQ_DEVICE
using Half2 = __half2;

COMMVQ_HD Half2 half2_of(float x, float y) {
  return __floats2half2_rn(x, y);
}
// a * b + c
COMMVQ_HD Half2 fma2(Half2 a, Half2 b, Half2 c) {
  return __hfma2(a, b, c);
}
COMMVQ_HD float low(Half2 x) {
  return __low2float(x);
}
COMMVQ_HD float high(Half2 x) {
  return __high2float(x);
}
// Bytes 2 * kHalf and 2 * kHalf + 1 of a word, each times 2^-24: a byte is a subnormal half.
template <int kHalf>
COMMVQ_HD Half2 bytes(uint32_t word) {
  const uint32_t bits = __byte_perm(word, 0u, kHalf == 0 ? 0x4140 : 0x4342);
  return *reinterpret_cast<const Half2*>(&bits);
}
// (x + i y) * (c + i s) for turn = (c, s)
COMMVQ_HD Half2 rotated(Half2 x, Half2 turn) {
  const Half2 swapped = __lowhigh2highlow(x);
  const uint32_t bits = *reinterpret_cast<const uint32_t*>(&swapped) ^ 0x00008000u; // (-y, x)
  const Half2 cross = __hmul2(*reinterpret_cast<const Half2*>(&bits), __high2half2(turn));
  return __hfma2(x, __low2half2(turn), cross);
}
#else
struct Half2 {
  float x, y;
};

inline float round_half(float value) {
  if (!(std::fabs(value) < 65520.0f)) {
    return std::isnan(value) ? value : std::copysign(INFINITY, value);
  }
  int exponent = 0;
  std::frexp(value, &exponent); // value = m * 2^exponent, 0.5 <= |m| < 1
  const int last = (exponent < -13 ? -13 : exponent) - 11;
  return std::ldexp(std::nearbyint(std::ldexp(value, -last)), last);
}
inline float fma_half(float a, float b, float c) {
  return round_half(static_cast<float>(static_cast<double>(a) * b + c));
}
inline Half2 half2_of(float x, float y) {
  return {round_half(x), round_half(y)};
}
inline Half2 fma2(Half2 a, Half2 b, Half2 c) {
  return {fma_half(a.x, b.x, c.x), fma_half(a.y, b.y, c.y)};
}
inline float low(Half2 x) {
  return x.x;
}
inline float high(Half2 x) {
  return x.y;
}
template <int kHalf>
inline Half2 bytes(uint32_t word) {
  const uint32_t bits = word >> (16 * kHalf);
  return {
      std::ldexp(static_cast<float>(bits & 255), -24),
      std::ldexp(static_cast<float>(bits >> 8 & 255), -24)};
}
inline Half2 rotated(Half2 x, Half2 turn) {
  const Half2 cross = {round_half(x.y * -turn.y), round_half(x.x * turn.y)};
  return fma2(x, {turn.x, turn.x}, cross);
}
#endif

// Operands of mma: what one thread holds. With lane = 4 * g + t:
struct MmaA { // 16 x 16: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its right
  Half2 part[4];
};
struct MmaB { // 16 x 8: (2t, g), (2t + 8, g), each with the one below
  Half2 part[2];
};

// c += a b by the tensor cores, sums in float32. a(thread) and b(thread) give MmaA and MmaB,
// c(thread) a pointer to 4 floats: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1) of 16 x 8.
template <class A, class B, class C>
COMMVQ_HD void mma([[maybe_unused]] int warp, const A& a, const B& b, const C& c) {
#if COMMVQ_DEVICE
  MmaA left = a(static_cast<int>(threadIdx.x));
  MmaB right = b(static_cast<int>(threadIdx.x));
  float* sum = c(static_cast<int>(threadIdx.x));
  const auto bits = [](Half2& x) -> uint32_t& { return *reinterpret_cast<uint32_t*>(&x); };
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(bits(left.part[0])),
        "r"(bits(left.part[1])),
        "r"(bits(left.part[2])),
        "r"(bits(left.part[3])),
        "r"(bits(right.part[0])),
        "r"(bits(right.part[1])));
#else
  float left[16][16], right[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const MmaA own = a(warp * kWarp + lane);
    const MmaB other = b(warp * kWarp + lane);
    for (int i = 0; i < 4; ++i) {
      left[g + i % 2 * 8][2 * t + i / 2 * 8] = own.part[i].x;
      left[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = own.part[i].y;
    }
    for (int i = 0; i < 2; ++i) {
      right[2 * t + i * 8][g] = other.part[i].x;
      right[2 * t + i * 8 + 1][g] = other.part[i].y;
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* sum = c(warp * kWarp + lane);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) {
        sum[i] += left[row][k] * right[k][column];
      }
    }
  }
#endif
}

// Transposes an 8 x 8 matrix of halves: thread 4 * g + t holds (g, 2t) and (g, 2t + 1) of it in
// x(thread), and then of the transpose.
template <class X>
COMMVQ_HD void transpose([[maybe_unused]] int warp, const X& x) {
#if COMMVQ_DEVICE
  Half2& own = x(static_cast<int>(threadIdx.x));
  uint32_t& bits = *reinterpret_cast<uint32_t*>(&own);
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(bits) : "r"(bits));
#else
  float matrix[8][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Half2 own = x(warp * kWarp + lane);
    matrix[lane / 4][lane % 4 * 2] = own.x;
    matrix[lane / 4][lane % 4 * 2 + 1] = own.y;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    x(warp * kWarp + lane) = {matrix[lane % 4 * 2][lane / 4], matrix[lane % 4 * 2 + 1][lane / 4]};
  }
#endif
}

// Joins x(thread) of the lanes that differ in the bits of `kLanes` only, each getting the result.
template <int kLanes, class X, class Join>
COMMVQ_HD void warp_join([[maybe_unused]] int warp, const X& x, const Join& join) {
#if COMMVQ_DEVICE
  auto& own = x(static_cast<int>(threadIdx.x));
  COMMVQ_UNROLL
  for (int bit = 16; bit > 0; bit /= 2) {
    if (kLanes & bit) {
      own = join(own, own.from(bit));
    }
  }
#else
  for (int bit = 16; bit > 0; bit /= 2) {
    if ((kLanes & bit) == 0) {
      continue;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((lane & bit) == 0) {
        auto& one = x(warp * kWarp + lane);
        auto& other = x(warp * kWarp + (lane | bit));
        const auto first = join(one, other), second = join(other, one);
        one = first;
        other = second;
      }
    }
  }
#endif
}

// A float that warp_join can pass between lanes.
struct Shared {
  float value;
#if COMMVQ_DEVICE
  __device__ __forceinline__ Shared from(int bit) const {
    return {__shfl_xor_sync(0xffffffffu, value, bit)};
  }
#endif
};

// A score and the candidate that has it; warp_join can pass it between lanes.
struct Candidate {
  float score;
  int index;
#if COMMVQ_DEVICE
  __device__ __forceinline__ Candidate from(int bit) const {
    return {__shfl_xor_sync(0xffffffffu, score, bit), __shfl_xor_sync(0xffffffffu, index, bit)};
  }
#endif
};

// 2^x to 22 bits; what is below 2^-126 is 0.
COMMVQ_HD float power_of_two(float x) {
#if COMMVQ_DEVICE
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

COMMVQ_HD float larger(float a, float b) {
  return a > b ? a : b;
}

COMMVQ_HD float infinity() {
#if COMMVQ_DEVICE
  return __int_as_float(0x7f800000);
#else
  return INFINITY;
#endif
}

// What a half with these bits is.
COMMVQ_HD float float_of_half_bits(uint32_t bits) {
#if COMMVQ_DEVICE
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
#else
  const int exponent = static_cast<int>(bits >> 10 & 31), mantissa = static_cast<int>(bits & 1023);
  float size = std::ldexp(
      static_cast<float>(mantissa + (exponent > 0 ? 1024 : 0)), (exponent > 0 ? exponent : 1) - 25);
  if (exponent == 31) {
    size = mantissa == 0 ? INFINITY : NAN;
  }
  return bits >> 15 & 1 ? -size : size;
#endif
}

// Four bytes of memory as a word, the first one lowest; `memory` on a word's boundary.
COMMVQ_HD uint32_t load_word(const void* memory) {
#if COMMVQ_DEVICE
  return *static_cast<const uint32_t*>(memory);
#else
  uint32_t word;
  std::memcpy(&word, memory, sizeof(word));
  return word;
#endif
}

} // namespace commvq::gpu
