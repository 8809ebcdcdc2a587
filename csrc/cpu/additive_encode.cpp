// commvq::additive_encode on the CPU: beam search over sums of codewords.
//
// With x . c of every codeword and 2 c . c' of pairs of codewords in tables, extending a beam takes
// additions of table rows alone: no residual is ever formed. Many tokens share a table of all
// pairs; for a few only the rows that their beams touch are worked out. Both give the same bits, so
// a token's code does not depend on how many are encoded with it, nor on threads.
#include "cpu/additive_encode.h"

#include "common/buffer.h"
#include "common/share.h"
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
  return level_kernels();
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTokensAtOnce = 32;      // their scores of one stage, 32 KB, stay near the core
constexpr int64_t kWorthAThread = 1 << 18; // multiply-adds that repay waking one

// The partial sums of some tokens of a unit, of one stage and of the next in turn: room for `beam`
// of them a token.
class Beams {
 public:
  Beams(const EncodeShape& shape, int64_t tokens)
      : codes_per_token(shape.beam * shape.stages),
        beam_(shape.beam),
        kept_(tokens),
        sides_{Side(shape, tokens), Side(shape, tokens)} {
    for (int64_t token = 0; token < tokens; ++token) {
      kept_[token] = 1; // the empty sum
      sides_[0].score[token * shape.beam] = 0.0f;
      sides_[0].order[token * shape.beam] = 0;
      sides_[0].shared[token * shape.beam] = 0;
    }
  }

  // What a stage reads, and what it writes.
  const uint8_t* codes(int64_t stage, int64_t token) const {
    return sides_[stage % 2].codes.data() + token * codes_per_token;
  }
  const float* score(int64_t stage, int64_t token) const {
    return sides_[stage % 2].score.data() + token * beam_;
  }
  Tree tree(int64_t stage, int64_t token) const {
    const Side& side = sides_[stage % 2];
    return {side.order.data() + token * beam_, side.shared.data() + token * beam_};
  }
  uint8_t* new_codes(int64_t stage, int64_t token) const {
    return sides_[(stage + 1) % 2].codes.data() + token * codes_per_token;
  }
  float* new_score(int64_t stage, int64_t token) const {
    return sides_[(stage + 1) % 2].score.data() + token * beam_;
  }
  int64_t& kept(int64_t token) const { return kept_[token]; }

  // Orders the `count` new sums, of which the i-th extends parent[i], as the tree of their parents
  // says: children of one parent differ only in the codeword of `stage`.
  void grow_tree(int64_t stage, int64_t token, const int64_t* parent, int64_t count) const {
    const Tree old = tree(stage, token);
    const Side& side = sides_[(stage + 1) % 2];
    int32_t* order = side.order.data() + token * beam_;
    int32_t* shared = side.shared.data() + token * beam_;
    const int32_t all = static_cast<int32_t>(stage);
    int32_t common = 0; // of this parent and the last one that has children
    int64_t placed = 0;
    for (int64_t i = 0; i < kept_[token]; ++i) {
      common = std::min(common, old.shared[i]);
      for (int64_t place = 0; place < count; ++place) {
        if (parent[place] == old.order[i]) {
          shared[placed] = common;
          order[placed++] = static_cast<int32_t>(place);
          common = all;
        }
      }
    }
  }

  const int64_t codes_per_token;

 private:
  struct Side {
    Side(const EncodeShape& shape, int64_t tokens)
        : score(tokens * shape.beam),
          codes(tokens * shape.beam * shape.stages),
          order(tokens * shape.beam),
          shared(tokens * shape.beam) {}

    Buffer<float> score;
    Buffer<uint8_t> codes;
    Buffer<int32_t> order, shared;
  };

  const int64_t beam_;
  Buffer<int64_t> kept_;
  Side sides_[2];
};

// Extends the partial sums of tokens [first, first + count) by a codeword of `stage`.
template <class Pairs>
void extend_block(
    const EncodeUnit& unit,
    Pairs& pairs,
    int64_t stage,
    int64_t first,
    int64_t count,
    const Beams& beams) {
  const EncodeShape& shape = unit.shape();
  Buffer<float> base(count * shape.width());
  Buffer<const float*> rows(count * beams.codes_per_token);
  Buffer<float> scores(2 * shape.beam * shape.width());
  Buffer<int64_t> origin(shape.beam);
  unit.base_scores(stage, first, count, base.data());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = first + i;
    pairs.find(
        beams.codes(stage, token),
        beams.kept(token),
        stage,
        rows.data() + i * beams.codes_per_token);
  }
  pairs.complete(stage);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = first + i;
    const uint8_t* codes = beams.codes(stage, token);
    uint8_t* new_codes = beams.new_codes(stage, token);
    const int64_t kept = encode_kernels().extend(
        base.data() + i * shape.width(),
        shape.width(),
        rows.data() + i * beams.codes_per_token,
        stage,
        beams.score(stage, token),
        beams.kept(token),
        beams.tree(stage, token),
        scores.data(),
        {beams.new_score(stage, token), origin.data(), shape.beam});
    for (int64_t place = 0; place < kept; ++place, new_codes += shape.stages) {
      const int64_t parent = origin[place] / shape.width();
      const uint8_t* begin = codes + parent * shape.stages;
      std::copy(begin, begin + stage, new_codes);
      new_codes[stage] = static_cast<uint8_t>(origin[place] - parent * shape.width());
      origin[place] = parent;
    }
    beams.grow_tree(stage, token, origin.data(), kept);
    beams.kept(token) = kept;
  }
}

// The best of the sums of tokens [first, first + count) goes to the output.
void write_best(
    const EncodeUnit& unit, const Beams& beams, int64_t first, int64_t count, uint8_t* output) {
  const int64_t stages = unit.shape().stages;
  for (int64_t token = first; token < first + count; ++token) {
    const uint8_t* best = beams.codes(stages, token);
    std::copy(best, best + stages, output + unit.output_offset(token));
  }
}

// Whether the rows that all beams ask for are fewer than there are, or hardly more: then units
// that keep all threads busy repay themselves by what they share.
bool are_few(const EncodeShape& shape) {
  const int64_t sums = shape.tokens * shape.beam;
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  return sums < shape.codewords || (sums <= 4 * shape.codewords && shape.units() >= threads);
}

// Few tokens: a unit a job. Units that are left when every thread has as many as the others are cut
// into parts of their tokens, if those go round: half a unit's take two thirds of the time.
void encode_few(
    const EncodeShape& shape, const Tensor& x, const Tensor& codebooks, uint8_t* output) {
  const int64_t beam_rows = shape.tokens * shape.beam * shape.stages;
  const int64_t work = shape.stages * shape.width() * (shape.tokens * shape.sub_dim + beam_rows);
  const auto all = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t threads = work * shape.units() < kWorthAThread ? 1 : all;
  const int64_t each = shape.units() / threads, left = shape.units() % threads;
  const int64_t parts = left == 0 ? 1 : threads / left;
  const bool cut = each > 0 && left * parts == threads && shape.tokens >= parts;
  const auto encode = [&](int64_t index, int64_t part, int64_t of) {
    const EncodeUnit unit(shape, x, codebooks, index);
    const int64_t first = shape.tokens * part / of;
    const int64_t count = shape.tokens * (part + 1) / of - first;
    PairsOnDemand pairs(unit);
    const Beams beams(shape, shape.tokens);
    unit.round_tokens(first, count);
    for (int64_t stage = 0; stage < shape.stages; ++stage) {
      extend_block(unit, pairs, stage, first, count, beams);
    }
    write_best(unit, beams, first, count, output);
  };
  const auto run = [&](int64_t job) {
    const int64_t thread = job / (each + 1), own = job % (each + 1);
    if (!cut) {
      encode(job, 0, 1);
    } else if (own < each) {
      encode(thread * each + own, 0, 1);
    } else {
      encode(threads * each + thread / parts, thread % parts, parts);
    }
  };
  const int64_t jobs = cut ? threads * (each + 1) : shape.units();
  if (threads == 1) {
    for (int64_t job = 0; job < jobs; ++job) {
      run(job);
    }
  } else {
    share_out(jobs, run);
  }
}

// Many tokens: a unit after the other and a stage after the other, so that only one table of pairs
// exists at a time.
void encode_many(
    const EncodeShape& shape, const Tensor& x, const Tensor& codebooks, uint8_t* output) {
  const int64_t blocks = (shape.tokens + kTokensAtOnce - 1) / kTokensAtOnce;
  for (int64_t index = 0; index < shape.units(); ++index) {
    const EncodeUnit unit(shape, x, codebooks, index);
    StagePairs pairs(unit);
    const Beams beams(shape, shape.tokens);
    for (int64_t stage = 0; stage < shape.stages; ++stage) {
      pairs.fill(stage);
      share_out(blocks, [&](int64_t block) {
        const int64_t first = block * kTokensAtOnce;
        const int64_t count = std::min(kTokensAtOnce, shape.tokens - first);
        if (stage == 0) {
          unit.round_tokens(first, count);
        }
        extend_block(unit, pairs, stage, first, count, beams);
      });
    }
    write_best(unit, beams, 0, shape.tokens, output);
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
  if (are_few(shape)) {
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
