// Contracts of the kernels of attention over exact tokens. Rows of floats are `width` wide, a
// multiple of kSums, with zeros behind a head's dims.
#pragma once

#include "cpu/additive_attend.h"

#include <cstdint>

namespace commvq {

struct ExactAttendKernels {
  // Widens `count` rows of `dim` numbers, `stride` apart, to floats: bfloat16 where `brief`.
  void (*load)(
      const void* from,
      bool brief,
      int64_t stride,
      int64_t count,
      int64_t dim,
      int64_t width,
      float* to);

  // scores[r, t] = query[r] . keys[t], where rows of scores are `stride` apart.
  void (*score)(
      const float* query,
      int64_t rows,
      int64_t width,
      const float* keys,
      int64_t count,
      float* scores,
      int64_t stride);

  // sums[r] += weights[r, t] * values[t], token after token.
  void (*accumulate)(
      const float* weights,
      int64_t stride,
      int64_t rows,
      const float* values,
      int64_t count,
      int64_t width,
      float* sums);
};

// The kernels of the level that simd_level() names.
const ExactAttendKernels& exact_attend_kernels();

} // namespace commvq
