// The arithmetic of attention over exact tokens at one SIMD level; see exact_attend.h.

#include "cpu/exponential.h"
#include "cpu/ints.h"

constexpr int64_t kSumParts = kSums / COMMVQ_LANES; // vectors that hold the partial sums

typedef uint16_t Briefs __attribute__((vector_size(2 * COMMVQ_LANES)));
typedef uint16_t BriefsInMemory
    __attribute__((vector_size(2 * COMMVQ_LANES), aligned(2), may_alias));

static void load_rows(
    const void* from,
    bool brief,
    int64_t stride,
    int64_t count,
    int64_t dim,
    int64_t width,
    float* to) {
  const int64_t whole = dim / COMMVQ_LANES * COMMVQ_LANES;
  for (int64_t row = 0; row < count; ++row, to += width) {
    for (int64_t d = whole; d < width; ++d) {
      to[d] = 0.0f;
    }
    if (!brief) {
      const float* own = static_cast<const float*>(from) + row * stride;
      for (int64_t d = 0; d < whole; d += COMMVQ_LANES) {
        store(to + d, load(own + d));
      }
      for (int64_t d = whole; d < dim; ++d) {
        to[d] = own[d];
      }
      continue;
    }
    // A bfloat16 is the upper half of a float.
    const uint16_t* own = static_cast<const uint16_t*>(from) + row * stride;
    for (int64_t d = 0; d < whole; d += COMMVQ_LANES) {
      const Briefs some = *reinterpret_cast<const BriefsInMemory*>(own + d);
      store(to + d, (Lanes)(__builtin_convertvector(some, Unsigned) << 16));
    }
    for (int64_t d = whole; d < dim; ++d) {
      const uint32_t bits = static_cast<uint32_t>(own[d]) << 16;
      __builtin_memcpy(to + d, &bits, sizeof(bits));
    }
  }
}

// In kSums partial sums, and those by halves, whatever the level.
static void score_tokens(
    const float* query,
    int64_t rows,
    int64_t width,
    const float* keys,
    int64_t count,
    float* scores,
    int64_t stride) {
  for (int64_t token = 0; token < count; ++token, keys += width) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* own = query + r * width;
      Lanes sums[kSumParts] = {};
      for (int64_t d = 0; d < width; d += kSums) {
        for (int64_t part = 0; part < kSumParts; ++part) {
          const int64_t at = d + part * COMMVQ_LANES;
          sums[part] = fused(load(own + at), load(keys + at), sums[part]);
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
      scores[r * stride + token] = all[0];
    }
  }
}

// `vectors` neighbouring ones of a row of sums: several, since each waits for its own last
// addition.
template <int64_t vectors>
COMMVQ_INLINE void accumulate_some(
    const float* weights, const float* values, int64_t count, int64_t width, float* sums) {
  Lanes sum[vectors];
  for (int64_t v = 0; v < vectors; ++v) {
    sum[v] = load(sums + v * COMMVQ_LANES);
  }
  for (int64_t token = 0; token < count; ++token, values += width) {
    const Lanes weight = broadcast(weights[token]);
    for (int64_t v = 0; v < vectors; ++v) {
      sum[v] = fused(weight, load(values + v * COMMVQ_LANES), sum[v]);
    }
  }
  for (int64_t v = 0; v < vectors; ++v) {
    store(sums + v * COMMVQ_LANES, sum[v]);
  }
}

static void accumulate_tokens(
    const float* weights,
    int64_t stride,
    int64_t rows,
    const float* values,
    int64_t count,
    int64_t width,
    float* sums) {
  constexpr int64_t kMany = 4 * COMMVQ_LANES;
  for (int64_t r = 0; r < rows; ++r, weights += stride, sums += width) {
    int64_t d = 0;
    for (; d + kMany <= width; d += kMany) {
      accumulate_some<4>(weights, values + d, count, width, sums + d);
    }
    for (; d < width; d += COMMVQ_LANES) {
      accumulate_some<1>(weights, values + d, count, width, sums + d);
    }
  }
}

static const ExactAttendKernels kernels = {load_rows, score_tokens, accumulate_tokens};
