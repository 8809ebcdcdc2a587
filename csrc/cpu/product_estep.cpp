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
#include <vector>

#define COMMVQ_KERNEL "cpu/product_estep_kernel.h"
#include "cpu/each_level.h"

namespace commvq {

const EstepKernels& estep_kernels() {
#if COMMVQ_X86
  if (simd_level() == Simd::avx512) {
    return avx512::kernels;
  }
  if (simd_level() == Simd::avx2) {
    return avx2::kernels;
  }
#endif
  return portable::kernels;
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRowsAtOnce = 512; // rows that share an accumulator, whatever the threads
constexpr float kNegligible = 24.0f; // exp(-24) is beyond float32's last digit of 1

struct Estep {
  int64_t rows, count, width;
  const float* products; // [rows, 2 * count]: -2 Re<x, theta_a>, then -2 Re<x, i theta_b>
  const float* norms;    // [rows]
  const float* table;    // [count, width], padded with infinities
  float temperature;
  bool squared;

  // Rows [first, last): adds to `weights` [count * count], fills the others' rows.
  void run(
      int64_t first, int64_t last, double* weights, float* marginals, int32_t* best, float* least)
      const {
    Buffer<float> distance(count * width), right(width), share(count * width);
    Buffer<int32_t> place(count * width);
    std::fill(right.data() + count, right.data() + width, std::numeric_limits<float>::infinity());
    const EstepKernels& kernels = estep_kernels();
    for (int64_t row = first; row < last; ++row) {
      const float* left = products + row * 2 * count;
      std::copy(left + count, left + 2 * count, right.data());
      const float lowest =
          kernels.distances(left, right.data(), table, count, width, norms[row], distance.data());
      const float floor = cost(lowest);
      const float limit = inverse(floor + kNegligible * temperature);
      // Rounding must not lose the nearest centre itself.
      const float widest = limit > lowest ? limit : lowest;
      const int64_t found = kernels.near(distance.data(), count * width, widest, place.data());
      float* marginal = marginals + row * 2 * count;
      std::fill(marginal, marginal + 2 * count, 0.0f);
      best[row] = 0;
      least[row] = lowest > 0.0f ? lowest : 0.0f;
      double total = 0.0;
      bool chosen = false;
      for (int64_t i = 0; i < found; ++i) {
        const float here = distance[place[i]];
        if (!chosen && here == lowest) {
          best[row] = static_cast<int32_t>(place[i] / width * count + place[i] % width);
          chosen = true;
        }
        share[i] = found == 1 ? 1.0f : std::exp((floor - cost(here)) / temperature);
        total += share[i];
      }
      for (int64_t i = 0; i < found; ++i) {
        const int64_t a = place[i] / width, b = place[i] % width;
        const float weight = static_cast<float>(share[i] / total);
        weights[a * count + b] += weight;
        marginal[a] += weight;
        marginal[count + b] += weight;
      }
    }
  }

 private:
  float cost(float distance) const {
    const float positive = distance > 0.0f ? distance : 0.0f;
    return squared ? positive : std::sqrt(positive);
  }
  float inverse(float cost) const { return squared ? cost : cost * cost; }
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
  const int64_t blocks = (rows + kRowsAtOnce - 1) / kRowsAtOnce, size = count * count;
  std::vector<double> sums(static_cast<size_t>(blocks * size), 0.0);
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
  std::fill(total, total + size, 0.0);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < size; ++i) {
      total[i] += sums[static_cast<size_t>(block * size + i)];
    }
  }
  return {weights, marginals, best, least};
}

} // namespace
} // namespace commvq

STABLE_TORCH_LIBRARY_IMPL(commvq, CPU, m) {
  m.impl("product_estep", TORCH_BOX(&commvq::product_estep));
}
