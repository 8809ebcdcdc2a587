// Codes of keys as the published preset has them: round by round, the nearest of 64 x 64 centres
// word[a] + i word[b] to what the rounds before left. Centres are never made: their distances need
// inner products with 64 codewords, twice, and a table of their norms.
#include "cpu/published_encode.h"
#include "common/buffer.h"
#include "common/share.h"
#include "cpu/simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#define COMMVQ_KERNEL "cpu/published_encode_kernel.h"
#include "cpu/each_level.h"

namespace commvq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kVectors = 128; // of a job: repay transposing the codebooks
constexpr int64_t kLine = 16;     // floats of a cache line

// Encodes `count` vectors x [count, dim] of one head into codes [count, 2 * rounds].
void encode(
    const PublishedEncodeKernels& kernels,
    const float* x,
    int64_t count,
    int64_t dim,
    const float* theta,
    const float* tables,
    int64_t rounds,
    uint8_t* codes) {
  const int64_t padded = (count + kEncodeRows - 1) / kEncodeRows * kEncodeRows;
  Buffer<float> residual(padded * dim), words(dim * kEncodeWords);
  float products[kEncodeRows * 2 * kEncodeWords];
  std::copy_n(x, count * dim, residual.data());
  std::fill(residual.data() + count * dim, residual.data() + padded * dim, 0.0f);
  for (int64_t round = 0; round < rounds; ++round) {
    const float* book = theta + round * kEncodeWords * dim;
    for (int64_t first = 0; first < dim; first += kLine) {
      for (int64_t word = 0; word < kEncodeWords; ++word) {
        for (int64_t d = first; d < std::min(first + kLine, dim); ++d) {
          words[d * kEncodeWords + word] = book[word * dim + d];
        }
      }
    }
    for (int64_t row = 0; row < count; row += kEncodeRows) {
      kernels.products(residual.data() + row * dim, dim, words.data(), products);
      for (int64_t r = 0; r < std::min(kEncodeRows, count - row); ++r) {
        const Centre centre = kernels.nearest(
            products + r * 2 * kEncodeWords, tables + round * kEncodeWords * kEncodeWords);
        uint8_t* to = codes + ((row + r) * rounds + round) * 2;
        to[0] = static_cast<uint8_t>(centre.a);
        to[1] = static_cast<uint8_t>(centre.b);
        const float *a = book + centre.a * dim, *b = book + centre.b * dim;
        float* left = residual.data() + (row + r) * dim;
        for (int64_t d = 0; d < dim; d += 2) {
          left[d] -= a[d] - b[d + 1];
          left[d + 1] -= a[d + 1] + b[d];
        }
      }
    }
  }
}

Tensor published_encode(const Tensor& x, const Tensor& theta, const Tensor& tables) {
  STD_TORCH_CHECK(
      x.scalar_type() == ScalarType::Float && x.dim() == 3 && x.size(2) % 2 == 0,
      "published_encode: x must be float32 [heads, tokens, an even dim]");
  const int64_t heads = x.size(0), tokens = x.size(1), dim = x.size(2);
  STD_TORCH_CHECK(
      theta.scalar_type() == ScalarType::Float && theta.dim() == 4 && theta.size(0) == heads &&
          theta.size(2) == kEncodeWords && theta.size(3) == dim,
      "published_encode: theta must be float32 [heads, rounds, 64, dim]");
  const int64_t rounds = theta.size(1);
  STD_TORCH_CHECK(
      tables.scalar_type() == ScalarType::Float && tables.dim() == 4 && tables.size(0) == heads &&
          tables.size(1) == rounds && tables.size(2) == kEncodeWords &&
          tables.size(3) == kEncodeWords,
      "published_encode: tables must be float32 [heads, rounds, 64, 64]");
  Tensor codes = torch::stable::new_empty(x, {heads, tokens, 2 * rounds}, ScalarType::Byte);
  if (codes.numel() == 0) {
    return codes;
  }
  const Tensor from = torch::stable::contiguous(x), books = torch::stable::contiguous(theta);
  const Tensor norms = torch::stable::contiguous(tables);
  const PublishedEncodeKernels& kernels = level_kernels();
  const int64_t blocks = (tokens + kVectors - 1) / kVectors;
  share_out(heads * blocks, [&](int64_t job) {
    const int64_t head = job / blocks, first = job % blocks * kVectors;
    encode(
        kernels,
        from.const_data_ptr<float>() + (head * tokens + first) * dim,
        std::min(kVectors, tokens - first),
        dim,
        books.const_data_ptr<float>() + head * rounds * kEncodeWords * dim,
        norms.const_data_ptr<float>() + head * rounds * kEncodeWords * kEncodeWords,
        rounds,
        codes.mutable_data_ptr<uint8_t>() + (head * tokens + first) * 2 * rounds);
  });
  return codes;
}

} // namespace
} // namespace commvq

STABLE_TORCH_LIBRARY_IMPL(commvq, CPU, m) {
  m.impl("published_encode", TORCH_BOX(&commvq::published_encode));
}
