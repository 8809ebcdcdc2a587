// Attention of one new token over a whole cache: codes, window and sinks, in one call instead of
// some twenty of PyTorch's, each of which waits for its own code where a model's weights have just
// passed through all caches.
#include "cpu/additive_attend_tokens.h"
#include "cpu/exact_attend_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace commvq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As bfloat16, the nearest, of equally near ones the even.
uint16_t brief(float x) {
  uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
}

// Scaled queries [rows, dim] of a KV head as its codes take them: pairs as neighbours, `pairs` of
// which rotate and count `turned` times, and each dim its factor [dim].
void pair_queries(
    const float* from,
    int64_t rows,
    int64_t dim,
    bool interleaved,
    int64_t pairs,
    float turned,
    const float* factors,
    float* to) {
  const int64_t rotary = 2 * pairs;
  for (int64_t r = 0; r < rows; ++r, from += dim, to += dim) {
    for (int64_t d = 0; d < rotary; ++d) {
      const int64_t at = interleaved ? d : d % 2 * pairs + d / 2;
      to[d] = from[at] * turned * factors[d];
    }
    for (int64_t d = rotary; d < dim; ++d) {
      to[d] = from[d] * factors[d];
    }
  }
}

// What is done for a row and head when its codes have been seen.
struct End {
  const ExactRows& exact;
  const float* inverse; // [heads, dim, dim]
  const float* coded;   // [batch, heads, rows, dim], values as codes have them
  float* weighted;      // the same, as exact values are
  uint16_t* output;     // bfloat16 of exact.output, or none

  void run(int64_t unit) const {
    const int64_t rows = exact.rows, dim = exact.dim, width = exact.width, at = unit * rows * dim;
    const float* matrix = inverse + unit % exact.heads * dim * dim;
    const Buffer<float> sums(rows * width), padded(width == dim ? 0 : dim * width);
    std::fill(sums.data(), sums.data() + rows * width, 0.0f);
    if (width != dim) {
      exact.kernels.load(matrix, false, dim, dim, dim, width, padded.data());
      matrix = padded.data();
    }
    exact.kernels.accumulate(coded + at, dim, rows, matrix, dim, width, sums.data());
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(sums.data() + r * width, dim, weighted + at + r * dim);
    }
    exact.run(unit);
    for (int64_t i = at; output != nullptr && i < at + rows * dim; ++i) {
      output[i] = brief(exact.output[i]);
    }
  }
};

Tensor additive_step(
    const Tensor& query,
    double scaling,
    bool interleaved,
    double turned,
    const Tensor& key_factors,
    const Tensor& key_codes,
    const Tensor& key_books,
    const Tensor& key_gains,
    const Tensor& key_means,
    int64_t key_group,
    const Tensor& value_codes,
    const Tensor& value_books,
    const Tensor& value_scales,
    const Tensor& value_inverse,
    const Tensor& turns,
    const Tensor& steps,
    const Tensor& first,
    int64_t stop,
    double softcap,
    const Tensor& keys,
    const Tensor& values,
    const Tensor& sink_keys,
    const Tensor& sink_values) {
  constexpr const char* kOp = "additive_step";
  const bool is_brief = query.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(
      (is_brief || query.scalar_type() == ScalarType::Float) && query.dim() == 4 &&
          query.size(2) == 1 && keys.dim() == 4 && keys.size(1) > 0 &&
          query.size(1) % keys.size(1) == 0,
      "additive_step: query must be float32 or bfloat16 [batch, heads, 1, dim]");
  const int64_t batch = query.size(0), heads = keys.size(1), dim = query.size(3);
  const int64_t rows = query.size(1) / heads, units = batch * heads;
  STD_TORCH_CHECK(
      key_factors.scalar_type() == ScalarType::Float && key_factors.is_contiguous() &&
          key_factors.numel() == heads * dim,
      "additive_step: key_factors must be contiguous float32 [heads, dim]");
  STD_TORCH_CHECK(
      value_inverse.scalar_type() == ScalarType::Float && value_inverse.is_contiguous() &&
          value_inverse.numel() == heads * dim * dim,
      "additive_step: value_inverse must be contiguous float32 [heads, dim, dim]");
  const CodedTokens tokens = coded_tokens(
      kOp,
      batch,
      heads,
      dim,
      key_codes,
      key_books,
      key_gains,
      key_means,
      key_group,
      value_codes,
      value_books,
      value_scales,
      turns,
      steps,
      first,
      stop);
  const auto part = [&](const char* name, const Tensor& x, const Tensor& like) {
    return part_of(kOp, name, x, like, batch, heads, dim);
  };
  const Part own_keys = part("keys", keys, values), own_values = part("values", values, keys);
  const Part sinks = part("sink_keys", sink_keys, sink_values);
  const Part of_sinks = part("sink_values", sink_values, sink_keys);
  const Tensor q = without_gaps(query);
  Tensor output = torch::stable::new_empty(query, {batch, 1, query.size(1), dim});

  // One row, for the kernel that widens it.
  const int64_t numbers = units * rows * dim, padded = rounded_up(numbers, kSums);
  const Buffer<float> queries(padded), coded(numbers);
  exact_attend_kernels().load(
      q.const_data_ptr(), is_brief, numbers, 1, numbers, padded, queries.data());
  for (int64_t i = 0; i < numbers; ++i) {
    queries[i] *= static_cast<float>(scaling);
  }
  for (int64_t unit = 0; unit < units; ++unit) {
    pair_queries(
        queries.data() + unit * rows * dim,
        rows,
        dim,
        interleaved,
        turns.size(3),
        static_cast<float>(turned),
        key_factors.const_data_ptr<float>() + unit % heads * dim,
        coded.data() + unit * rows * dim);
  }
  const Buffer<int64_t> begin(batch);
  for (int64_t row = 0; row < batch; ++row) {
    begin[row] = tokens.first.const_data_ptr<int64_t>()[row] + sinks.tokens;
  }
  AttendInputs inputs = tokens.seen_by(coded.data(), rows, static_cast<float>(softcap));
  inputs.first = begin.data();

  const Buffer<float> sums(numbers), weighted(numbers), peaks(units * rows), totals(units * rows);
  const Buffer<float> floats(is_brief ? numbers : 0);
  const ExactRows exact = {
      heads,
      rows,
      dim,
      queries.data(),
      weighted.data(),
      peaks.data(),
      totals.data(),
      static_cast<float>(softcap),
      {own_keys, sinks},
      {own_values, of_sinks},
      is_brief ? floats.data() : output.mutable_data_ptr<float>()};
  const End end = {
      exact,
      value_inverse.const_data_ptr<float>(),
      sums.data(),
      weighted.data(),
      is_brief ? static_cast<uint16_t*>(output.mutable_data_ptr()) : nullptr};
  attend_tokens(
      inputs, {sums.data(), peaks.data(), totals.data()}, [&](int64_t unit) { end.run(unit); });
  return output;
}

} // namespace
} // namespace commvq

STABLE_TORCH_LIBRARY_IMPL(commvq, CPU, m) {
  m.impl("additive_step", TORCH_BOX(&commvq::additive_step));
}
