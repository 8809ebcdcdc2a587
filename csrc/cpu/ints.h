// Vectors of whole numbers, of 8, 16 and 32 bits. Included inside a level's namespace, after
// lanes.h; no include guard on purpose.

typedef int32_t IntsInMemory __attribute__((vector_size(4 * COMMVQ_LANES), aligned(4), may_alias));
typedef uint32_t Unsigned __attribute__((vector_size(4 * COMMVQ_LANES)));

typedef int8_t Bytes __attribute__((vector_size(COMMVQ_LANES)));
typedef int8_t BytesInMemory __attribute__((vector_size(COMMVQ_LANES), aligned(1), may_alias));

COMMVQ_INLINE Ints load_ints(const int32_t* from) {
  return *reinterpret_cast<const IntsInMemory*>(from);
}

COMMVQ_INLINE void store_ints(int32_t* to, Ints value) {
  *reinterpret_cast<IntsInMemory*>(to) = value;
}

COMMVQ_INLINE Lanes as_floats(Ints x) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  return (Lanes)_mm512_maskz_cvtepi32_ps(0xffff, (__m512i)x);
#else
  return __builtin_convertvector(x, Lanes);
#endif
}

typedef int32_t PairInMemory __attribute__((aligned(2), may_alias)); // two int16

// The same two int16 in every lane.
COMMVQ_INLINE Ints broadcast_pair(const int16_t* from) {
  return *reinterpret_cast<const PairInMemory*>(from) - Ints{};
}

// Adds both products of the two int16 in each lane.
COMMVQ_INLINE Ints add_products(Ints sum, Ints a, Ints b) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif COMMVQ_X86 && COMMVQ_LANES == 8
  return (Ints)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)a, (__m256i)b));
#elif COMMVQ_X86
  return (Ints)_mm_add_epi32((__m128i)sum, _mm_madd_epi16((__m128i)a, (__m128i)b));
#else
  const Ints low = ((Ints)((Unsigned)a << 16) >> 16) * ((Ints)((Unsigned)b << 16) >> 16);
  const Ints high = (a >> 16) * (b >> 16);
  return (Ints)((Unsigned)sum + (Unsigned)low + (Unsigned)high);
#endif
}

// The nearest whole numbers, of less than 2^22.
COMMVQ_INLINE Ints rounded(Lanes x) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  return (Ints)_mm512_maskz_cvtps_epi32(0xffff, (__m512)x);
#else
  const Lanes magic = broadcast(12582912.0f); // 1.5 * 2^23: adding it rounds
  return (Ints)(x + magic) - (Ints)magic;
#endif
}

typedef int16_t Shorts __attribute__((vector_size(2 * COMMVQ_LANES)));
typedef int16_t ShortsInMemory
    __attribute__((vector_size(2 * COMMVQ_LANES), aligned(2), may_alias));

// Stores them as the nearest whole numbers; they are within int16's range.
COMMVQ_INLINE void store_rounded(int16_t* to, Lanes x) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  const Shorts shorts = (Shorts)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)rounded(x));
#else
  const Shorts shorts = __builtin_convertvector(rounded(x), Shorts);
#endif
  *reinterpret_cast<ShortsInMemory*>(to) = shorts;
}

COMMVQ_INLINE Ints widened(const int8_t* from) {
  // GCC 12 converts lane by lane where it is left to itself.
#if COMMVQ_X86 && COMMVQ_LANES == 16
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Ints)_mm512_maskz_cvtepi8_epi32(0xffff, narrow);
#elif COMMVQ_X86 && COMMVQ_LANES == 8
  const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (Ints)_mm256_cvtepi8_epi32(narrow);
#endif
  const Bytes bytes = *reinterpret_cast<const BytesInMemory*>(from);
  return __builtin_convertvector(bytes, Ints);
}
