// Attention over tokens whose keys and values are additive codes, in one of two ways: for few rows
// of queries (additive_attend_few.cpp) or many (additive_attend_many.cpp).
#include "cpu/additive_attend.h"

#include "cpu/additive_attend_tokens.h"
#include "cpu/simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <tuple>

#define COMMVQ_KERNEL "cpu/additive_attend_kernel.h"
#include "cpu/each_level.h"

namespace commvq {

const AttendKernels& attend_kernels() {
  return level_kernels();
}

void attend_tokens(const AttendInputs& in, const Softmaxes& out, const Done& done) {
  constexpr int64_t kFewRows = 32; // for more of them, decoding values is the lesser work
  if (in.queries <= kFewRows) {
    attend_few(in, out, done);
  } else {
    attend_many(in, out, done);
  }
}

namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> additive_attend(
    const Tensor& query,
    const Tensor& key_codes,
    const Tensor& key_books,
    const Tensor& key_gains,
    const Tensor& key_means,
    int64_t key_group,
    const Tensor& value_codes,
    const Tensor& value_books,
    const Tensor& value_scales,
    const Tensor& turns,
    const Tensor& steps,
    const Tensor& first,
    int64_t stop,
    double softcap) {
  STD_TORCH_CHECK(
      query.scalar_type() == torch::headeronly::ScalarType::Float && query.dim() == 4,
      "additive_attend: query must be float32 [batch, heads, queries, dim]");
  const int64_t batch = query.size(0), heads = query.size(1);
  const int64_t queries = query.size(2), dim = query.size(3);
  const CodedTokens tokens = coded_tokens(
      "additive_attend",
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
  const Tensor q = without_gaps(query);
  Tensor sums = torch::stable::new_empty(query, {batch, heads, queries, dim});
  Tensor peaks = torch::stable::new_empty(query, {batch, heads, queries});
  Tensor totals = torch::stable::new_empty(query, {batch, heads, queries});
  const Softmaxes out = {
      sums.mutable_data_ptr<float>(),
      peaks.mutable_data_ptr<float>(),
      totals.mutable_data_ptr<float>()};
  attend_tokens(
      tokens.seen_by(q.const_data_ptr<float>(), queries, static_cast<float>(softcap)),
      out,
      [](int64_t) {});
  return {sums, peaks, totals};
}

} // namespace
} // namespace commvq

STABLE_TORCH_LIBRARY_IMPL(commvq, CPU, m) {
  m.impl("additive_attend", TORCH_BOX(&commvq::additive_attend));
}
