// commvq::additive_encode on the CPU: beam search over sums of codewords.
//
// With x . c of every codeword and 2 c . c' of pairs of codewords in tables, extending a beam takes
// additions of table rows alone: no residual is ever formed. Many tokens share a table of all
// pairs; for a few only the rows that their beams touch are worked out. Both give the same bits, so
// a token's code does not depend on how many are encoded with it, nor on threads.
#include "cpu/additive_encode.h"

#include "common/buffer.h"
#include "cpu/additive_encode_tables.h"
#include "cpu/additive_encode_unit.h"
#include "cpu/simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#define COMMVQ_KERNEL "cpu/additive_encode_kernel.h"
#include "cpu/each_level.h"

namespace commvq {

const EncodeKernels& encode_kernels() {
#if COMMVQ_X86
  if (simd_level() == Simd::avx512) {
    return avx512::kernels;
  }
  if (simd_level() == Simd::avx2) {
    return avx2::kernels;
  }
#endif
  return portable::kernels;
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTokensAtOnce = 32;      // their scores of one stage, 32 KB, stay near the core
constexpr int64_t kWorthAThread = 1 << 18; // multiply-adds that repay waking one

// The partial sums of a block of tokens: room for `beam` of them a token.
struct Beams {
  Beams(const EncodeShape& shape, int64_t tokens)
      : score(tokens * shape.beam), codes(tokens * shape.beam * shape.stages) {}

  Buffer<float> score;
  Buffer<uint8_t> codes;
};

// Encodes tokens [first, first + count) of a unit.
template <class Pairs>
void encode_block(
    const EncodeUnit& unit, Pairs& pairs, int64_t first, int64_t count, uint8_t* output) {
  const EncodeShape& shape = unit.shape();
  const int64_t codes_per_token = shape.beam * shape.stages;
  Buffer<float> base(count * shape.width());
  Buffer<const float*> rows(count * codes_per_token);
  Buffer<float> scores(shape.beam * shape.width());
  Buffer<int64_t> origin(shape.beam);
  Buffer<int64_t> beams(count);
  Beams now(shape, count), next(shape, count);
  Beams *from = &now, *to = &next;
  for (int64_t token = 0; token < count; ++token) {
    beams[token] = 1; // the empty sum
    now.score[token * shape.beam] = 0.0f;
  }
  for (int64_t stage = 0; stage < shape.stages; ++stage) {
    unit.base_scores(stage, first, count, base.data());
    for (int64_t token = 0; token < count; ++token) {
      const uint8_t* codes = from->codes.data() + token * codes_per_token;
      pairs.find(codes, beams[token], stage, rows.data() + token * codes_per_token);
    }
    pairs.complete(stage);
    for (int64_t token = 0; token < count; ++token) {
      const uint8_t* codes = from->codes.data() + token * codes_per_token;
      uint8_t* new_codes = to->codes.data() + token * codes_per_token;
      const int64_t kept = encode_kernels().extend(
          base.data() + token * shape.width(),
          shape.width(),
          rows.data() + token * codes_per_token,
          stage,
          from->score.data() + token * shape.beam,
          beams[token],
          scores.data(),
          {to->score.data() + token * shape.beam, origin.data(), shape.beam});
      for (int64_t place = 0; place < kept; ++place, new_codes += shape.stages) {
        const uint8_t* parent = codes + origin[place] / shape.width() * shape.stages;
        std::copy(parent, parent + stage, new_codes);
        new_codes[stage] = static_cast<uint8_t>(origin[place] % shape.width());
      }
      beams[token] = kept;
    }
    std::swap(from, to);
  }
  for (int64_t token = 0; token < count; ++token) {
    const uint8_t* best = from->codes.data() + token * codes_per_token;
    std::copy(best, best + shape.stages, output + unit.output_offset(first + token));
  }
}

// Few tokens: a unit a thread.
void encode_few(
    const EncodeShape& shape, const Tensor& x, const Tensor& codebooks, uint8_t* output) {
  const int64_t beam_rows = shape.tokens * shape.beam * shape.stages;
  const int64_t work = shape.stages * shape.width() * (shape.tokens * shape.sub_dim + beam_rows);
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / work);
  torch::stable::parallel_for(0, shape.units(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const EncodeUnit unit(shape, x, codebooks, index);
      PairsOnDemand pairs(unit);
      encode_block(unit, pairs, 0, shape.tokens, output);
    }
  });
}

// Many tokens: a unit after the other, so that only one table of pairs exists at a time.
void encode_many(
    const EncodeShape& shape, const Tensor& x, const Tensor& codebooks, uint8_t* output) {
  const int64_t blocks = (shape.tokens + kTokensAtOnce - 1) / kTokensAtOnce;
  for (int64_t index = 0; index < shape.units(); ++index) {
    const EncodeUnit unit(shape, x, codebooks, index);
    const AllPairs pairs(unit);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kTokensAtOnce;
        encode_block(unit, pairs, first, std::min(kTokensAtOnce, shape.tokens - first), output);
      }
    });
  }
}

EncodeShape checked_shape(const Tensor& x, const Tensor& codebooks, int64_t beam) {
  STD_TORCH_CHECK(
      x.scalar_type() == ScalarType::Float && codebooks.scalar_type() == ScalarType::Float,
      "additive_encode: x and codebooks must be float32");
  STD_TORCH_CHECK(x.dim() == 3, "additive_encode: x must be [groups, tokens, subs * sub_dim]");
  STD_TORCH_CHECK(
      codebooks.dim() == 5,
      "additive_encode: codebooks must be [groups, subs, stages, codewords, sub_dim]");
  EncodeShape shape = {
      codebooks.size(0),
      codebooks.size(1),
      codebooks.size(2),
      codebooks.size(3),
      codebooks.size(4),
      x.size(1),
      1};
  STD_TORCH_CHECK(
      x.size(0) == shape.groups && x.size(2) == shape.subs * shape.sub_dim,
      "additive_encode: x and codebooks do not fit each other");
  STD_TORCH_CHECK(
      shape.codewords >= 1 && shape.codewords <= 256 && shape.subs >= 1 && shape.stages >= 1 &&
          shape.sub_dim >= 1,
      "additive_encode: codebooks must have no empty axis and at most 256 codewords");
  STD_TORCH_CHECK(beam >= 1, "additive_encode: beam must be at least 1");
  // No more partial sums can be kept than there are.
  for (int64_t stage = 0; stage < shape.stages && shape.beam < beam; ++stage) {
    shape.beam = std::min(beam, shape.beam * shape.codewords);
  }
  return shape;
}

Tensor additive_encode(const Tensor& x, const Tensor& codebooks, int64_t beam) {
  const EncodeShape shape = checked_shape(x, codebooks, beam);
  Tensor output = torch::stable::new_empty(
      x, {shape.groups, shape.tokens, shape.subs * shape.stages}, ScalarType::Byte);
  if (output.numel() == 0) {
    return output;
  }
  // Rows must be contiguous; anything else may have any strides.
  const Tensor rows = x.stride(2) == 1 ? x : torch::stable::contiguous(x);
  uint8_t* codes = output.mutable_data_ptr<uint8_t>();
  if (shape.tokens * shape.beam < shape.codewords) {
    encode_few(shape, rows, codebooks, codes);
  } else {
    encode_many(shape, rows, codebooks, codes);
  }
  return output;
}

} // namespace
} // namespace commvq

STABLE_TORCH_LIBRARY_IMPL(commvq, CPU, m) {
  m.impl("additive_encode", TORCH_BOX(&commvq::additive_encode));
}
