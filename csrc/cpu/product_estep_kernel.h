// The arithmetic of the product E-step at one SIMD level; see product_estep.h for the contracts.

constexpr int64_t kParts = kPairStep / COMMVQ_LANES; // vectors that hold the partial sums

#include "cpu/exponential.h"

COMMVQ_INLINE Lanes root(Lanes x) {
#if COMMVQ_X86 && COMMVQ_LANES == 16
  return (Lanes)_mm512_maskz_sqrt_ps(0xffff, (__m512)x); // the plain one makes GCC 12 warn
#elif COMMVQ_X86 && COMMVQ_LANES == 8
  return (Lanes)_mm256_sqrt_ps((__m256)x);
#elif COMMVQ_X86 && COMMVQ_LANES == 4
  return (Lanes)_mm_sqrt_ps((__m128)x);
#else
  Lanes result;
  for (int lane = 0; lane < COMMVQ_LANES; ++lane) {
    result[lane] = __builtin_sqrtf(x[lane]);
  }
  return result;
#endif
}

// The sum of kPairStep partial sums, always in the same order.
COMMVQ_INLINE float total(const Lanes* parts) {
  float sum = 0.0f;
  for (int64_t part = 0; part < kParts; ++part) {
    for (int lane = 0; lane < COMMVQ_LANES; ++lane) {
      sum += parts[part][lane];
    }
  }
  return sum;
}

static float pair_distances(
    const float* left,
    const float* right,
    const float* table,
    int64_t count,
    int64_t width,
    float norm,
    float* distance) {
  Lanes least = broadcast(__builtin_inff());
  for (int64_t a = 0; a < count; ++a, table += width, distance += width) {
    const Lanes start = broadcast(norm + left[a]);
    for (int64_t b = 0; b < width; b += COMMVQ_LANES) {
      const Lanes sum = (load(right + b) + load(table + b)) + start;
      store(distance + b, sum);
      least = smaller(sum, least);
    }
  }
  float result = least[0];
  for (int lane = 1; lane < COMMVQ_LANES; ++lane) {
    result = least[lane] < result ? least[lane] : result;
  }
  return result;
}

static int64_t pairs_near(
    const float* distance, int64_t size, float limit, int64_t most, int32_t* place) {
  const Lanes bound = broadcast(limit);
  int64_t found = 0;
  for (int64_t i = 0; i < size && found <= most; i += COMMVQ_LANES) {
    for (uint64_t bits = at_most(load(distance + i), bound); bits != 0; bits &= bits - 1) {
      place[found++] = static_cast<int32_t>(i + __builtin_ctzll(bits));
    }
  }
  return found;
}

static float soften(const float* distance, int64_t size, const Softness& softness, float* share) {
  const Lanes floor = broadcast(softness.floor), none = broadcast(0.0f);
  const Lanes most = broadcast(softness.floor + softness.reach);
  const Lanes inverse = broadcast(softness.inverse_temperature);
  Lanes sums[kParts] = {};
  for (int64_t i = 0; i < size; i += kPairStep) {
    for (int64_t part = 0; part < kParts; ++part) {
      const int64_t at = i + part * COMMVQ_LANES;
      const Lanes near = load(distance + at);
      const Lanes positive = near > none ? near : none;
      const Lanes cost = softness.squared ? positive : root(positive);
      // Where it is too far the exponent would be out of range: compute something else there.
      const Lanes exponent = cost <= most ? (floor - cost) * inverse : none;
      const Lanes value = cost <= most ? exponential(exponent) : none;
      store(share + at, value);
      sums[part] = sums[part] + value;
    }
  }
  return total(sums);
}

static void add_shares(
    const float* share,
    int64_t count,
    int64_t width,
    float scale,
    float* weights,
    float* rows,
    float* columns) {
  const Lanes factor = broadcast(scale);
  for (int64_t b = 0; b < width; b += COMMVQ_LANES) {
    store(columns + b, Lanes{});
  }
  for (int64_t a = 0; a < count; ++a, share += width, weights += width) {
    Lanes sums[kParts] = {};
    for (int64_t b = 0; b < width; b += kPairStep) {
      for (int64_t part = 0; part < kParts; ++part) {
        const int64_t at = b + part * COMMVQ_LANES;
        const Lanes value = load(share + at) * factor;
        store(weights + at, load(weights + at) + value);
        store(columns + at, load(columns + at) + value);
        sums[part] = sums[part] + value;
      }
    }
    rows[a] = total(sums);
  }
}

static const EstepKernels kernels = {pair_distances, pairs_near, soften, add_shares};
