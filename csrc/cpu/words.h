// Vectors of 16-bit numbers. Included inside a level's namespace, after ints.h; no include guard on
// purpose.

typedef uint16_t Words __attribute__((vector_size(4 * COMMVQ_LANES)));
typedef uint16_t WordsInMemory
    __attribute__((vector_size(4 * COMMVQ_LANES), aligned(2), may_alias));

constexpr int64_t kWords = 2 * COMMVQ_LANES; // of a vector

COMMVQ_INLINE Words load_words(const int16_t* from) {
  return *reinterpret_cast<const WordsInMemory*>(from);
}

COMMVQ_INLINE void store_words(int16_t* to, Words words) {
  *reinterpret_cast<WordsInMemory*>(to) = words;
}

// (a * b + 2^14) >> 15, of signed numbers.
COMMVQ_INLINE Words scaled(Words a, Words b) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  return (Words)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b);
#elif COMMVQ_X86 && COMMVQ_LANES == 8
  return (Words)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b);
#else
  Words product;
  for (int64_t i = 0; i < kWords; ++i) {
    const int32_t whole =
        static_cast<int32_t>(static_cast<int16_t>(a[i])) * static_cast<int16_t>(b[i]);
    product[i] = static_cast<uint16_t>((whole + 0x4000) >> 15);
  }
  return product;
#endif
}

// Both as the nearest whole numbers, but none beyond 32767; they are above -2^15 - 1/2.
COMMVQ_INLINE Words words_of(Lanes low, Lanes high) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  const __m256i a = _mm512_maskz_cvtsepi32_epi16(0xffff, (__m512i)rounded(low));
  const __m256i b = _mm512_maskz_cvtsepi32_epi16(0xffff, (__m512i)rounded(high));
  return (Words)_mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(a), b, 1);
#elif COMMVQ_X86 && COMMVQ_LANES == 8
  const __m256i both = _mm256_packs_epi32((__m256i)rounded(low), (__m256i)rounded(high));
  return (Words)_mm256_permute4x64_epi64(both, 0xd8);
#else
  const Ints most = Ints{} + 32767;
  Ints a = rounded(low), b = rounded(high);
  a = a < most ? a : most;
  b = b < most ? b : most;
  Words words;
  for (int64_t i = 0; i < COMMVQ_LANES; ++i) {
    words[i] = static_cast<uint16_t>(a[i]);
    words[COMMVQ_LANES + i] = static_cast<uint16_t>(b[i]);
  }
  return words;
#endif
}
