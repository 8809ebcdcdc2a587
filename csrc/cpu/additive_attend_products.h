// Attention of many rows of queries at one SIMD level: decoded values, and products of int16 summed
// in int32. Whole numbers again, so that every level gives the same ones. See additive_attend.h.

typedef int32_t IntsInMemory __attribute__((vector_size(4 * COMMVQ_LANES), aligned(4), may_alias));
typedef uint32_t Unsigned __attribute__((vector_size(4 * COMMVQ_LANES)));
typedef int32_t PairInMemory __attribute__((aligned(2), may_alias)); // two int16

constexpr float kWhole = 65000.0f; // what the weights of a row and block add up to at most

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

template <int64_t rows, int64_t vectors>
struct Products {
  Ints at[rows][vectors];
};

// Products of `rows` rows of pairs of int16, `stride` apart, with `sixteens` times 16 columns:
// those of a pair lie `step` apart, neighbouring sixteens `jump`.
template <int64_t rows, int64_t sixteens>
COMMVQ_INLINE Products<rows, sixteens * kSumParts> products(
    const int16_t* left,
    int64_t stride,
    const int32_t* right,
    int64_t step,
    int64_t jump,
    int64_t pairs) {
  constexpr int64_t kVectors = sixteens * kSumParts;
  Products<rows, kVectors> sums = {};
  for (int64_t pair = 0; pair < pairs; ++pair, left += 2, right += step) {
    Ints column[kVectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) {
      column[v] = load_ints(right + v / kSumParts * jump + v % kSumParts * COMMVQ_LANES);
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < rows; ++r) {
      const Ints both = *reinterpret_cast<const PairInMemory*>(left + r * stride) - Ints{};
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) {
        sums.at[r][v] = add_products(sums.at[r][v], both, column[v]);
      }
    }
  }
  return sums;
}

// As many as there are registers for.
constexpr int64_t kSixteens = COMMVQ_LANES == 16 ? 4 : 1;
constexpr int64_t kRows = COMMVQ_LANES == 16 ? 6 : COMMVQ_LANES == 8 ? 4 : 2;

template <int64_t sixteens>
static void multiply_some(const int16_t* query, int64_t dim, const int32_t* keys, int32_t* scores) {
  for (int64_t r = 0; r < kTile; r += kRows) {
    const auto sums =
        products<kRows, sixteens>(query + r * dim, dim, keys, kSums, dim / 2 * kSums, dim / 2);
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t v = 0; v < sixteens * kSumParts; ++v) {
        store_ints(scores + (r + i) * kBlock + v * COMMVQ_LANES, sums.at[i][v]);
      }
    }
  }
}

static void multiply_keys(
    const int16_t* query, int64_t dim, const int32_t* keys, int64_t sixteens, int32_t* scores) {
  const int64_t size = dim / 2 * kSums;
  int64_t own = 0;
  for (; own + kSixteens <= sixteens; own += kSixteens) {
    multiply_some<kSixteens>(query, dim, keys + own * size, scores + own * kSums);
  }
  for (; own < sixteens; ++own) {
    multiply_some<1>(query, dim, keys + own * size, scores + own * kSums);
  }
}

template <int64_t sixteens>
static void accumulate_some(
    const int16_t* weights,
    const int32_t* values,
    int64_t pairs,
    int64_t width,
    const Softmax& softmax,
    float* sums) {
  for (int64_t r = 0; r < kTile; r += kRows) {
    const auto found =
        products<kRows, sixteens>(weights + r * kBlock, kBlock, values, width, kSums, pairs);
    for (int64_t i = 0; i < kRows; ++i) {
      const Lanes keep = broadcast(softmax.keep[r + i]), gain = broadcast(softmax.gain[r + i]);
      for (int64_t v = 0; v < sixteens * kSumParts; ++v) {
        float* at = sums + (r + i) * width + v * COMMVQ_LANES;
        store(at, keep * load(at) + gain * as_floats(found.at[i][v]));
      }
    }
  }
}

static void accumulate_values(
    const int16_t* weights,
    const int32_t* values,
    int64_t pairs,
    int64_t width,
    const Softmax& softmax,
    float* sums) {
  int64_t dim = 0;
  for (; dim + kSixteens * kSums <= width; dim += kSixteens * kSums) {
    accumulate_some<kSixteens>(weights, values + dim, pairs, width, softmax, sums + dim);
  }
  for (; dim < width; dim += kSums) {
    accumulate_some<1>(weights, values + dim, pairs, width, softmax, sums + dim);
  }
}

// Exponentials of one group of kSums scores above the peak, at `scores` in place of them.
COMMVQ_INLINE void soften_group(int32_t* scores, Lanes unit, float cap, Lanes peak, Lanes* sums) {
  for (int64_t part = 0; part < kSumParts; ++part) {
    int32_t* at = scores + part * COMMVQ_LANES;
    const Lanes score = as_floats(load_ints(at)) * unit;
    const Lanes weight = weight_of((cap > 0.0f ? capped(score, cap) : score) - peak);
    store(reinterpret_cast<float*>(at), weight);
    sums[part] = sums[part] + weight;
  }
}

COMMVQ_INLINE int32_t highest(const int32_t* scores, int64_t groups) {
  Ints most[kSumParts];
  for (int64_t part = 0; part < kSumParts; ++part) {
    most[part] = load_ints(scores + part * COMMVQ_LANES);
  }
  for (int64_t t = kSums; t < groups * kSums; t += kSums) {
    for (int64_t part = 0; part < kSumParts; ++part) {
      const Ints x = load_ints(scores + t + part * COMMVQ_LANES);
      most[part] = x > most[part] ? x : most[part];
    }
  }
  int32_t all[kSums];
  for (int64_t part = 0; part < kSumParts; ++part) {
    store_ints(all + part * COMMVQ_LANES, most[part]);
  }
  for (int64_t half = kSums / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      all[i] = all[i + half] > all[i] ? all[i + half] : all[i];
    }
  }
  return all[0];
}

// One row's weights; returns the sum of its exponentials.
COMMVQ_INLINE float weigh_row(
    int32_t* scores, int64_t count, float unit, float cap, float* peak, int16_t* weights) {
  const int64_t whole = count / kSums, groups = (count + kSums - 1) / kSums;
  for (int64_t t = count; t < groups * kSums; ++t) {
    scores[t] = scores[0];
  }
  Lanes most = broadcast(static_cast<float>(highest(scores, groups)) * unit);
  most = cap > 0.0f ? capped(most, cap) : most;
  Lanes sums[kSumParts] = {};
  for (int64_t group = 0; group < whole; ++group) {
    soften_group(scores + group * kSums, broadcast(unit), cap, most, sums);
  }
  if (whole < groups) {
    Lanes aside[kSumParts] = {};
    float* last = reinterpret_cast<float*>(scores + whole * kSums);
    soften_group(scores + whole * kSums, broadcast(unit), cap, most, aside);
    for (int64_t t = count; t < groups * kSums; ++t) {
      scores[t] = 0; // as a float too
    }
    for (int64_t part = 0; part < kSumParts; ++part) {
      sums[part] = sums[part] + load(last + part * COMMVQ_LANES);
    }
  }
  float all[kSums];
  for (int64_t part = 0; part < kSumParts; ++part) {
    store(all + part * COMMVQ_LANES, sums[part]);
  }
  for (int64_t half = kSums / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      all[i] = all[i] + all[i + half];
    }
  }
  const float sum = all[0];
  const Lanes factor = broadcast(kWhole / (sum > 2.0f ? sum : 2.0f));
  for (int64_t t = 0; t < groups * kSums; t += COMMVQ_LANES) {
    store_rounded(weights + t, load(reinterpret_cast<const float*>(scores + t)) * factor);
  }
  *peak = most[0];
  return sum;
}

static void weigh_scores(
    int32_t* scores,
    int64_t count,
    const float* unit,
    float cap,
    int16_t* weights,
    const Softmax& softmax) {
  float peaks[kSums] = {}, sums[kSums] = {};
  for (int64_t r = 0; r < kTile; ++r) {
    const int64_t at = r * kBlock;
    sums[r] = weigh_row(scores + at, count, unit[r], cap, peaks + r, weights + at);
  }
  for (int64_t r = 0; r < kSums; r += COMMVQ_LANES) {
    const Lanes old = load(softmax.peaks + r), own = load(peaks + r), sum = load(sums + r);
    const Lanes peak = own > old ? own : old, two = broadcast(2.0f);
    const Lanes keep = weight_of(old - peak), share = weight_of(own - peak);
    store(softmax.peaks + r, peak);
    store(softmax.totals + r, load(softmax.totals + r) * keep + sum * share);
    store(softmax.keep + r, keep);
    store(softmax.gain + r, share * ((sum > two ? sum : two) / broadcast(kWhole)));
  }
}

template <int64_t vectors>
COMMVQ_INLINE void decode_some(
    const uint8_t* codes,
    const int8_t* words,
    const float* factors,
    int64_t stages,
    int64_t dims,
    int16_t* to) {
  Lanes sum[vectors] = {};
  for (int64_t stage = 0; stage < stages; ++stage) {
    const int8_t* word = words + (stage * 256 + codes[stage]) * dims;
    for (int64_t v = 0; v < vectors; ++v) {
      sum[v] = sum[v] + broadcast(factors[stage]) * widen(word + v * COMMVQ_LANES);
    }
  }
  for (int64_t v = 0; v < vectors; ++v) {
    store_rounded(to + v * COMMVQ_LANES, sum[v]);
  }
}

static void decode_values(
    const uint8_t* codes,
    int64_t stride,
    int64_t count,
    const ValueHead& head,
    int64_t width,
    int16_t* values) {
  constexpr int64_t kVectors = 4;
  const int64_t dims = head.sub_dim, stages = head.stages;
  for (int64_t token = 0; token < count; ++token, codes += stride, values += width) {
    for (int64_t sub = 0; sub < head.subs; ++sub) {
      const uint8_t* code = codes + sub * stages;
      const int8_t* words = head.words + sub * stages * 256 * dims;
      const float* factors = head.factors + sub * stages;
      int16_t* to = values + sub * dims;
      int64_t dim = 0;
      for (; dim + kVectors * COMMVQ_LANES <= dims; dim += kVectors * COMMVQ_LANES) {
        decode_some<kVectors>(code, words + dim, factors, stages, dims, to + dim);
      }
      for (; dim + COMMVQ_LANES <= dims; dim += COMMVQ_LANES) {
        decode_some<1>(code, words + dim, factors, stages, dims, to + dim);
      }
      for (; dim < dims; ++dim) {
        float sum = 0.0f;
        for (int64_t stage = 0; stage < stages; ++stage) {
          const int8_t word = words[(stage * 256 + code[stage]) * dims + dim];
          sum = sum + factors[stage] * static_cast<float>(word);
        }
        to[dim] = static_cast<int16_t>((sum + 12582912.0f) - 12582912.0f); // rounds as above
      }
    }
  }
}
