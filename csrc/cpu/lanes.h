// Vectors of COMMVQ_LANES floats or whole numbers, and the few operations that the compiler's own
// +, - and * on them leave out. Included by each_level.h inside a level's namespace; no include
// guard on purpose.

typedef float Lanes __attribute__((vector_size(4 * COMMVQ_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * COMMVQ_LANES)));
typedef float LanesInMemory __attribute__((vector_size(4 * COMMVQ_LANES), aligned(4), may_alias));

COMMVQ_INLINE Lanes load(const float* from) {
  return *reinterpret_cast<const LanesInMemory*>(from);
}

COMMVQ_INLINE void store(float* to, Lanes value) {
  *reinterpret_cast<LanesInMemory*>(to) = value;
}

COMMVQ_INLINE Lanes broadcast(float value) {
  return value - Lanes{};
}

// a * b + sum, rounded once, so that it is the same at every level (contraction is off elsewhere).
COMMVQ_INLINE Lanes fused(Lanes a, Lanes b, Lanes sum) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif COMMVQ_X86 && COMMVQ_LANES == 8
  return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  for (int lane = 0; lane < COMMVQ_LANES; ++lane) {
    sum[lane] = __builtin_fmaf(a[lane], b[lane], sum[lane]);
  }
  return sum;
#endif
}

// The smaller of each pair; `b` where either is a NaN.
COMMVQ_INLINE Lanes smaller(Lanes a, Lanes b) {
  return a < b ? a : b;
}

// The larger of each pair; `b` where either is a NaN.
COMMVQ_INLINE Lanes larger(Lanes a, Lanes b) {
  return a > b ? a : b;
}

#if !COMMVQ_X86
template <class Comparison>
COMMVQ_INLINE uint64_t as_bits(Comparison holds) {
  uint64_t bits = 0;
  for (int lane = 0; lane < COMMVQ_LANES; ++lane) {
    bits |= static_cast<uint64_t>(holds[lane] & 1) << lane;
  }
  return bits;
}
#endif

// Bit j is set where a[j] < b[j]; never for a NaN.
COMMVQ_INLINE uint64_t less(Lanes a, Lanes b) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
#elif COMMVQ_X86 && COMMVQ_LANES == 8
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ)));
#elif COMMVQ_X86 && COMMVQ_LANES == 4
  return static_cast<unsigned>(_mm_movemask_ps(_mm_cmplt_ps((__m128)a, (__m128)b)));
#else
  return as_bits(a < b);
#endif
}

// Bit j is set where a[j] <= b[j]; never for a NaN.
COMMVQ_INLINE uint64_t at_most(Lanes a, Lanes b) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
#elif COMMVQ_X86 && COMMVQ_LANES == 8
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LE_OQ)));
#elif COMMVQ_X86 && COMMVQ_LANES == 4
  return static_cast<unsigned>(_mm_movemask_ps(_mm_cmple_ps((__m128)a, (__m128)b)));
#else
  return as_bits(a <= b);
#endif
}
