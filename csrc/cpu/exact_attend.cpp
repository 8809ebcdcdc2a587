// Attention of a few queries over exact tokens, all of which every query sees, merged with what
// they have seen elsewhere: the end of a decoding step, in one call instead of some forty of
// PyTorch's, each of which waits for its code where a model's weights have just passed through all
// caches.
#include "cpu/exact_attend.h"
#include "common/buffer.h"
#include "cpu/simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#define COMMVQ_KERNEL "cpu/exact_attend_kernel.h"
#include "cpu/each_level.h"

namespace commvq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTokens = 32;     // widened at once
constexpr int64_t kAlone = 1 << 18; // multiply-adds that another thread is worth
constexpr float kTotal = 1e-30f;    // at least: rows that have seen nothing get zeros
constexpr float kNone = -std::numeric_limits<float>::infinity();

// Keys or values [batch, heads, tokens, dim]: the rows of a head one after the other.
struct Part {
  const char* data;
  bool brief;
  int64_t tokens, bytes, batch_stride, head_stride, token_stride;

  const void* at(int64_t row, int64_t head, int64_t token) const {
    return data + (row * batch_stride + head * head_stride + token * token_stride) * bytes;
  }
};

Part part_of(const Tensor& x, const Tensor& query, const Tensor& like, const char* name) {
  const bool brief = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(
      (brief || x.scalar_type() == ScalarType::Float) && x.dim() == 4 &&
          x.size(0) == query.size(0) && x.size(1) == query.size(1) && x.size(2) == like.size(2) &&
          x.size(3) == query.size(3) && (x.size(3) <= 1 || x.strides()[3] == 1),
      "exact_attend: ",
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

struct Exact {
  const ExactAttendKernels& kernels;
  const AttendKernels& softmax;
  int64_t heads, rows, dim, width, padded; // tokens of all parts, padded to whole vectors
  const float *query, *weighted, *peak, *total;
  float softcap;
  Part keys[2], values[2];
  float* output;

  void run(int64_t unit) const {
    const int64_t row = unit / heads, head = unit % heads;
    const int64_t tokens = keys[0].tokens + keys[1].tokens;
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

Tensor exact_attend(
    const Tensor& query,
    const Tensor& keys,
    const Tensor& values,
    const Tensor& sink_keys,
    const Tensor& sink_values,
    const Tensor& weighted,
    const Tensor& peak,
    const Tensor& total,
    double softcap) {
  STD_TORCH_CHECK(
      query.scalar_type() == ScalarType::Float && query.dim() == 4,
      "exact_attend: query must be float32 [batch, heads, queries, dim]");
  const int64_t units = query.size(0) * query.size(1), rows = query.size(2), dim = query.size(3);
  for (const Tensor* x : {&weighted, &peak, &total}) {
    STD_TORCH_CHECK(
        x->scalar_type() == ScalarType::Float &&
            x->numel() == units * rows * (x == &weighted ? dim : 1),
        "exact_attend: weighted, peak and total must be float32 [batch, heads, queries, ..]");
  }
  const Part own_keys[] = {
      part_of(keys, query, values, "keys"), part_of(sink_keys, query, sink_values, "sink_keys")};
  const Part own_values[] = {
      part_of(values, query, keys, "values"),
      part_of(sink_values, query, sink_keys, "sink_values")};
  const Tensor q = torch::stable::contiguous(query), w = torch::stable::contiguous(weighted);
  const Tensor p = torch::stable::contiguous(peak), t = torch::stable::contiguous(total);
  Tensor output = torch::stable::new_empty(query, {query.size(0), query.size(1), rows, dim});
  const int64_t tokens = own_keys[0].tokens + own_keys[1].tokens;
  const Exact work = {
      level_kernels(),
      attend_kernels(),
      query.size(1),
      rows,
      dim,
      (dim + kSums - 1) / kSums * kSums,
      std::max<int64_t>((tokens + kSums - 1) / kSums, 1) * kSums,
      q.const_data_ptr<float>(),
      w.const_data_ptr<float>(),
      p.const_data_ptr<float>(),
      t.const_data_ptr<float>(),
      static_cast<float>(softcap),
      {own_keys[0], own_keys[1]},
      {own_values[0], own_values[1]},
      output.mutable_data_ptr<float>()};
  const int64_t grain = 1 + kAlone / std::max<int64_t>(2 * rows * dim * tokens, 1);
  torch::stable::parallel_for(0, units, grain, [&](int64_t from, int64_t to) {
    for (int64_t unit = from; unit < to; ++unit) {
      work.run(unit);
    }
  });
  return output;
}

} // namespace
} // namespace commvq

STABLE_TORCH_LIBRARY_IMPL(commvq, CPU, m) {
  m.impl("exact_attend", TORCH_BOX(&commvq::exact_attend));
}
