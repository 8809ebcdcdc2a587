// Contracts of the kernels that encode keys as the published preset does.
#pragma once

#include <cstdint>

namespace commvq {

constexpr int64_t kEncodeWords = 64; // codewords of a round
constexpr int64_t kEncodeRows = 2;   // vectors whose inner products are taken together

struct Centre {
  int32_t a, b;
};

struct PublishedEncodeKernels {
  // Twice the inner products of kEncodeRows vectors, `dim` apart, with all codewords and with i
  // times all codewords: [kEncodeRows, 2, kEncodeWords]. `words` [dim, kEncodeWords], real and
  // imaginary parts of a pair as neighbours.
  void (*products)(const float* x, int64_t dim, const float* words, float* products);

  // Which word[a] + i word[b] is nearest, the first of equally near ones: that of the least
  // table[a, b] - products[1, b] - products[0, a], where `table` holds the centres' squared norms.
  // Any where there is a NaN.
  Centre (*nearest)(const float* products, const float* table);
};

} // namespace commvq
