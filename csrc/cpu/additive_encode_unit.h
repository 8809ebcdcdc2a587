// The additive encoder's unit of work: one sub-vector of one group, on its own codebooks. Codewords
// and tokens are rounded to int16, each stage and each token in units of its own, so that inner
// products are whole numbers and exact. What is found is the nearest sum of rounded codewords.
#pragma once

#include "common/buffer.h"
#include "cpu/additive_encode.h"

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace commvq {

struct EncodeShape {
  int64_t groups, subs, stages, codewords, sub_dim, tokens, beam;

  int64_t units() const { return groups * subs; }
  int64_t width() const { return (codewords + kWidthStep - 1) / kWidthStep * kWidthStep; }
  int64_t pairs() const { return (sub_dim + 1) / 2; }
};

// The power of two of which a row with this sum of squares is kLongest long at most; NaN for a sum
// that is not finite.
inline float unit_of(float square) {
  if (!std::isfinite(square)) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  int exponent = 0;
  std::frexp(std::sqrt(square) / kLongest, &exponent);
  return std::ldexp(1.0f, std::max(exponent, -100)); // its inverse must be a number too
}

// Room for rows of whole numbers, each in units of its own.
class RoundedRows {
 public:
  RoundedRows(const EncodeShape& shape, int64_t count)
      : stride_(2 * shape.pairs()), numbers_(count * stride_), units_(count) {}

  int16_t* at(int64_t row) const { return numbers_.data() + row * stride_; }
  float& unit(int64_t row) const { return units_[row]; }
  void copy(int64_t row, const Rows& first_of) const {
    std::copy_n(first_of.numbers, stride_, at(row));
    unit(row) = first_of.units[0];
  }
  Rows from(int64_t first) const { return {at(first), stride_, units_.data() + first}; }

 private:
  int64_t stride_;
  Buffer<int16_t> numbers_;
  Buffer<float> units_;
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
        rounded_(shape, shape.tokens),
        codewords_(shape, shape.stages * shape.codewords),
        pairs_(shape.stages * shape.pairs() * shape.width()),
        norms_(shape.stages * shape.width()) {
    const float* source = codebooks.const_data_ptr<float>() + group_ * codebooks.stride(0) +
                          sub_ * codebooks.stride(1);
    const int64_t size = shape.codewords * shape.sub_dim;
    const bool in_place =
        codebooks.stride(4) == 1 && (codebooks.stride(3) == shape.sub_dim || shape.codewords == 1);
    const Buffer<float> own(in_place ? 0 : size);
    for (int64_t stage = 0; stage < shape.stages; ++stage, source += codebooks.stride(2)) {
      for (int64_t i = 0; !in_place && i < size; ++i) {
        const int64_t codeword = i / shape.sub_dim, dim = i % shape.sub_dim;
        own[i] = source[codeword * codebooks.stride(3) + dim * codebooks.stride(4)];
      }
      round_stage(stage, in_place ? source : own.data());
    }
  }

  const EncodeShape& shape() const { return shape_; }

  Book book(int64_t stage) const {
    const int64_t size = shape_.pairs() * shape_.width();
    const float unit = codewords_.unit(stage * shape_.codewords);
    return {pairs_.data() + stage * size, shape_.width(), shape_.pairs(), unit};
  }

  // Those of `stage` from `first`.
  Rows codewords(int64_t stage, int64_t first) const {
    return codewords_.from(stage * shape_.codewords + first);
  }

  // Call it before base_scores. A token that is not finite has scores that are not.
  void round_tokens(int64_t first, int64_t count) const {
    for (int64_t token = first; token < first + count; ++token) {
      const float* from = tokens_ + token * token_stride_;
      round_row(from, unit_of(encode_kernels().square(from, shape_.sub_dim)), rounded_, token);
    }
  }

  // out[token * width + k] = |c_k|^2 - 2 x . c_k for `count` tokens from `first`.
  void base_scores(int64_t stage, int64_t first, int64_t count, float* out) const {
    const float* norm = norms_.data() + stage * shape_.width();
    encode_kernels().products(rounded_.from(first), count, book(stage), -2.0f, norm, out);
  }

  // Where this unit's codes of a token begin in the output.
  int64_t output_offset(int64_t token) const {
    return ((group_ * shape_.tokens + token) * shape_.subs + sub_) * shape_.stages;
  }

 private:
  void round_row(const float* from, float unit, const RoundedRows& to, int64_t row) const {
    const int64_t dims = shape_.sub_dim;
    int16_t* numbers = to.at(row);
    to.unit(row) = unit;
    if (std::isnan(unit)) {
      std::fill_n(numbers, dims, int16_t{0});
    } else {
      encode_kernels().round_row(from, dims, 1.0f / unit, numbers);
    }
    if (dims % 2 != 0) {
      numbers[dims] = 0;
    }
  }

  // From codewords [codewords, sub_dim].
  void round_stage(int64_t stage, const float* from) const {
    const EncodeKernels& kernels = encode_kernels();
    const int64_t width = shape_.width(), first = stage * shape_.codewords;
    float longest = 0.0f;
    for (int64_t k = 0; k < shape_.codewords; ++k) {
      const float square = kernels.square(from + k * shape_.sub_dim, shape_.sub_dim);
      longest = std::isnan(longest) || square <= longest ? longest : square;
    }
    const float unit = unit_of(longest);
    for (int64_t k = 0; k < shape_.codewords; ++k) {
      round_row(from + k * shape_.sub_dim, unit, codewords_, first + k);
    }
    transpose(stage);
    float* norm = norms_.data() + stage * width;
    kernels.norms(book(stage), norm);
    // The padding is infinitely far away.
    std::fill(norm + shape_.codewords, norm + width, std::numeric_limits<float>::infinity());
  }

  // Makes a stage's book of its codewords, some neighbours at a time so that lines fill.
  void transpose(int64_t stage) const {
    const int64_t width = shape_.width(), count = shape_.pairs();
    int32_t* to = pairs_.data() + stage * count * width;
    for (int64_t begin = 0; begin < width; begin += kWidthStep) {
      const int64_t end = std::min(begin + kWidthStep, shape_.codewords);
      const int16_t* from = codewords_.at(stage * shape_.codewords + begin);
      for (int64_t pair = 0; pair < count; ++pair) {
        int32_t* row = to + pair * width;
        for (int64_t k = begin; k < end; ++k) {
          std::memcpy(row + k, from + 2 * ((k - begin) * count + pair), 4);
        }
        std::fill(row + end, row + begin + kWidthStep, 0);
      }
    }
  }

  const EncodeShape& shape_;
  int64_t group_, sub_, token_stride_;
  const float* tokens_;
  RoundedRows rounded_, codewords_;
  Buffer<int32_t> pairs_;
  Buffer<float> norms_;
};

} // namespace commvq
