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

// Bit j is set where x[j] is not 0.
COMMVQ_INLINE uint64_t nonzero(Ints x) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x);
#elif COMMVQ_X86 && COMMVQ_LANES == 8
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)(x != 0)));
#elif COMMVQ_X86
  return static_cast<unsigned>(_mm_movemask_ps((__m128)(x != 0)));
#else
  return as_bits(x != 0);
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

// Stores the low 16 bits of each.
COMMVQ_INLINE void store_low_halves(int16_t* to, Ints x) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  const Shorts shorts = (Shorts)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x);
#else
  const Shorts shorts = __builtin_convertvector(x, Shorts);
#endif
  *reinterpret_cast<ShortsInMemory*>(to) = shorts;
}

// Stores the low 8 bits of each.
COMMVQ_INLINE void store_low_bytes(int8_t* to, Ints x) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  const Bytes bytes = (Bytes)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)x);
#else
  const Bytes bytes = __builtin_convertvector(x, Bytes);
#endif
  *reinterpret_cast<BytesInMemory*>(to) = bytes;
}

// Stores them as the nearest whole numbers; they are within int16's range.
COMMVQ_INLINE void store_rounded(int16_t* to, Lanes x) {
  store_low_halves(to, rounded(x));
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

// As many int16 as fill a vector.
typedef int16_t Halves __attribute__((vector_size(4 * COMMVQ_LANES)));
typedef int16_t HalvesInMemory
    __attribute__((vector_size(4 * COMMVQ_LANES), aligned(2), may_alias));
typedef uint16_t UnsignedHalves __attribute__((vector_size(4 * COMMVQ_LANES)));
constexpr int64_t kHalves = 2 * COMMVQ_LANES;

COMMVQ_INLINE Halves load_halves(const int16_t* from) {
  return *reinterpret_cast<const HalvesInMemory*>(from);
}

COMMVQ_INLINE void store_halves(int16_t* to, Halves value) {
  *reinterpret_cast<HalvesInMemory*>(to) = value;
}

COMMVQ_INLINE Halves broadcast_half(int16_t value) {
  return value - Halves{};
}

// Modulo 2^16.
COMMVQ_INLINE Halves wrapped_sum(Halves a, Halves b) {
  return (Halves)((UnsignedHalves)a + (UnsignedHalves)b);
}

COMMVQ_INLINE Halves smaller(Halves a, Halves b) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  return (Halves)_mm512_min_epi16((__m512i)a, (__m512i)b);
#elif COMMVQ_X86 && COMMVQ_LANES == 8
  return (Halves)_mm256_min_epi16((__m256i)a, (__m256i)b);
#elif COMMVQ_X86
  return (Halves)_mm_min_epi16((__m128i)a, (__m128i)b);
#else
  return a < b ? a : b;
#endif
}

// Bit j is set where a[j] <= b[j].
COMMVQ_INLINE uint32_t at_most(Halves a, Halves b) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  return _mm512_cmple_epi16_mask((__m512i)a, (__m512i)b);
#elif COMMVQ_X86 && COMMVQ_LANES == 8
  const __m256i above = _mm256_cmpgt_epi16((__m256i)a, (__m256i)b);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(above), _mm256_extracti128_si256(above, 1));
  return ~static_cast<uint32_t>(_mm_movemask_epi8(bytes)) & 0xffff;
#elif COMMVQ_X86
  const __m128i above = _mm_cmpgt_epi16((__m128i)a, (__m128i)b);
  return ~static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(above, above))) & 0xff;
#else
  const Halves holds = a <= b;
  uint32_t bits = 0;
  for (int lane = 0; lane < kHalves; ++lane) {
    bits |= static_cast<uint32_t>(holds[lane] & 1) << lane;
  }
  return bits;
#endif
}

// Adds the products of the four bytes in each lane: of `a` without a sign, of `b` with one. A level
// without such an instruction gives the same.
COMMVQ_INLINE Ints add_quads(Ints sum, Ints a, Ints b) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
  const Ints even = (Ints)((Halves)((UnsignedHalves)b << 8) >> 8), odd = (Ints)((Halves)b >> 8);
  const Ints low = (Ints)((Halves)a & broadcast_half(0xff));
  const Ints high = (Ints)((UnsignedHalves)a >> 8);
  return add_products(add_products(sum, low, even), high, odd);
#endif
}
