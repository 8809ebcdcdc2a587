// The arithmetic of attention over additive codes at one SIMD level; see additive_attend.h.

#include "cpu/additive_attend_keys.h"
#include "cpu/exponential.h"
#include "cpu/ints.h"
#include "cpu/words.h"

constexpr int64_t kSumParts = kSums / COMMVQ_LANES; // vectors that hold the partial sums

static void turn_queries(
    const int16_t* query,
    int64_t rows,
    int64_t width,
    const float* cosines,
    const float* sines,
    float share,
    int16_t* turned) {
  const Lanes one = broadcast(32768.0f * share);
  for (int64_t panel = 0; panel < width; panel += kPanel) {
    for (int64_t i = 0; i < kHalf; i += kWords) {
      const float *c = cosines + panel / 2 + i, *s = sines + panel / 2 + i;
      const Words cosine = words_of(load(c) * one, load(c + COMMVQ_LANES) * one);
      const Words sine = words_of(load(s) * one, load(s + COMMVQ_LANES) * one);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = r * width + panel + i;
        const Words re = load_words(query + at), im = load_words(query + at + kHalf);
        store_words(turned + at, scaled(re, cosine) + scaled(im, sine));
        store_words(turned + at + kHalf, scaled(im, cosine) - scaled(re, sine));
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

#include "cpu/additive_attend_bins.h"
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
    add_bins,
    spread_bins,
    decode_keys,
    decode_values,
    multiply_keys,
    weigh_scores,
    accumulate_values};
