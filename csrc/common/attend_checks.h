// What all operators of attention over codes ask of the arguments that say how tokens turn.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace commvq {

// Of queries [batch, .., dim] that see the tokens before `stop`, each row from its `first` on;
// `block` tokens share a row of turns.
inline void check_turns(
    const char* op,
    const torch::stable::Tensor& turns,
    const torch::stable::Tensor& steps,
    const torch::stable::Tensor& first,
    int64_t batch,
    int64_t dim,
    int64_t stop,
    int64_t block) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(
      turns.scalar_type() == ScalarType::Float && turns.dim() == 4 && turns.size(2) == 2 &&
          2 * turns.size(3) <= dim && (turns.size(0) == 1 || turns.size(0) == batch),
      op,
      ": turns must be float32 [1 or batch, blocks, 2, pairs]");
  STD_TORCH_CHECK(
      stop >= 0 && turns.size(1) * block >= stop,
      op,
      ": turns must have a row for each block of ",
      block,
      " tokens before stop");
  STD_TORCH_CHECK(
      steps.scalar_type() == ScalarType::Float && steps.dim() == 3 && steps.size(0) == block &&
          steps.size(1) == 2 && steps.size(2) == turns.size(3),
      op,
      ": steps must be float32 [tokens of a block, 2, pairs]");
  STD_TORCH_CHECK(
      first.scalar_type() == ScalarType::Long && first.dim() == 1 && first.size(0) == batch,
      op,
      ": first must be int64 [batch]");
}

// torch's own asks the dispatcher even where there is nothing to do.
inline torch::stable::Tensor without_gaps(const torch::stable::Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

} // namespace commvq
