// What the kernels of the product E-step work on; product_estep_kernel.h is compiled once a level.
#pragma once

#include <cstdint>

namespace commvq {

// Rows of tables are padded to this many entries: the lanes of the widest level.
constexpr int64_t kPairStep = 16;

struct EstepKernels {
  // distance[a * width + b] = norm + left[a] + right[b] + table[a * width + b]; returns the least.
  // `right` and the rows of `table` are padded to `width` with infinities.
  float (*distances)(
      const float* left,
      const float* right,
      const float* table,
      int64_t count,
      int64_t width,
      float norm,
      float* distance);

  // The places of all distances up to `limit`, in rising order; returns how many.
  int64_t (*near)(const float* distance, int64_t size, float limit, int32_t* place);
};

// The kernels of the level that simd_level() names.
const EstepKernels& estep_kernels();

} // namespace commvq
