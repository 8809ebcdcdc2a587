// The E-step of the product codebook: which of count * count centres, theta_a + i theta_b, every
// row belongs to and how much. Centres are never made: the squared distance of a row to centre
// (a, b) is |x|^2 + left[a] + right[b] + table[a][b].
#include "cpu/product_estep.h"
#include "common/buffer.h"
#include "cpu/simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>

#define COMMVQ_KERNEL "cpu/product_estep_kernel.h"
#include "cpu/each_level.h"

namespace commvq {

const EstepKernels& estep_kernels() {
  return level_kernels();
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRowsAtOnce = 512; // rows that share an accumulator, whatever the threads
constexpr float kNegligible = 24.0f; // exp(-24) is beyond float32's last digit of 1
constexpr int64_t kFew = 128;        // centres near enough to have a share, to take them one by one

struct Estep {
  int64_t rows, count, width;
  const float* products; // [rows, 2 * count]: -2 Re<x, theta_a>, then -2 Re<x, i theta_b>
  const float* norms;    // [rows]
  const float* table;    // [count, width], padded with infinities
  float temperature;
  bool squared;

  // Rows [first, last): their weights [count, width], and their rows of the other results.
  void run(
      int64_t first, int64_t last, float* weights, float* marginals, int32_t* best, float* least)
      const {
    Buffer<float> distance(count * width), right(width), share(count * width), near(kFew);
    Buffer<float> columns(width);
    Buffer<int32_t> place(kFew + kPairStep), first_place(kPairStep);
    std::fill(right.data() + count, right.data() + width, std::numeric_limits<float>::infinity());
    std::fill(weights, weights + count * width, 0.0f);
    const EstepKernels& kernels = estep_kernels();
    for (int64_t row = first; row < last; ++row) {
      const float* left = products + row * 2 * count;
      std::copy(left + count, left + 2 * count, right.data());
      const float lowest =
          kernels.distances(left, right.data(), table, count, width, norms[row], distance.data());
      const float floor = cost(lowest), reach = kNegligible * temperature;
      const float limit = squared ? floor + reach : (floor + reach) * (floor + reach);
      // Rounding must not lose the nearest centre itself.
      const int64_t size = count * width;
      const int64_t found =
          kernels.near(distance.data(), size, std::max(limit, lowest), kFew, place.data());
      best[row] = first_at(kernels, distance.data(), lowest, first_place.data());
      least[row] = std::max(lowest, 0.0f);
      float* marginal = marginals + row * 2 * count;
      const Softness softness = {floor, 1.0f / temperature, reach, squared};
      if (found > kFew) {
        const float sum = kernels.soften(distance.data(), size, softness, share.data());
        kernels.add(share.data(), count, width, 1.0f / sum, weights, marginal, columns.data());
        std::copy(columns.data(), columns.data() + count, marginal + count);
        continue;
      }
      const int64_t padded = (found + kPairStep - 1) / kPairStep * kPairStep;
      for (int64_t i = 0; i < padded; ++i) {
        near[i] = i < found ? distance[place[i]] : std::numeric_limits<float>::infinity();
      }
      const float scale = 1.0f / kernels.soften(near.data(), padded, softness, share.data());
      std::fill(marginal, marginal + 2 * count, 0.0f);
      for (int64_t i = 0; i < found; ++i) {
        const float weight = share[i] * scale;
        weights[place[i]] += weight;
        marginal[place[i] / width] += weight;
        marginal[count + place[i] % width] += weight;
      }
    }
  }

 private:
  float cost(float distance) const {
    const float positive = std::max(distance, 0.0f);
    return squared ? positive : std::sqrt(positive);
  }

  // The first of the nearest centres, a * count + b; 0 where a row holds a NaN.
  int32_t first_at(
      const EstepKernels& kernels, const float* distance, float lowest, int32_t* place) const {
    const bool any = kernels.near(distance, count * width, lowest, 0, place) > 0;
    return any ? static_cast<int32_t>(place[0] / width * count + place[0] % width) : 0;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> product_estep(
    const Tensor& products,
    const Tensor& norms,
    const Tensor& table,
    double temperature,
    bool squared) {
  STD_TORCH_CHECK(
      products.scalar_type() == ScalarType::Float && norms.scalar_type() == ScalarType::Float &&
          table.scalar_type() == ScalarType::Float,
      "product_estep: products, norms and table must be float32");
  STD_TORCH_CHECK(
      products.dim() == 2 && norms.dim() == 1 && table.dim() == 2 &&
          table.size(0) == table.size(1) && products.size(1) == 2 * table.size(0) &&
          norms.size(0) == products.size(0),
      "product_estep: products [n, 2 * count], norms [n] and table [count, count] do not fit");
  const int64_t rows = products.size(0), count = table.size(0);
  STD_TORCH_CHECK(
      count >= 1 && count <= 1024 && temperature > 0.0,
      "product_estep: 1 to 1024 codewords and a temperature above 0");
  const Tensor x = torch::stable::contiguous(products), n = torch::stable::contiguous(norms);
  const Tensor t = torch::stable::contiguous(table);
  const int64_t width = (count + kPairStep - 1) / kPairStep * kPairStep;
  Buffer<float> padded(count * width);
  std::fill(padded.data(), padded.data() + count * width, std::numeric_limits<float>::infinity());
  for (int64_t a = 0; a < count; ++a) {
    const float* from = t.const_data_ptr<float>() + a * count;
    std::copy(from, from + count, padded.data() + a * width);
  }
  Tensor weights = torch::stable::new_empty(products, {count, count}, ScalarType::Double);
  Tensor marginals = torch::stable::new_empty(products, {rows, 2 * count});
  Tensor best = torch::stable::new_empty(products, {rows}, ScalarType::Int);
  Tensor least = torch::stable::new_empty(products, {rows});
  const Estep step = {
      rows,
      count,
      width,
      x.const_data_ptr<float>(),
      n.const_data_ptr<float>(),
      padded.data(),
      static_cast<float>(temperature),
      squared};
  const int64_t blocks = (rows + kRowsAtOnce - 1) / kRowsAtOnce, size = count * width;
  Buffer<float> sums(blocks * size);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      step.run(
          block * kRowsAtOnce,
          std::min(rows, (block + 1) * kRowsAtOnce),
          sums.data() + block * size,
          marginals.mutable_data_ptr<float>(),
          best.mutable_data_ptr<int32_t>(),
          least.mutable_data_ptr<float>());
    }
  });
  // In the order of the blocks, so that the sum does not depend on the threads.
  double* total = weights.mutable_data_ptr<double>();
  std::fill(total, total + count * count, 0.0);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t a = 0; a < count; ++a) {
      const float* from = sums.data() + block * size + a * width;
      for (int64_t b = 0; b < count; ++b) {
        total[a * count + b] += from[b];
      }
    }
  }
  return {weights, marginals, best, least};
}

} // namespace
} // namespace commvq

STABLE_TORCH_LIBRARY_IMPL(commvq, CPU, m) {
  m.impl("product_estep", TORCH_BOX(&commvq::product_estep));
}
