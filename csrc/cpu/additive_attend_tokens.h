// The tokens that attention over additive codes is over: what the operators are given, checked.
#pragma once

#include "common/attend_checks.h"
#include "cpu/additive_attend_jobs.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace commvq {

struct CodedTokens {
  int64_t batch, heads, dim, stop;
  torch::stable::Tensor turns, first;
  KeyPlan plan;
  Codes key_codes, value_codes;
  Values values;

  // What `queries` rows of each head [batch, heads, queries, dim] see of them.
  AttendInputs seen_by(const float* query, int64_t queries, float softcap) const {
    return {
        attend_kernels(),
        batch,
        heads,
        queries,
        dim,
        turns.size(1),
        turns.size(0),
        query,
        turns.const_data_ptr<float>(),
        first.const_data_ptr<int64_t>(),
        stop,
        softcap,
        key_codes,
        value_codes,
        plan,
        values};
  }
};

inline Codes codes_of(
    const char* op,
    const torch::stable::Tensor& codes,
    int64_t batch,
    int64_t heads,
    int64_t bytes,
    int64_t stop) {
  STD_TORCH_CHECK(
      codes.scalar_type() == torch::headeronly::ScalarType::Byte && codes.dim() == 4 &&
          codes.size(0) == batch && codes.size(1) == heads && codes.size(2) >= stop &&
          codes.size(3) == bytes && codes.strides()[3] == 1,
      op,
      ": codes must be uint8 [batch, heads, at least stop, subs * stages]");
  return {
      codes.const_data_ptr<uint8_t>(), codes.strides()[0], codes.strides()[1], codes.strides()[2]};
}

inline void check_books(
    const char* op, const torch::stable::Tensor& books, int64_t heads, int64_t dim) {
  STD_TORCH_CHECK(
      books.scalar_type() == torch::headeronly::ScalarType::Char && books.dim() == 5 &&
          books.size(0) == heads && books.size(3) == 256 && books.size(1) * books.size(4) == dim &&
          books.is_contiguous() && books.size(2) >= 1,
      op,
      ": books must be contiguous int8 [heads, subs, stages, 256, sub_dim]");
}

// Of queries [batch, heads, .., dim]; the other arguments as the operators are given them.
inline CodedTokens coded_tokens(
    const char* op,
    int64_t batch,
    int64_t heads,
    int64_t dim,
    const torch::stable::Tensor& key_codes,
    const torch::stable::Tensor& key_books,
    const torch::stable::Tensor& key_gains,
    const torch::stable::Tensor& key_means,
    int64_t key_group,
    const torch::stable::Tensor& value_codes,
    const torch::stable::Tensor& value_books,
    const torch::stable::Tensor& value_scales,
    const torch::stable::Tensor& turns,
    const torch::stable::Tensor& steps,
    const torch::stable::Tensor& first,
    int64_t stop) {
  using torch::headeronly::ScalarType;
  check_turns(op, turns, steps, first, batch, dim, stop, kTurn);
  check_books(op, key_books, heads, dim);
  check_books(op, value_books, heads, dim);
  STD_TORCH_CHECK(key_books.size(4) % 2 == 0, op, ": sub-vectors of keys have an even width");
  const int64_t key_stages = key_books.size(1) * key_books.size(2);
  const int64_t value_stages = value_books.size(1) * value_books.size(2);
  STD_TORCH_CHECK(
      key_gains.scalar_type() == ScalarType::Byte && key_gains.is_contiguous() &&
          key_gains.numel() == heads * key_stages,
      op,
      ": key_gains must be contiguous uint8 [heads, subs, stages]");
  STD_TORCH_CHECK(
      key_means.scalar_type() == ScalarType::Short && key_means.is_contiguous() &&
          key_means.numel() == heads * dim,
      op,
      ": key_means must be contiguous int16 [heads, dim]");
  STD_TORCH_CHECK(
      key_group == 1 || key_group == 2 || key_group == 4, op, ": key_group must be 1, 2 or 4");
  STD_TORCH_CHECK(
      value_scales.scalar_type() == ScalarType::Float && value_scales.is_contiguous() &&
          value_scales.numel() == heads * value_stages,
      op,
      ": value_scales must be contiguous float32 [heads, subs, stages]");
  const torch::stable::Tensor own_steps = without_gaps(steps);
  return {
      batch,
      heads,
      dim,
      stop,
      without_gaps(turns),
      without_gaps(first),
      KeyPlan(
          heads,
          key_books.size(1),
          key_books.size(2),
          key_books.size(4),
          key_group,
          turns.size(3),
          key_books.const_data_ptr<int8_t>(),
          key_gains.const_data_ptr<uint8_t>(),
          key_means.const_data_ptr<int16_t>(),
          own_steps.const_data_ptr<float>()),
      codes_of(op, key_codes, batch, heads, key_stages, stop),
      codes_of(op, value_codes, batch, heads, value_stages, stop),
      {value_books.size(1),
       value_books.size(2),
       value_books.size(4),
       value_books.const_data_ptr<int8_t>(),
       value_scales.const_data_ptr<float>()}};
}

} // namespace commvq
