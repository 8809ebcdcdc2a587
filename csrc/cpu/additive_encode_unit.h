// The additive encoder's unit of work: one sub-vector of one group, on its own codebooks. Codewords
// and tokens are rounded to int16, each stage and each token in units of its own. What is found is
// the sum of rounded codewords that is nearest to the rounded token.
#pragma once

#include "common/buffer.h"
#include "cpu/additive_encode.h"

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace commvq {

struct EncodeShape {
  int64_t groups, subs, stages, codewords, sub_dim, tokens, beam;

  int64_t units() const { return groups * subs; }
  int64_t width() const {
    return static_cast<int64_t>(
        std::bit_ceil(static_cast<uint64_t>(std::max(codewords, kLeastWidth))));
  }
  int64_t wide() const { return (sub_dim + kWideStep - 1) / kWideStep * kWideStep; }
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

// A pointer to `count` numbers from `from` on, of which each is `stride` after the last: those
// themselves, or what they are copied to.
inline const float* in_a_row(const float* from, int64_t count, int64_t stride, float* copy) {
  if (stride == 1) {
    return from;
  }
  for (int64_t i = 0; i < count; ++i) {
    copy[i] = from[i * stride];
  }
  return copy;
}

// Rows of rounded numbers, each in units of its own: as floats, and as int16 where they are wanted.
class RoundedRows {
 public:
  RoundedRows(const EncodeShape& shape, int64_t count, bool whole)
      : dims_(shape.sub_dim),
        wide_(shape.wide()),
        stride_(2 * shape.pairs()),
        floats_(count * wide_),
        numbers_(whole ? count * stride_ : 0),
        units_(count),
        whole_(whole) {}

  const float* floats(int64_t row) const { return floats_.data() + row * wide_; }
  const int16_t* numbers(int64_t row) const { return numbers_.data() + row * stride_; }
  float unit(int64_t row) const { return units_[row]; }
  Rows from(int64_t first) const { return {numbers(first), stride_, units_.data() + first}; }

  void round(int64_t row, const float* from, float unit) const {
    int16_t* numbers = whole_ ? numbers_.data() + row * stride_ : nullptr;
    float* floats = floats_.data() + row * wide_;
    units_[row] = unit;
    if (whole_) {
      numbers[stride_ - 1] = 0; // where dims are odd
    }
    if (std::isnan(unit)) {
      std::fill_n(floats, wide_, unit);
      if (whole_) {
        std::fill_n(numbers, stride_, int16_t{0});
      }
    } else {
      encode_kernels().round_row(from, dims_, 1.0f / unit, unit, numbers, floats);
    }
  }

 private:
  int64_t dims_, wide_, stride_;
  Buffer<float> floats_;
  Buffer<int16_t> numbers_;
  Buffer<float> units_;
  bool whole_;
};

class EncodeUnit {
 public:
  // With `tables` it has what tables are made of, too.
  EncodeUnit(
      const EncodeShape& shape,
      const torch::stable::Tensor& x,
      const torch::stable::Tensor& codebooks,
      int64_t index,
      bool tables)
      : shape_(shape),
        group_(index / shape.subs),
        sub_(index % shape.subs),
        token_stride_(x.stride(1)),
        tokens_(x.const_data_ptr<float>() + group_ * x.stride(0) + sub_ * shape.sub_dim),
        tables_(tables),
        rounded_(shape, shape.tokens, tables),
        codewords_(shape, shape.stages * shape.codewords, tables),
        pairs_(tables ? shape.stages * shape.pairs() * shape.width() : 0),
        quads_(shape.stages * shape.wide() / 4 * shape.width()),
        norms_(shape.stages * shape.width()),
        stages_(shape.stages) {
    const float* source = codebooks.const_data_ptr<float>() + group_ * codebooks.stride(0) +
                          sub_ * codebooks.stride(1);
    float reach = 0.0f;
    for (int64_t stage = 0; stage < shape.stages; ++stage, source += codebooks.stride(2)) {
      stages_[stage] = round_stage(stage, source, codebooks.stride(3), codebooks.stride(4));
      stages_[stage].reach = reach;
      reach += stages_[stage].longest;
    }
  }

  const EncodeShape& shape() const { return shape_; }

  Codebooks codebooks() const {
    const int64_t width = shape_.width();
    return {
        stages_.data(),
        shape_.codewords,
        width,
        std::countr_zero(static_cast<uint64_t>(width)),
        shape_.wide()};
  }
  Book book(int64_t stage) const {
    const int64_t size = shape_.pairs() * shape_.width();
    const float unit = codewords_.unit(stage * shape_.codewords);
    return {pairs_.data() + stage * size, shape_.width(), shape_.pairs(), unit};
  }
  const Stage& stage(int64_t stage) const { return stages_[stage]; }

  // Those of `stage` from `first`.
  Rows codewords(int64_t stage, int64_t first) const {
    return codewords_.from(stage * shape_.codewords + first);
  }

  // Call it before what follows. A token that is not finite is all NaN.
  void round_tokens(int64_t first, int64_t count) const {
    for (int64_t token = first; token < first + count; ++token) {
      const float* from = tokens_ + token * token_stride_;
      rounded_.round(token, from, unit_of(encode_kernels().square(from, shape_.sub_dim)));
    }
  }
  const float* token(int64_t token) const { return rounded_.floats(token); }
  float square(int64_t token) const {
    return encode_kernels().square(rounded_.floats(token), shape_.wide());
  }

  // out[token * width + k] = |c_k|^2 - 2 x . c_k for `count` tokens from `first`, as `products` has
  // it.
  void base_scores(int64_t stage, int64_t first, int64_t count, float unit, int16_t* out) const {
    const float* norm = norms_.data() + stage * shape_.width();
    encode_kernels().products(rounded_.from(first), count, book(stage), -2.0f, norm, unit, out);
  }

  // Where this unit's codes of a token begin in the output.
  int64_t output_offset(int64_t token) const {
    return ((group_ * shape_.tokens + token) * shape_.subs + sub_) * shape_.stages;
  }

 private:
  Stage round_stage(int64_t stage, const float* from, int64_t stride, int64_t dim_stride) const {
    const EncodeKernels& kernels = encode_kernels();
    const int64_t width = shape_.width(), wide = shape_.wide(), first = stage * shape_.codewords;
    const int64_t dims = shape_.sub_dim, count = shape_.codewords;
    const Buffer<float> copy(dims);
    float most = 0.0f;
    for (int64_t k = 0; k < count; ++k) {
      const float* own = in_a_row(from + k * stride, dims, dim_stride, copy.data());
      const float square = kernels.square(own, dims);
      most = std::isnan(most) || square <= most ? most : square;
    }
    const float unit = unit_of(most);
    float* norms = norms_.data() + stage * width;
    float longest = 0.0f;
    for (int64_t k = 0; k < count; ++k) {
      const float* own = in_a_row(from + k * stride, dims, dim_stride, copy.data());
      codewords_.round(first + k, own, unit);
      norms[k] = kernels.square(codewords_.floats(first + k), wide);
      longest = std::max(longest, std::sqrt(norms[k]));
    }
    std::fill(norms + count, norms + width, 0.0f);
    if (tables_) {
      make_pairs(stage);
    }
    int32_t* quads = quads_.data() + stage * (wide / 4) * width;
    const float quad_unit = kernels.largest(codewords_.floats(first), count * wide) / 127.0f;
    const float error = make_quads(codewords_.floats(first), quad_unit, quads);
    return {
        codewords_.floats(first),
        norms,
        quads,
        quad_unit,
        error,
        std::isnan(unit) ? unit : longest * 1.0001f, // more than what it is rounded to
        0.0f};
  }

  // Makes a stage's book of its codewords, some neighbours at a time so that lines fill.
  void make_pairs(int64_t stage) const {
    const int64_t width = shape_.width(), count = shape_.pairs();
    int32_t* to = pairs_.data() + stage * count * width;
    const int16_t* from = codewords_.numbers(stage * shape_.codewords);
    for (int64_t begin = 0; begin < width; begin += kTogether) {
      const int64_t end = std::clamp(shape_.codewords, begin, begin + kTogether);
      for (int64_t pair = 0; pair < count; ++pair) {
        int32_t* row = to + pair * width;
        for (int64_t k = begin; k < end; ++k) {
          std::memcpy(row + k, from + 2 * (k * count + pair), 4);
        }
        std::fill(row + end, row + begin + kTogether, 0);
      }
    }
  }

  // The same as bytes, in fours. Returns how far they are from a codeword at most.
  float make_quads(const float* rows, float unit, int32_t* to) const {
    const int64_t width = shape_.width(), wide = shape_.wide(), count = wide / 4;
    const Buffer<int32_t> bytes(kTogether * count);
    float error = 0.0f;
    for (int64_t begin = 0; begin < width; begin += kTogether) {
      const int64_t end = std::clamp(shape_.codewords, begin, begin + kTogether);
      for (int64_t k = begin; k < end; ++k) {
        auto* own = reinterpret_cast<int8_t*>(bytes.data() + (k - begin) * count);
        error = std::max(error, encode_kernels().round_bytes(rows + k * wide, wide, unit, own));
      }
      for (int64_t quad = 0; quad < count; ++quad) {
        int32_t* row = to + quad * width;
        for (int64_t k = begin; k < end; ++k) {
          row[k] = bytes[(k - begin) * count + quad] ^ kOffset;
        }
        std::fill(row + end, row + begin + kTogether, kOffset);
      }
    }
    return std::sqrt(error) * 1.0001f;
  }

  static constexpr int64_t kTogether = 16;
  static constexpr auto kOffset = static_cast<int32_t>(0x80808080u);

  const EncodeShape& shape_;
  int64_t group_, sub_, token_stride_;
  const float* tokens_;
  bool tables_;
  RoundedRows rounded_, codewords_;
  Buffer<int32_t> pairs_, quads_;
  Buffer<float> norms_;
  Buffer<Stage> stages_;
};

} // namespace commvq
