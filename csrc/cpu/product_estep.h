// What the kernels of the product E-step work on; product_estep_kernel.h is compiled once a level.
#pragma once

#include <cstdint>

namespace commvq {

// Rows of tables are padded to this many entries: the lanes of the widest level. Sums run over as
// many partial sums, whatever the level, and so come out the same.
constexpr int64_t kPairStep = 16;

// How distances become shares: exp((floor - cost) / temperature), where cost is the distance or,
// `squared`, its square, and 0 where the cost is more than `reach` above the floor.
struct Softness {
  float floor;
  float inverse_temperature;
  float reach;
  bool squared;
};

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

  // The places of all distances up to `limit`, in rising order; returns how many. Stops when they
  // are more than `most`; `place` is room for most + kPairStep.
  int64_t (*near)(const float* distance, int64_t size, float limit, int64_t most, int32_t* place);

  // The shares of `size` distances, a multiple of kPairStep, before they are divided by their sum,
  // which is returned.
  float (*soften)(const float* distance, int64_t size, const Softness& softness, float* share);

  // For shares [count, width] times `scale`: adds them to `weights`, and their sums over b and over
  // a go to `rows` [count] and `columns` [width].
  void (*add)(
      const float* share,
      int64_t count,
      int64_t width,
      float scale,
      float* weights,
      float* rows,
      float* columns);
};

// The kernels of the level that simd_level() names.
const EstepKernels& estep_kernels();

} // namespace commvq
