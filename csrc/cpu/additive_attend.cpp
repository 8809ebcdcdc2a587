// Attention over tokens whose keys and values are additive codes: checks, and the way for few rows
// of queries (additive_attend_few.cpp) or many (additive_attend_many.cpp).
#include "cpu/additive_attend.h"

#include "common/attend_checks.h"
#include "cpu/additive_attend_jobs.h"
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

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kFewRows = 32; // for more of them, decoding values is the lesser work

Codes codes_of(const Tensor& codes, int64_t batch, int64_t heads, int64_t bytes, int64_t stop) {
  STD_TORCH_CHECK(
      codes.scalar_type() == ScalarType::Byte && codes.dim() == 4 && codes.size(0) == batch &&
          codes.size(1) == heads && codes.size(2) >= stop && codes.size(3) == bytes &&
          codes.strides()[3] == 1,
      "additive_attend: codes must be uint8 [batch, heads, at least stop, subs * stages]");
  return {
      codes.const_data_ptr<uint8_t>(), codes.strides()[0], codes.strides()[1], codes.strides()[2]};
}

void check_books(const Tensor& books, int64_t heads, int64_t dim) {
  STD_TORCH_CHECK(
      books.scalar_type() == ScalarType::Char && books.dim() == 5 && books.size(0) == heads &&
          books.size(3) == 256 && books.size(1) * books.size(4) == dim && books.is_contiguous() &&
          books.size(2) >= 1,
      "additive_attend: books must be contiguous int8 [heads, subs, stages, 256, sub_dim]");
}

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
      query.scalar_type() == ScalarType::Float && query.dim() == 4,
      "additive_attend: query must be float32 [batch, heads, queries, dim]");
  const int64_t batch = query.size(0), heads = query.size(1);
  const int64_t queries = query.size(2), dim = query.size(3);
  check_turns("additive_attend", turns, steps, first, batch, dim, stop, kTurn);
  const int64_t pairs = turns.size(3);
  check_books(key_books, heads, dim);
  check_books(value_books, heads, dim);
  STD_TORCH_CHECK(
      key_books.size(4) % 2 == 0, "additive_attend: sub-vectors of keys have an even width");
  const int64_t key_stages = key_books.size(1) * key_books.size(2);
  const int64_t value_stages = value_books.size(1) * value_books.size(2);
  STD_TORCH_CHECK(
      key_gains.scalar_type() == ScalarType::Byte && key_gains.is_contiguous() &&
          key_gains.numel() == heads * key_stages,
      "additive_attend: key_gains must be contiguous uint8 [heads, subs, stages]");
  STD_TORCH_CHECK(
      key_means.scalar_type() == ScalarType::Short && key_means.is_contiguous() &&
          key_means.numel() == heads * dim,
      "additive_attend: key_means must be contiguous int16 [heads, dim]");
  STD_TORCH_CHECK(
      key_group == 1 || key_group == 2 || key_group == 4,
      "additive_attend: key_group must be 1, 2 or 4");
  STD_TORCH_CHECK(
      value_scales.scalar_type() == ScalarType::Float && value_scales.is_contiguous() &&
          value_scales.numel() == heads * value_stages,
      "additive_attend: value_scales must be contiguous float32 [heads, subs, stages]");
  const Tensor q = torch::stable::contiguous(query), t = torch::stable::contiguous(turns);
  const Tensor s = torch::stable::contiguous(steps), f = torch::stable::contiguous(first);
  const KeyPlan plan(
      heads,
      key_books.size(1),
      key_books.size(2),
      key_books.size(4),
      key_group,
      pairs,
      key_books.const_data_ptr<int8_t>(),
      key_gains.const_data_ptr<uint8_t>(),
      key_means.const_data_ptr<int16_t>(),
      s.const_data_ptr<float>());
  Tensor sums = torch::stable::new_empty(query, {batch, heads, queries, dim});
  Tensor peaks = torch::stable::new_empty(query, {batch, heads, queries});
  Tensor totals = torch::stable::new_empty(query, {batch, heads, queries});
  const AttendInputs inputs = {
      attend_kernels(),
      batch,
      heads,
      queries,
      dim,
      t.size(1),
      t.size(0),
      q.const_data_ptr<float>(),
      t.const_data_ptr<float>(),
      f.const_data_ptr<int64_t>(),
      stop,
      static_cast<float>(softcap),
      codes_of(key_codes, batch, heads, key_stages, stop),
      codes_of(value_codes, batch, heads, value_stages, stop),
      plan,
      {value_books.size(1),
       value_books.size(2),
       value_books.size(4),
       value_books.const_data_ptr<int8_t>(),
       value_scales.const_data_ptr<float>()}};
  const Softmaxes out = {
      sums.mutable_data_ptr<float>(),
      peaks.mutable_data_ptr<float>(),
      totals.mutable_data_ptr<float>()};
  if (queries <= kFewRows) {
    attend_few(inputs, out);
  } else {
    attend_many(inputs, out);
  }
  return {sums, peaks, totals};
}

} // namespace
} // namespace commvq

STABLE_TORCH_LIBRARY_IMPL(commvq, CPU, m) {
  m.impl("additive_attend", TORCH_BOX(&commvq::additive_attend));
}
