// What a row and head's queries do with exact tokens: a job of attention over them.
#pragma once

#include "common/buffer.h"
#include "cpu/exact_attend.h"

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace commvq {

// Keys or values [batch, heads, tokens, dim]: the rows of a head one after the other.
struct Part {
  const char* data;
  bool brief;
  int64_t tokens, bytes, batch_stride, head_stride, token_stride;

  const void* at(int64_t row, int64_t head, int64_t token) const {
    return data + (row * batch_stride + head * head_stride + token * token_stride) * bytes;
  }
};

// `x` as a Part; `like` has as many tokens.
inline Part part_of(
    const char* op,
    const char* name,
    const torch::stable::Tensor& x,
    const torch::stable::Tensor& like,
    int64_t batch,
    int64_t heads,
    int64_t dim) {
  using torch::headeronly::ScalarType;
  const bool brief = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(
      (brief || x.scalar_type() == ScalarType::Float) && x.dim() == 4 && x.size(0) == batch &&
          x.size(1) == heads && x.size(2) == like.size(2) && x.size(3) == dim &&
          (x.size(3) <= 1 || x.strides()[3] == 1),
      op,
      ": ",
      name,
      " must be float32 or bfloat16 [batch, heads, tokens, dim], rows without gaps, as many keys "
      "as values");
  return {
      static_cast<const char*>(x.const_data_ptr()),
      brief,
      x.size(2),
      brief ? 2 : 4,
      x.strides()[0],
      x.strides()[1],
      x.strides()[2]};
}

// Queries [batch, heads, rows, dim] over the tokens of both parts, and what they have seen
// elsewhere: `weighted` of their shape, `peak` and `total` [batch, heads, rows].
struct ExactRows {
  static constexpr int64_t kTokens = 32;  // widened at once
  static constexpr float kTotal = 1e-30f; // at least: rows that have seen nothing get zeros
  static constexpr float kNone = -std::numeric_limits<float>::infinity();

  int64_t heads, rows, dim;
  const float *query, *weighted, *peak, *total;
  float softcap;
  Part keys[2], values[2];
  float* output;
  int64_t tokens = keys[0].tokens + keys[1].tokens;
  // Dims and tokens, padded to whole vectors.
  int64_t width = rounded_up(dim, kSums), padded = rounded_up(std::max<int64_t>(tokens, 1), kSums);
  const ExactAttendKernels& kernels = exact_attend_kernels();
  const AttendKernels& softmax = attend_kernels();

  // Multiply-adds of a row and head.
  int64_t work() const { return 2 * rows * dim * tokens; }

  void run(int64_t unit) const {
    const int64_t row = unit / heads, head = unit % heads;
    const Buffer<float> queries(rows * width), scores(rows * padded), block(kTokens * width);
    const Buffer<float> sums(rows * width);
    kernels.load(query + unit * rows * dim, false, dim, rows, dim, width, queries.data());
    std::fill(sums.data(), sums.data() + rows * width, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      float* own = scores.data() + r * padded;
      std::fill(own + tokens, own + padded, 0.0f);
    }
    each(keys, row, head, block.data(), [&](int64_t at, int64_t count) {
      kernels.score(queries.data(), rows, width, block.data(), count, scores.data() + at, padded);
    });
    if (softcap > 0.0f) {
      softmax.cap(scores.data(), rows * padded, softcap);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float *own = scores.data() + r * padded, most = kNone, sum = 0.0f;
      std::fill(own + tokens, own + padded, kNone);
      softmax.raise(own, padded, 1, &most);
      softmax.soften(own, padded, 1, &most, &sum);
      finish(unit * rows + r, most, sum, own, sums.data() + r * width);
    }
    each(values, row, head, block.data(), [&](int64_t at, int64_t count) {
      kernels.accumulate(scores.data() + at, padded, rows, block.data(), count, width, sums.data());
    });
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(sums.data() + r * width, dim, output + (unit * rows + r) * dim);
    }
  }

  // Calls use(place, count) for the tokens of both parts, some at a time, widened to `block`.
  template <class Use>
  void each(const Part (&parts)[2], int64_t row, int64_t head, float* block, const Use& use) const {
    for (int64_t p = 0; p < 2; ++p) {
      const Part& part = parts[p];
      for (int64_t at = 0; at < part.tokens; at += kTokens) {
        const int64_t count = std::min(part.tokens - at, kTokens);
        const void* from = part.at(row, head, at);
        kernels.load(from, part.brief, part.token_stride, count, dim, width, block);
        use(p * parts[0].tokens + at, count);
      }
    }
  }

  // Makes the weights of exact tokens and the sums so far those of the whole softmax.
  void finish(int64_t r, float most, float sum, float* weights, float* sums) const {
    const float both = std::max(peak[r], most);
    const float old = peak[r] > kNone ? std::exp(peak[r] - both) : 0.0f;
    const float own = most > kNone ? std::exp(most - both) : 0.0f;
    const float all = std::max(total[r] * old + sum * own, kTotal);
    for (int64_t t = 0; t < padded; ++t) {
      weights[t] = own > 0.0f ? weights[t] * (own / all) : 0.0f;
    }
    for (int64_t d = 0; d < dim; ++d) {
      sums[d] = weighted[r * dim + d] * (old / all);
    }
  }
};

} // namespace commvq
