// Values as a histogram: weights are collected in bins, one for each codeword and row of queries,
// and bins are multiplied with the codebooks at the end. See additive_attend.h.

template <int64_t count>
struct Weights {
  typedef float Vector __attribute__((vector_size(4 * count), aligned(4), may_alias));
};

// Some codes as one number, the first one lowest: loaded one by one they would be as many loads as
// those of bins. (Three copied into a number would be read back before they are written.)
template <int64_t count>
COMMVQ_INLINE uint64_t some_codes(const uint8_t* from) {
  if constexpr (count == 3) {
    return some_codes<2>(from) | static_cast<uint64_t>(from[2]) << 16;
  }
  uint64_t codes = 0;
  __builtin_memcpy(&codes, from, count);
  return codes;
}

template <int64_t stages, int64_t rows>
static void collect_some(
    const uint8_t* codes, int64_t stride, int64_t count, const float* weights, float* bins) {
  constexpr int64_t most = rows < COMMVQ_LANES ? rows : COMMVQ_LANES;
  using Some = typename Weights<most>::Vector;
  for (int64_t token = 0; token < count; ++token, codes += stride, weights += rows) {
    const uint64_t all = some_codes<stages>(codes);
    for (int64_t row = 0; row < rows; row += most) {
      const Some weight = *reinterpret_cast<const Some*>(weights + row);
#pragma GCC unroll 8
      for (int64_t stage = 0; stage < stages; ++stage) {
        int64_t offset = static_cast<int64_t>((all >> 8 * stage) & 0xff) * rows;
        __asm__("" : "+r"(offset)); // or the stage is added by an instruction of its own
        *reinterpret_cast<Some*>(bins + offset + stage * 256 * rows + row) += weight;
      }
    }
  }
}

template <int64_t rows>
static void collect_stages(
    const uint8_t* codes,
    int64_t stride,
    int64_t count,
    int64_t stages,
    const float* weights,
    float* bins) {
  // Eight at a time: more of them would not fit the first-level cache, fewer load weights anew.
  for (; stages >= 8; stages -= 8, codes += 8, bins += 8 * 256 * rows) {
    collect_some<8, rows>(codes, stride, count, weights, bins);
  }
  if (stages >= 4) {
    collect_some<4, rows>(codes, stride, count, weights, bins);
    stages -= 4, codes += 4, bins += 4 * 256 * rows;
  }
  if (stages == 3) {
    collect_some<3, rows>(codes, stride, count, weights, bins);
  } else if (stages == 2) {
    collect_some<2, rows>(codes, stride, count, weights, bins);
  } else if (stages == 1) {
    collect_some<1, rows>(codes, stride, count, weights, bins);
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
    collect_stages<4>(codes, stride, count, stages, weights, bins);
  } else if (rows == 8) {
    collect_stages<8>(codes, stride, count, stages, weights, bins);
  } else {
    collect_stages<16>(codes, stride, count, stages, weights, bins);
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

static void add_bins(
    float* bins, const float* other, int64_t count, int64_t rows, const float* factors) {
  float all[kSums];
  for (int64_t i = 0; i < kSums; ++i) {
    all[i] = factors[i % rows];
  }
  for (int64_t i = 0; i < count * rows; i += kSums) {
    for (int64_t part = 0; part < kSumParts; ++part) {
      const int64_t at = i + part * COMMVQ_LANES;
      store(bins + at, load(bins + at) + load(other + at) * load(all + part * COMMVQ_LANES));
    }
  }
}

// Bins [256, rows] in units of each row's largest / 32767: those of two codes, 128 apart, lie
// together in whole[code, row], as products take them. Gives what a unit is worth.
static void round_bins(const float* bins, int64_t rows, int32_t* whole, float* units) {
  float peaks[kSums] = {}, factors[kSums];
  raise_peaks(bins, 256, rows, peaks);
  for (int64_t i = 0; i < kSums; ++i) {
    const float peak = peaks[i % rows];
    // Weights add up to 1 or more, or there are none.
    factors[i] = peak > 1e-30f ? 32767.0f / peak : 0.0f;
    units[i] = peak * (1.0f / 32767.0f);
  }
  for (int64_t i = 0; i < 128 * rows; i += kSums) {
    for (int64_t part = 0; part < kSumParts; ++part) {
      const int64_t at = i + part * COMMVQ_LANES;
      const Lanes factor = load(factors + part * COMMVQ_LANES);
      const Ints low = rounded(load(bins + at) * factor);
      const Ints high = rounded(load(bins + 128 * rows + at) * factor);
      store_ints(whole + at, (low & 0xffff) | (high << 16));
    }
  }
}

// `vectors` neighbouring vectors of dims of four rows. No sum of 256 products passes int32.
template <int64_t vectors>
COMMVQ_INLINE void spread_some(
    const int32_t* whole,
    const int8_t* words,
    int64_t dims,
    const float* units,
    int64_t rows,
    int64_t width,
    float* sums) {
  Ints sum[4][vectors] = {};
  for (int64_t code = 0; code < 128; ++code, whole += rows, words += dims) {
    for (int64_t v = 0; v < vectors; ++v) {
      const int8_t* at = words + v * COMMVQ_LANES;
      const Ints both = (widened(at) & 0xffff) | (widened(at + 128 * dims) << 16);
      for (int64_t r = 0; r < 4; ++r) {
        sum[r][v] = add_products(sum[r][v], whole[r] - Ints{}, both);
      }
    }
  }
  for (int64_t r = 0; r < 4; ++r) {
    for (int64_t v = 0; v < vectors; ++v) {
      float* to = sums + r * width + v * COMMVQ_LANES;
      store(to, load(to) + broadcast(units[r]) * as_floats(sum[r][v]));
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
  alignas(64) int32_t whole[128 * kSums];
  float units[kSums];
  round_bins(bins, rows, whole, units);
  for (int64_t r = 0; r < rows; ++r) {
    units[r] = scale * units[r];
  }
  for (int64_t quad = 0; quad < rows; quad += 4, sums += 4 * width) {
    const int32_t* own = whole + quad;
    int64_t dim = 0;
    for (; dim + kVectors * COMMVQ_LANES <= dims; dim += kVectors * COMMVQ_LANES) {
      spread_some<kVectors>(own, words + dim, dims, units + quad, rows, width, sums + dim);
    }
    for (; dim + COMMVQ_LANES <= dims; dim += COMMVQ_LANES) {
      spread_some<1>(own, words + dim, dims, units + quad, rows, width, sums + dim);
    }
    for (; dim < dims; ++dim) {
      for (int64_t r = 0; r < 4; ++r) {
        int32_t sum = 0;
        for (int64_t code = 0; code < 128; ++code) {
          const int32_t both = own[code * rows + r];
          sum += static_cast<int16_t>(both & 0xffff) * words[code * dims + dim];
          sum += (both >> 16) * words[(128 + code) * dims + dim];
        }
        float& to = sums[r * width + dim];
        to = to + units[quad + r] * static_cast<float>(sum);
      }
    }
  }
}
