// The arithmetic of attention over the published preset's codes at one SIMD level; see
// published_attend.h.

#include "cpu/exponential.h"
#include "cpu/ints.h"
#include "cpu/words.h"

constexpr int64_t kHalfParts = kHalf / kWords; // vectors of half a panel
constexpr int64_t kRowParts = kTileRows / COMMVQ_LANES;

// `panels` neighbouring panels of one token's key.
template <int64_t panels>
COMMVQ_INLINE void decode_panels(
    const uint8_t* codes,
    int64_t rounds,
    const int16_t* words,
    int64_t width,
    const uint8_t* turning,
    const int16_t* step,
    int16_t* key) {
  Words re[panels][kHalfParts] = {}, im[panels][kHalfParts] = {};
  for (int64_t round = 0; round < rounds; ++round, codes += 2, words += kBook * width) {
    const int16_t *a = words + codes[0] * width, *b = words + codes[1] * width;
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t part = 0; part < kHalfParts; ++part) {
        const int64_t at = p * kPanel + part * kWords;
        re[p][part] += load_words(a + at);
        im[p][part] += load_words(a + at + kHalf);
        re[p][part] -= load_words(b + at + kHalf);
        im[p][part] += load_words(b + at);
      }
    }
  }
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t part = 0; part < kHalfParts; ++part) {
      Words x = re[p][part], y = im[p][part];
      if (turning[p] != 0) {
        const int64_t pair = p * kHalf + part * kWords;
        const Words cosine = load_words(step + pair), sine = load_words(step + width / 2 + pair);
        const Words turned = scaled(x, cosine) - scaled(y, sine);
        y = scaled(y, cosine) + scaled(x, sine);
        x = turned;
      }
      store_words(key + p * kPanel + part * kWords, x);
      store_words(key + p * kPanel + part * kWords + kHalf, y);
    }
  }
}

template <int64_t panels>
static void decode_some(
    const uint8_t* codes,
    int64_t stride,
    int64_t count,
    int64_t rounds,
    const int16_t* words,
    int64_t width,
    const uint8_t* turning,
    const int16_t* steps,
    int16_t* keys) {
  for (int64_t token = 0; token < count; ++token) {
    decode_panels<panels>(codes, rounds, words, width, turning, steps, keys);
    codes += stride, steps += width, keys += width;
  }
}

static void decode_keys(
    const uint8_t* codes,
    int64_t stride,
    int64_t count,
    int64_t rounds,
    const int16_t* words,
    int64_t panels,
    const uint8_t* turning,
    const int16_t* steps,
    int16_t* keys) {
  constexpr int64_t kAtOnce = COMMVQ_LANES >= 8 ? 2 : 1; // what registers hold
  const int64_t width = panels * kPanel;
  int64_t p = 0;
  for (; p + kAtOnce <= panels; p += kAtOnce) {
    const int16_t* own = words + p * kPanel;
    decode_some<kAtOnce>(
        codes,
        stride,
        count,
        rounds,
        own,
        width,
        turning + p,
        steps + p * kHalf,
        keys + p * kPanel);
  }
  if (p < panels) {
    const int16_t* own = words + p * kPanel;
    decode_some<1>(
        codes,
        stride,
        count,
        rounds,
        own,
        width,
        turning + p,
        steps + p * kHalf,
        keys + p * kPanel);
  }
}

static void weigh_tokens(float* weights, int64_t count, const float* norms) {
  for (int64_t t = 0; t < count; ++t, weights += kTileRows) {
    const Lanes norm = broadcast(norms[t]);
    for (int64_t part = 0; part < kRowParts; ++part) {
      float* at = weights + part * COMMVQ_LANES;
      store(at, load(at) * norm);
    }
  }
}

static void collect_byte(const uint8_t* codes, int64_t count, const float* weights, float* bins) {
  for (int64_t i = 0; i < kByteColumns * kTileRows; i += COMMVQ_LANES) {
    store(bins + i, Lanes{});
  }
  for (int64_t t = 0; t < count; ++t, weights += kTileRows) {
    float* bin = bins + codes[t] * kTileRows;
    for (int64_t part = 0; part < kRowParts; ++part) {
      float* at = bin + part * COMMVQ_LANES;
      store(at, load(at) + load(weights + part * COMMVQ_LANES));
    }
  }
}

COMMVQ_INLINE void add_to(float* sum, Lanes more) {
  store(sum, load(sum) + more);
}

static void fold_byte(float* bins, int64_t groups, float* sums) {
  // The highest group first: adding over its patterns leaves the bins of the others.
  for (int64_t group = kByteGroups - 1, size = 64; group >= 0; --group, size /= 4) {
    for (int64_t part = 0; part < kRowParts; ++part) {
      Lanes first = {}, second = {}, both = {};
      for (int64_t i = 0; i < size; ++i) {
        float* at = bins + i * kTileRows + part * COMMVQ_LANES;
        const Lanes one = load(at), two = load(at + size * kTileRows);
        const Lanes three = load(at + 2 * size * kTileRows);
        const Lanes none = load(at + 3 * size * kTileRows);
        first = first + one;
        second = second + two;
        both = both + three;
        store(at, (one + two) + (three + none));
      }
      if (group < groups) {
        float* to = sums + 2 * group * kTileRows + part * COMMVQ_LANES;
        add_to(to, first + both);
        add_to(to + kTileRows, second + both);
      }
    }
  }
}

static const PublishedKernels kernels = {decode_keys, weigh_tokens, collect_byte, fold_byte};
