// The additive encoder's unit of work: one sub-vector of one group, on its own codebooks.
#pragma once

#include "common/buffer.h"
#include "cpu/additive_encode.h"

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace commvq {

struct EncodeShape {
  int64_t groups, subs, stages, codewords, sub_dim, tokens, beam;

  int64_t units() const { return groups * subs; }
  int64_t width() const { return (codewords + kWidthStep - 1) / kWidthStep * kWidthStep; }
};

class EncodeUnit {
 public:
  EncodeUnit(
      const EncodeShape& shape,
      const torch::stable::Tensor& x,
      const torch::stable::Tensor& codebooks,
      int64_t index)
      : shape_(shape),
        group_(index / shape.subs),
        sub_(index % shape.subs),
        token_stride_(x.stride(1)),
        tokens_(x.const_data_ptr<float>() + group_ * x.stride(0) + sub_ * shape.sub_dim),
        in_place_(is_transposed(shape, codebooks)),
        transposed_(in_place_ ? 0 : shape.stages * shape.sub_dim * shape.width()),
        norms_(shape.stages * shape.width()) {
    const float* source = codebooks.const_data_ptr<float>() + group_ * codebooks.stride(0) +
                          sub_ * codebooks.stride(1);
    if (in_place_) {
      books_ = source;
      book_stride_ = codebooks.stride(2);
    } else {
      transpose(source, codebooks.stride(2), codebooks.stride(3), codebooks.stride(4));
      books_ = transposed_.data();
      book_stride_ = shape.sub_dim * shape.width();
    }
    for (int64_t stage = 0; stage < shape.stages; ++stage) {
      float* norm = norms_.data() + stage * shape.width();
      encode_kernels().norms(book(stage), norm);
      // The padding is infinitely far away.
      std::fill(
          norm + shape.codewords, norm + shape.width(), std::numeric_limits<float>::infinity());
    }
  }

  const EncodeShape& shape() const { return shape_; }

  Book book(int64_t stage) const {
    return {books_ + stage * book_stride_, shape_.width(), shape_.sub_dim};
  }

  void copy_codeword(int64_t stage, int64_t codeword, float* to) const {
    const Book from = book(stage);
    for (int64_t d = 0; d < from.sub_dim; ++d) {
      to[d] = from.data[d * from.width + codeword];
    }
  }

  // out[token * width + k] = |c_k|^2 - 2 x . c_k for `count` tokens from `first`.
  void base_scores(int64_t stage, int64_t first, int64_t count, float* out) const {
    const float* norm = norms_.data() + stage * shape_.width();
    const float* rows = tokens_ + first * token_stride_;
    encode_kernels().products(rows, token_stride_, count, book(stage), -2.0f, norm, out);
  }

  // Where this unit's codes of a token begin in the output.
  int64_t output_offset(int64_t token) const {
    return ((group_ * shape_.tokens + token) * shape_.subs + sub_) * shape_.stages;
  }

 private:
  // Whether the caller's codebooks lie in memory as a Book wants them.
  static bool is_transposed(const EncodeShape& shape, const torch::stable::Tensor& codebooks) {
    return codebooks.stride(3) == 1 && codebooks.stride(4) == shape.codewords &&
           shape.codewords == shape.width();
  }

  void transpose(const float* from, int64_t stage_stride, int64_t codeword_stride, int64_t step) {
    float* to = transposed_.data();
    for (int64_t stage = 0; stage < shape_.stages; ++stage, from += stage_stride) {
      for (int64_t d = 0; d < shape_.sub_dim; ++d, to += shape_.width()) {
        for (int64_t k = 0; k < shape_.codewords; ++k) {
          to[k] = from[k * codeword_stride + d * step];
        }
        std::fill(to + shape_.codewords, to + shape_.width(), 0.0f);
      }
    }
  }

  const EncodeShape& shape_;
  int64_t group_, sub_, token_stride_;
  const float* tokens_;
  bool in_place_;
  Buffer<float> transposed_, norms_;
  const float* books_;
  int64_t book_stride_;
};

} // namespace commvq
