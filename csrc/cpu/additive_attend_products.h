// Attention of many rows of queries at one SIMD level: decoded values, and products of int16 summed
// in int32. Whole numbers again, so that every level gives the same ones. See additive_attend.h.

constexpr float kWhole = 65000.0f; // what the weights of a row and block add up to at most

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
      const Ints both = broadcast_pair(left + r * stride);
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) {
        sums.at[r][v] = add_products(sums.at[r][v], both, column[v]);
      }
    }
  }
  return sums;
}

// As many sums as there are registers for.
constexpr int64_t kSixteens = COMMVQ_LANES == 16 ? 2 : 1;
constexpr int64_t kRows = COMMVQ_LANES == 16 ? 8 : COMMVQ_LANES == 8 ? 4 : 2;

static void multiply_keys(
    const int16_t* keys, int64_t count, int64_t dim, const int32_t* query, int32_t* scores) {
  for (int64_t t = 0; t < count; t += kRows) {
    for (int64_t lane = 0; lane < kTile; lane += kSixteens * kSums) {
      const auto sums =
          products<kRows, kSixteens>(keys + t * dim, dim, query + lane, kTile, kSums, dim / 2);
      for (int64_t i = 0; i < kRows; ++i) {
        for (int64_t v = 0; v < kSixteens * kSumParts; ++v) {
          store_ints(scores + (t + i) * kTile + lane + v * COMMVQ_LANES, sums.at[i][v]);
        }
      }
    }
  }
}

static void accumulate_values(
    const int16_t* values,
    const int32_t* weights,
    int64_t pairs,
    int64_t width,
    const Softmax& softmax,
    float* sums) {
  for (int64_t d = 0; d < width; d += kRows) {
    for (int64_t lane = 0; lane < kTile; lane += kSixteens * kSums) {
      const auto found = products<kRows, kSixteens>(
          values + d * kBlock, kBlock, weights + lane, kTile, kSums, pairs);
      for (int64_t v = 0; v < kSixteens * kSumParts; ++v) {
        const int64_t own = lane + v * COMMVQ_LANES;
        const Lanes keep = load(softmax.keep + own), gain = load(softmax.gain + own);
        for (int64_t i = 0; i < kRows; ++i) {
          float* at = sums + (d + i) * kTile + own;
          store(at, keep * load(at) + gain * as_floats(found.at[i][v]));
        }
      }
    }
  }
}

// 2 to the power of x, for x up to 0, to two units in the last place; some 10^-38 for any x below
// -126: x = whole + rest, a polynomial for the rest, whole into the exponent.
COMMVQ_INLINE Lanes power_of_two(Lanes x) {
  const Lanes magic = broadcast(12582912.0f), least = broadcast(-126.0f); // 1.5 * 2^23
  const Lanes bounded = x > least ? x : least;
  const Lanes shifted = bounded + magic;
  const Lanes rest = bounded - (shifted - magic);
  Lanes sum = broadcast(1.327646348e-3f);
  sum = sum * rest + broadcast(9.675541730e-3f);
  sum = sum * rest + broadcast(5.550713304e-2f);
  sum = sum * rest + broadcast(2.402211972e-1f);
  sum = sum * rest + broadcast(6.931469670e-1f);
  sum = sum * rest + broadcast(1.0f);
  return (Lanes)((Unsigned)sum + ((Unsigned)shifted << 23));
}

constexpr float kLog2E = 1.44269504f;

// The logarithm to base 2 of a token's weight.
COMMVQ_INLINE Lanes logarithm(Ints score, Lanes unit, float cap) {
  const Lanes x = as_floats(score) * unit;
  return cap > 0.0f ? capped(x, cap) * broadcast(kLog2E) : x;
}

// kWeighed vectors of rows at a time.
constexpr int64_t kWeighed = 2;

COMMVQ_INLINE void weigh_lanes(
    int32_t* scores,
    int64_t count,
    const float* units,
    float cap,
    int32_t* weights,
    const Softmax& softmax) {
  Ints most[kWeighed];
  Lanes unit[kWeighed], peak[kWeighed], sum[kWeighed] = {}, factor[kWeighed];
  for (int64_t v = 0; v < kWeighed; ++v) {
    most[v] = load_ints(scores + v * COMMVQ_LANES);
    unit[v] = load(units + v * COMMVQ_LANES) * broadcast(cap > 0.0f ? 1.0f : kLog2E);
  }
  for (int64_t t = 1; t < count; ++t) {
    for (int64_t v = 0; v < kWeighed; ++v) {
      const Ints x = load_ints(scores + t * kTile + v * COMMVQ_LANES);
      most[v] = x > most[v] ? x : most[v];
    }
  }
  for (int64_t v = 0; v < kWeighed; ++v) {
    peak[v] = logarithm(most[v], unit[v], cap);
  }
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t v = 0; v < kWeighed; ++v) {
      int32_t* at = scores + t * kTile + v * COMMVQ_LANES;
      const Lanes weight = power_of_two(logarithm(load_ints(at), unit[v], cap) - peak[v]);
      store(reinterpret_cast<float*>(at), weight);
      sum[v] = sum[v] + weight;
    }
  }
  for (int64_t v = 0; v < kWeighed; ++v) {
    const Lanes two = broadcast(2.0f), divisor = sum[v] > two ? sum[v] : two;
    const int64_t at = v * COMMVQ_LANES;
    factor[v] = broadcast(kWhole) / divisor;
    const Lanes old = load(softmax.peaks + at), now = peak[v] > old ? peak[v] : old;
    const Lanes keep = power_of_two(old - now), share = power_of_two(peak[v] - now);
    store(softmax.peaks + at, now);
    store(softmax.totals + at, load(softmax.totals + at) * keep + sum[v] * share);
    store(softmax.keep + at, keep);
    store(softmax.gain + at, share * (divisor / broadcast(kWhole)));
  }
  for (int64_t t = 0; t < count; t += 2) {
    for (int64_t v = 0; v < kWeighed; ++v) {
      const float* at = reinterpret_cast<const float*>(scores) + t * kTile + v * COMMVQ_LANES;
      const Ints one = rounded(load(at) * factor[v]);
      const Ints two = t + 1 < count ? rounded(load(at + kTile) * factor[v]) : Ints{};
      store_ints(weights + t / 2 * kTile + v * COMMVQ_LANES, one | two << 16);
    }
  }
}

static void weigh_scores(
    int32_t* scores,
    int64_t count,
    const float* units,
    float cap,
    int32_t* weights,
    const Softmax& softmax) {
  for (int64_t lane = 0; lane < kTile; lane += kWeighed * COMMVQ_LANES) {
    const Softmax own = {
        softmax.peaks + lane, softmax.totals + lane, softmax.keep + lane, softmax.gain + lane};
    weigh_lanes(scores + lane, count, units + lane, cap, weights + lane, own);
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
      sum[v] = sum[v] + broadcast(factors[stage]) * as_floats(widened(word + v * COMMVQ_LANES));
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
