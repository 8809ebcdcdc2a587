// The arithmetic of encoding keys as the published preset does, at one SIMD level; see
// published_encode.h.

constexpr int64_t kAll = kEncodeWords / COMMVQ_LANES;   // vectors of a round's codewords
constexpr int64_t kAtOnce = COMMVQ_LANES == 16 ? 4 : 2; // of them, as many as registers hold sums

static void word_products(const float* x, int64_t dim, const float* words, float* products) {
  for (int64_t first = 0; first < kAll; first += kAtOnce) {
    Lanes plain[kEncodeRows][kAtOnce] = {}, turned[kEncodeRows][kAtOnce] = {};
    const float* own = words + first * COMMVQ_LANES;
    for (int64_t d = 0; d < dim; d += 2, own += 2 * kEncodeWords) {
      for (int64_t v = 0; v < kAtOnce; ++v) {
        const Lanes re = load(own + v * COMMVQ_LANES);
        const Lanes im = load(own + kEncodeWords + v * COMMVQ_LANES);
        for (int64_t r = 0; r < kEncodeRows; ++r) {
          const Lanes x_re = broadcast(x[r * dim + d]), x_im = broadcast(x[r * dim + d + 1]);
          plain[r][v] = fused(x_im, im, fused(x_re, re, plain[r][v]));
          // i (re + i im) is -im + i re.
          turned[r][v] = fused(x_im, re, fused(-x_re, im, turned[r][v]));
        }
      }
    }
    for (int64_t r = 0; r < kEncodeRows; ++r) {
      float* to = products + r * 2 * kEncodeWords + first * COMMVQ_LANES;
      for (int64_t v = 0; v < kAtOnce; ++v) {
        store(to + v * COMMVQ_LANES, plain[r][v] + plain[r][v]);
        store(to + kEncodeWords + v * COMMVQ_LANES, turned[r][v] + turned[r][v]);
      }
    }
  }
}

typedef int32_t Places __attribute__((vector_size(4 * COMMVQ_LANES)));

static Centre nearest_centre(const float* products, const float* table) {
  Lanes turned[kAll];
  for (int64_t v = 0; v < kAll; ++v) {
    turned[v] = load(products + kEncodeWords + v * COMMVQ_LANES);
  }
  // The least of every lane and where it was first, without a branch.
  Lanes lowest = broadcast(__builtin_inff());
  Places place = {};
  for (int32_t a = 0; a < kEncodeWords; ++a) {
    const float* row = table + a * kEncodeWords;
    Lanes least = load(row) - turned[0];
    for (int64_t v = 1; v < kAll; ++v) {
      least = smaller(least, load(row + v * COMMVQ_LANES) - turned[v]);
    }
    least = least - broadcast(products[a]);
    place = least < lowest ? a - Places{} : place;
    lowest = smaller(least, lowest);
  }
  float best = lowest[0];
  Centre found = {place[0], 0};
  for (int lane = 1; lane < COMMVQ_LANES; ++lane) {
    if (lowest[lane] < best || (lowest[lane] == best && place[lane] < found.a)) {
      best = lowest[lane];
      found.a = place[lane];
    }
  }
  const float* row = table + found.a * kEncodeWords;
  while (found.b + 1 < kEncodeWords &&
         (row[found.b] - products[kEncodeWords + found.b]) - products[found.a] != best) {
    ++found.b;
  }
  return found;
}

static const PublishedEncodeKernels kernels = {word_products, nearest_centre};
