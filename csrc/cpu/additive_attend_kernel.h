// The arithmetic of attention over additive codes at one SIMD level; see additive_attend.h.

#include "cpu/additive_attend_keys.h"
#include "cpu/exponential.h"

constexpr int64_t kSumParts = kSums / COMMVQ_LANES; // vectors that hold the partial sums

typedef int8_t Bytes __attribute__((vector_size(COMMVQ_LANES)));
typedef int8_t BytesInMemory __attribute__((vector_size(COMMVQ_LANES), aligned(1), may_alias));
typedef float Four __attribute__((vector_size(16)));
typedef float FourInMemory __attribute__((vector_size(16), aligned(2), may_alias));

COMMVQ_INLINE Lanes widen(const int8_t* from) {
  // GCC 12 converts lane by lane where it is left to itself.
#if COMMVQ_X86 && COMMVQ_LANES == 16
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Lanes)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, narrow));
#elif COMMVQ_X86 && COMMVQ_LANES == 8
  const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (Lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(narrow));
#endif
  const Bytes bytes = *reinterpret_cast<const BytesInMemory*>(from);
  return __builtin_convertvector(bytes, Lanes);
}

typedef int16_t Shorts __attribute__((vector_size(2 * COMMVQ_LANES)));
typedef int16_t ShortsInMemory
    __attribute__((vector_size(2 * COMMVQ_LANES), aligned(2), may_alias));

// Stores them as the nearest whole numbers; they are within int16's range.
COMMVQ_INLINE void store_rounded(int16_t* to, Lanes x) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  const __m512i whole = _mm512_maskz_cvtps_epi32(0xffff, (__m512)x);
  const Shorts shorts = (Shorts)_mm512_maskz_cvtepi32_epi16(0xffff, whole);
#else
  const Lanes magic = broadcast(12582912.0f); // 1.5 * 2^23: adding it rounds
  const Shorts shorts = __builtin_convertvector((Ints)(x + magic) - (Ints)magic, Shorts);
#endif
  *reinterpret_cast<ShortsInMemory*>(to) = shorts;
}

static void turn_queries(
    const float* query,
    int64_t rows,
    int64_t width,
    const float* cosines,
    const float* sines,
    int16_t* turned) {
  for (int64_t panel = 0; panel < width; panel += kPanel) {
    for (int64_t i = 0; i < kHalf; i += COMMVQ_LANES) {
      const Lanes cosine = load(cosines + panel / 2 + i), sine = load(sines + panel / 2 + i);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = r * width + panel + i;
        const Lanes re = load(query + at), im = load(query + at + kHalf);
        store_rounded(turned + at, re * cosine + im * sine);
        store_rounded(turned + at + kHalf, im * cosine - re * sine);
      }
    }
  }
}

// exp of a number up to 0; 0 where it is beyond float32's last digit of 1.
COMMVQ_INLINE Lanes weight_of(Lanes x) {
  const Lanes least = broadcast(-80.0f);
  return x > least ? exponential(x) : Lanes{};
}

// cap * tanh(score / cap), with tanh(x) = sign(x) (1 - e) / (1 + e) and e = exp(-2 |x|).
COMMVQ_INLINE Lanes capped(Lanes score, float cap) {
  const Lanes x = score * broadcast(1.0f / cap), none = broadcast(0.0f);
  const Lanes positive = x > none ? x : -x;
  const Lanes e = weight_of(broadcast(-2.0f) * positive);
  const Lanes value = broadcast(cap) * ((broadcast(1.0f) - e) / (broadcast(1.0f) + e));
  return x > none ? value : -value;
}

static void cap_scores(float* scores, int64_t count, float cap) {
  for (int64_t t = 0; t < count; t += COMMVQ_LANES) {
    store(scores + t, capped(load(scores + t), cap));
  }
}

static void raise_peaks(const float* scores, int64_t tokens, int64_t rows, float* peaks) {
  Lanes most[kSumParts];
  for (int64_t part = 0; part < kSumParts; ++part) {
    most[part] = load(scores + part * COMMVQ_LANES);
  }
  for (int64_t t = kSums; t < tokens * rows; t += kSums) {
    for (int64_t part = 0; part < kSumParts; ++part) {
      const Lanes x = load(scores + t + part * COMMVQ_LANES);
      most[part] = x > most[part] ? x : most[part];
    }
  }
  float all[kSums];
  for (int64_t part = 0; part < kSumParts; ++part) {
    store(all + part * COMMVQ_LANES, most[part]);
  }
  for (int64_t i = 0; i < kSums; ++i) {
    float& peak = peaks[i % rows];
    peak = all[i] > peak ? all[i] : peak;
  }
}

static void soften_scores(
    float* scores, int64_t tokens, int64_t rows, const float* peaks, float* totals) {
  float all[kSums];
  for (int64_t i = 0; i < kSums; ++i) {
    all[i] = peaks[i % rows];
  }
  Lanes sums[kSumParts] = {}, peak[kSumParts];
  for (int64_t part = 0; part < kSumParts; ++part) {
    peak[part] = load(all + part * COMMVQ_LANES);
  }
  for (int64_t t = 0; t < tokens * rows; t += kSums) {
    for (int64_t part = 0; part < kSumParts; ++part) {
      float* at = scores + t + part * COMMVQ_LANES;
      const Lanes value = weight_of(load(at) - peak[part]);
      store(at, value);
      sums[part] = sums[part] + value;
    }
  }
  for (int64_t part = 0; part < kSumParts; ++part) {
    store(all + part * COMMVQ_LANES, sums[part]);
  }
  for (int64_t i = 0; i < kSums; ++i) {
    totals[i % rows] += all[i];
  }
}

template <int64_t stages, int64_t quads>
static void collect_some(
    const uint8_t* codes, int64_t stride, int64_t count, const float* weights, float* bins) {
  constexpr int64_t rows = quads * 4;
  for (int64_t token = 0; token < count; ++token, codes += stride, weights += rows) {
    for (int64_t quad = 0; quad < quads; ++quad) {
      const Four weight = reinterpret_cast<const FourInMemory*>(weights)[quad];
      for (int64_t stage = 0; stage < stages; ++stage) {
        float* bin = bins + (stage * 256 + codes[stage]) * rows;
        reinterpret_cast<FourInMemory*>(bin)[quad] += weight;
      }
    }
  }
}

template <int64_t quads>
static void collect_stages(
    const uint8_t* codes,
    int64_t stride,
    int64_t count,
    int64_t stages,
    const float* weights,
    float* bins) {
  // Eight at a time: more of them would not fit the first-level cache, fewer load weights anew.
  for (; stages >= 8; stages -= 8, codes += 8, bins += 8 * 256 * quads * 4) {
    collect_some<8, quads>(codes, stride, count, weights, bins);
  }
  if (stages >= 4) {
    collect_some<4, quads>(codes, stride, count, weights, bins);
    stages -= 4, codes += 4, bins += 4 * 256 * quads * 4;
  }
  if (stages == 3) {
    collect_some<3, quads>(codes, stride, count, weights, bins);
  } else if (stages == 2) {
    collect_some<2, quads>(codes, stride, count, weights, bins);
  } else if (stages == 1) {
    collect_some<1, quads>(codes, stride, count, weights, bins);
  }
}

static void collect_weights(
    const uint8_t* codes,
    int64_t stride,
    int64_t count,
    int64_t stages,
    const float* weights,
    int64_t rows,
    float* bins) {
  if (rows == 4) {
    collect_stages<1>(codes, stride, count, stages, weights, bins);
  } else if (rows == 8) {
    collect_stages<2>(codes, stride, count, stages, weights, bins);
  } else {
    collect_stages<4>(codes, stride, count, stages, weights, bins);
  }
}

static void lower_bins(float* bins, int64_t count, int64_t rows, const float* factors) {
  float all[kSums];
  for (int64_t i = 0; i < kSums; ++i) {
    all[i] = factors[i % rows];
  }
  for (int64_t i = 0; i < count * rows; i += kSums) {
    for (int64_t part = 0; part < kSumParts; ++part) {
      float* at = bins + i + part * COMMVQ_LANES;
      store(at, load(at) * load(all + part * COMMVQ_LANES));
    }
  }
}

// `vectors` neighbouring vectors of dims of four rows.
template <int64_t vectors>
COMMVQ_INLINE void spread_some(
    const float* bins,
    const int8_t* words,
    int64_t dims,
    float scale,
    int64_t rows,
    int64_t width,
    float* sums) {
  Lanes sum[4][vectors] = {};
  for (int64_t code = 0; code < 256; ++code, bins += rows, words += dims) {
    for (int64_t v = 0; v < vectors; ++v) {
      const Lanes word = widen(words + v * COMMVQ_LANES);
      for (int64_t r = 0; r < 4; ++r) {
        sum[r][v] = sum[r][v] + broadcast(bins[r]) * word;
      }
    }
  }
  for (int64_t r = 0; r < 4; ++r) {
    for (int64_t v = 0; v < vectors; ++v) {
      float* to = sums + r * width + v * COMMVQ_LANES;
      store(to, load(to) + broadcast(scale) * sum[r][v]);
    }
  }
}

static void spread_bins(
    const float* bins,
    const int8_t* words,
    int64_t dims,
    float scale,
    int64_t rows,
    int64_t width,
    float* sums) {
  constexpr int64_t kVectors = COMMVQ_LANES == 16 ? 4 : 2;
  for (int64_t quad = 0; quad < rows; quad += 4, bins += 4, sums += 4 * width) {
    int64_t dim = 0;
    for (; dim + kVectors * COMMVQ_LANES <= dims; dim += kVectors * COMMVQ_LANES) {
      spread_some<kVectors>(bins, words + dim, dims, scale, rows, width, sums + dim);
    }
    for (; dim + COMMVQ_LANES <= dims; dim += COMMVQ_LANES) {
      spread_some<1>(bins, words + dim, dims, scale, rows, width, sums + dim);
    }
    for (; dim < dims; ++dim) {
      for (int64_t r = 0; r < 4; ++r) {
        float sum = 0.0f;
        for (int64_t code = 0; code < 256; ++code) {
          sum = sum + bins[code * rows + r] * static_cast<float>(words[code * dims + dim]);
        }
        sums[r * width + dim] = sums[r * width + dim] + scale * sum;
      }
    }
  }
}

#include "cpu/additive_attend_products.h"

static const AttendKernels kernels = {
    turn_queries,
    score_keys,
    score_rows,
    cap_scores,
    raise_peaks,
    soften_scores,
    collect_weights,
    lower_bins,
    spread_bins,
    decode_keys,
    decode_values,
    multiply_keys,
    weigh_scores,
    accumulate_values};
