// The arithmetic of attention over additive codes at one SIMD level; see additive_attend.h.

#include "cpu/exponential.h"

constexpr int64_t kAttendParts = kStep / COMMVQ_LANES; // vectors that hold the partial sums
constexpr int64_t kTokensAtOnce = 4;                   // that share a load of the sums

typedef int8_t Bytes __attribute__((vector_size(COMMVQ_LANES)));
typedef int8_t BytesInMemory __attribute__((vector_size(COMMVQ_LANES), aligned(1), may_alias));
typedef float Four __attribute__((vector_size(16)));
typedef float FourInMemory __attribute__((vector_size(16), aligned(4), may_alias));

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

// Re and im of every pair change places.
COMMVQ_INLINE Lanes swapped(Lanes x) {
#if COMMVQ_LANES == 16
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif COMMVQ_LANES == 8
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  return __builtin_shufflevector(x, x, 1, 0, 3, 2);
#endif
}

// The sum of kStep partial sums, by the same tree at every level.
COMMVQ_INLINE float tree(const Lanes* parts) {
  float all[kStep];
  for (int64_t part = 0; part < kAttendParts; ++part) {
    store(all + part * COMMVQ_LANES, parts[part]);
  }
  const FourInMemory* quarters = reinterpret_cast<const FourInMemory*>(all);
  const Four sum = (quarters[0] + quarters[2]) + (quarters[1] + quarters[3]);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

static void decode_codes(
    const uint8_t* codes,
    int64_t stride,
    int64_t count,
    const Books& books,
    int64_t width,
    float* out) {
  const int64_t book = books.codewords * books.sub_dim;
  for (int64_t token = 0; token < count; ++token, codes += stride, out += width) {
    const uint8_t* code = codes;
    const int8_t* words = books.words;
    const float* scales = books.scales;
    for (int64_t sub = 0; sub < books.subs; ++sub) {
      float* to = out + sub * books.sub_dim;
      int64_t dim = 0;
      for (; dim + COMMVQ_LANES <= books.sub_dim; dim += COMMVQ_LANES) {
        Lanes sum = {};
        for (int64_t stage = 0; stage < books.stages; ++stage) {
          const int8_t* word = words + stage * book + code[stage] * books.sub_dim + dim;
          sum = sum + widen(word) * broadcast(scales[stage]);
        }
        store(to + dim, sum);
      }
      for (; dim < books.sub_dim; ++dim) {
        float sum = 0.0f;
        for (int64_t stage = 0; stage < books.stages; ++stage) {
          const int8_t word = words[stage * book + code[stage] * books.sub_dim + dim];
          sum = sum + static_cast<float>(word) * scales[stage];
        }
        to[dim] = sum;
      }
      code += books.stages;
      words += books.stages * book;
      scales += books.stages;
    }
  }
}

static void rotate_rows(
    float* rows, int64_t count, int64_t width, int64_t rotary, const float* steps) {
  for (int64_t token = 0; token < count; ++token, rows += width, steps += 2 * rotary) {
    int64_t dim = 0;
    for (; dim + COMMVQ_LANES <= rotary; dim += COMMVQ_LANES) {
      const Lanes x = load(rows + dim);
      store(rows + dim, x * load(steps + dim) + swapped(x) * load(steps + rotary + dim));
    }
    for (; dim < rotary; dim += 2) {
      const float re = rows[dim], im = rows[dim + 1];
      rows[dim] = re * steps[dim] + im * steps[rotary + dim];
      rows[dim + 1] = im * steps[dim + 1] + re * steps[rotary + dim + 1];
    }
  }
}

static void score_rows(
    const float* rows,
    int64_t count,
    int64_t width,
    const float* query,
    int64_t queries,
    float* scores,
    int64_t stride) {
  for (int64_t token = 0; token < count; ++token, rows += width) {
    for (int64_t r = 0; r < queries; ++r) {
      const float* one = query + r * width;
      Lanes sums[kAttendParts] = {};
      for (int64_t dim = 0; dim < width; dim += kStep) {
        for (int64_t part = 0; part < kAttendParts; ++part) {
          const int64_t at = dim + part * COMMVQ_LANES;
          sums[part] = sums[part] + load(rows + at) * load(one + at);
        }
      }
      scores[r * stride + token] = tree(sums);
    }
  }
}

// exp of a number up to 0; 0 where it is beyond float32's last digit of 1.
COMMVQ_INLINE Lanes weight_of(Lanes x) {
  const Lanes least = broadcast(-80.0f);
  return x > least ? exponential(x) : Lanes{};
}

static float soften_scores(float* scores, int64_t count, float peak) {
  Lanes sums[kAttendParts] = {};
  float padded[kStep];
  for (int64_t t = 0; t < count; t += kStep) {
    const int64_t left = count - t;
    float* from = scores + t;
    if (left < kStep) {
      for (int64_t i = 0; i < kStep; ++i) {
        padded[i] = i < left ? from[i] : -__builtin_inff();
      }
      from = padded;
    }
    for (int64_t part = 0; part < kAttendParts; ++part) {
      float* at = from + part * COMMVQ_LANES;
      const Lanes value = weight_of(load(at) - broadcast(peak));
      store(at, value);
      sums[part] = sums[part] + value;
    }
    if (left < kStep) {
      for (int64_t i = 0; i < left; ++i) {
        scores[t + i] = padded[i];
      }
    }
  }
  return tree(sums);
}

// tanh(x) = sign(x) (1 - e) / (1 + e) with e = exp(-2 |x|).
static void cap_scores(float* scores, int64_t count, float cap) {
  for (int64_t t = 0; t < count; t += COMMVQ_LANES) {
    float some[COMMVQ_LANES] = {};
    const int64_t left = count - t < COMMVQ_LANES ? count - t : COMMVQ_LANES;
    for (int64_t i = 0; i < left; ++i) {
      some[i] = scores[t + i];
    }
    const Lanes x = load(some) * broadcast(1.0f / cap), none = broadcast(0.0f);
    const Lanes positive = x > none ? x : -x;
    const Lanes e = weight_of(broadcast(-2.0f) * positive);
    const Lanes value = broadcast(cap) * ((broadcast(1.0f) - e) / (broadcast(1.0f) + e));
    store(some, x > none ? value : -value);
    for (int64_t i = 0; i < left; ++i) {
      scores[t + i] = some[i];
    }
  }
}

static void add_rows(
    const float* rows,
    int64_t count,
    int64_t width,
    const float* weights,
    int64_t stride,
    int64_t queries,
    float* sums) {
  int64_t token = 0;
  for (; token + kTokensAtOnce <= count; token += kTokensAtOnce, rows += kTokensAtOnce * width) {
    for (int64_t r = 0; r < queries; ++r) {
      const float* p = weights + r * stride + token;
      float* to = sums + r * width;
      for (int64_t dim = 0; dim < width; dim += COMMVQ_LANES) {
        Lanes sum = load(to + dim);
        for (int64_t t = 0; t < kTokensAtOnce; ++t) {
          sum = sum + broadcast(p[t]) * load(rows + t * width + dim);
        }
        store(to + dim, sum);
      }
    }
  }
  for (; token < count; ++token, rows += width) {
    for (int64_t r = 0; r < queries; ++r) {
      const Lanes p = broadcast(weights[r * stride + token]);
      float* to = sums + r * width;
      for (int64_t dim = 0; dim < width; dim += COMMVQ_LANES) {
        store(to + dim, load(to + dim) + p * load(rows + dim));
      }
    }
  }
}

static const AttendKernels kernels = {
    decode_codes, rotate_rows, score_rows, cap_scores, soften_scores, add_rows};
