// commvq::additive_encode on the CPU: beam search over sums of codewords.
//
// Every sum of one more codeword gets a score in 16 bits, and those that could be among the nearest
// by these, as far as they can be off, are looked at themselves. Where there are many vectors,
// scores are sums of rows of a table of 2 c . c' of all pairs of codewords; where there are few,
// inner products of residuals, both rounded to bytes. Both find the same sums, so a token's code
// does not depend on how many are encoded with it, nor on threads.
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
#include <cmath>
#include <cstdint>
#include <cstring>

#define COMMVQ_KERNEL "cpu/additive_encode_kernel.h"
#include "cpu/each_level.h"

namespace commvq {

const EncodeKernels& encode_kernels() {
  return level_kernels();
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTokensAtOnce = 32;      // their scores of one stage, 16 KB, stay near the core
constexpr int64_t kWorthAThread = 1 << 18; // multiply-adds that repay waking one
constexpr int64_t kWorthATable = 8;        // sums for each codeword that repay a stage's table

// The partial sums of some tokens of a unit, of one stage and of the next in turn: room for `beam`
// of them a token.
class Beams {
 public:
  Beams(const EncodeShape& shape, int64_t tokens)
      : code_stride((shape.stages + kCodesAtOnce - 1) / kCodesAtOnce * kCodesAtOnce),
        beam_(shape.beam),
        tokens_(tokens),
        kept_(tokens),
        sides_{Side(tokens * shape.beam, code_stride), Side(tokens * shape.beam, code_stride)} {}

  // The empty sum.
  void begin(int64_t token, float square) const {
    const Side& side = sides_[0];
    kept_[token] = 1;
    side.score[token * beam_] = square;
  }

  // What a stage reads, and where it writes its scores.
  Parents parents(int64_t stage, int64_t token) const {
    const Side& side = sides_[stage % 2];
    const int64_t first = token * beam_;
    return {
        kept_[token],
        side.score.data() + first,
        side.codes.data() + first * code_stride,
        code_stride};
  }
  float* new_score(int64_t stage, int64_t token) const {
    return sides_[(stage + 1) % 2].score.data() + token * beam_;
  }

  // How far from their sums nearly all tokens are: three times the root mean square of those that
  // are finite, but no more than the farthest.
  float far(int64_t stage) const {
    double sum = 0.0;
    float most = 0.0f;
    int64_t finite = 0;
    for (int64_t token = 0; token < tokens_; ++token) {
      const float own = parents(stage, token).score[kept_[token] - 1];
      if (std::isfinite(own)) {
        sum += own;
        most = std::max(most, own);
        ++finite;
      }
    }
    const auto usual = static_cast<float>(sum / static_cast<double>(std::max<int64_t>(finite, 1)));
    return std::sqrt(std::min(9.0f * usual, most));
  }

  const uint8_t* best(int64_t stage, int64_t token) const {
    return sides_[stage % 2].codes.data() + token * beam_ * code_stride;
  }

  // Notes the `count` new sums, of which the i-th is origin[i].
  void extend(
      int64_t stage, int64_t token, const int32_t* origin, int64_t count, int64_t shift) const {
    const Parents old = parents(stage, token);
    uint8_t* codes = sides_[(stage + 1) % 2].codes.data() + token * beam_ * code_stride;
    for (int64_t place = 0; place < count; ++place, codes += code_stride) {
      const int64_t parent = origin[place] >> shift;
      for (int64_t part = 0; part < stage; part += kCodesAtOnce) {
        std::memcpy(codes + part, old.codes + parent * code_stride + part, kCodesAtOnce);
      }
      codes[stage] = static_cast<uint8_t>(origin[place] - (parent << shift));
    }
    kept_[token] = count;
  }

  const int64_t code_stride;

 private:
  static constexpr int64_t kCodesAtOnce = 16;

  struct Side {
    Side(int64_t sums, int64_t code_stride) : score(sums), codes(sums * code_stride) {}

    Buffer<float> score;
    Buffer<uint8_t> codes;
  };

  const int64_t beam_, tokens_;
  Buffer<int64_t> kept_;
  Side sides_[2];
};

// Extends the partial sums of tokens [first, first + count) by a codeword of `stage`. Of the last
// one only the nearest is kept.
void extend_block(
    const EncodeUnit& unit,
    const Table& table,
    int64_t stage,
    int64_t first,
    int64_t count,
    const Beams& beams) {
  const EncodeShape& shape = unit.shape();
  const Codebooks books = unit.codebooks();
  const int64_t sums = shape.beam * books.width;
  const bool last = stage + 1 == shape.stages;
  const Buffer<int16_t> base(table.rows == nullptr ? 0 : count * books.width),
      scores(sums + books.width);
  const Buffer<int32_t> list(sums), quads(shape.beam * books.wide / 4), origin(shape.beam);
  const Buffer<float> nearness(sums), residuals(shape.beam * books.wide);
  const Workspace room = {
      scores.data(), list.data(), nearness.data(), residuals.data(), quads.data()};
  if (table.rows != nullptr) {
    unit.base_scores(stage, first, count, table.unit, base.data());
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = first + i;
    const int64_t kept = encode_kernels().extend(
        books,
        stage,
        unit.token(token),
        beams.parents(stage, token),
        table,
        base.data() + i * books.width,
        room,
        {beams.new_score(stage, token), origin.data(), last ? 1 : shape.beam});
    beams.extend(stage, token, origin.data(), kept, books.shift);
  }
}

void begin_block(const EncodeUnit& unit, int64_t first, int64_t count, const Beams& beams) {
  unit.round_tokens(first, count);
  for (int64_t token = first; token < first + count; ++token) {
    beams.begin(token, unit.square(token));
  }
}

// The best of the sums of tokens [first, first + count) goes to the output.
void write_best(
    const EncodeUnit& unit, const Beams& beams, int64_t first, int64_t count, uint8_t* output) {
  const int64_t stages = unit.shape().stages;
  for (int64_t token = first; token < first + count; ++token) {
    std::copy_n(beams.best(stages, token), stages, output + unit.output_offset(token));
  }
}

// Whether tables of all pairs of codewords would take longer than inner products of all residuals.
bool are_few(const EncodeShape& shape) {
  return shape.tokens * shape.beam < kWorthATable * shape.codewords;
}

// Few tokens: a unit a job. Units that are left when every thread has as many as the others are cut
// into parts of their tokens, if those go round.
void encode_few(
    const EncodeShape& shape, const Tensor& x, const Tensor& codebooks, uint8_t* output) {
  const int64_t work = shape.stages * shape.width() * shape.sub_dim * shape.tokens * shape.beam;
  const auto all = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t threads = work * shape.units() < kWorthAThread ? 1 : all;
  const int64_t each = shape.units() / threads, left = shape.units() % threads;
  const int64_t parts = left == 0 ? 1 : threads / left;
  const bool cut = each > 0 && left * parts == threads && shape.tokens >= parts;
  const auto encode = [&](int64_t index, int64_t part, int64_t of) {
    const EncodeUnit unit(shape, x, codebooks, index, false);
    const int64_t first = shape.tokens * part / of;
    const int64_t count = shape.tokens * (part + 1) / of - first;
    const Beams beams(shape, shape.tokens);
    begin_block(unit, first, count, beams);
    for (int64_t stage = 0; stage < shape.stages; ++stage) {
      extend_block(unit, {}, stage, first, count, beams);
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
    const EncodeUnit unit(shape, x, codebooks, index, true);
    StagePairs pairs(unit);
    const Beams beams(shape, shape.tokens);
    share_out(blocks, [&](int64_t block) {
      const int64_t first = block * kTokensAtOnce;
      begin_block(unit, first, std::min(kTokensAtOnce, shape.tokens - first), beams);
    });
    for (int64_t stage = 0; stage < shape.stages; ++stage) {
      pairs.fill(stage, beams.far(stage));
      share_out(blocks, [&](int64_t block) {
        const int64_t first = block * kTokensAtOnce;
        const int64_t count = std::min(kTokensAtOnce, shape.tokens - first);
        extend_block(unit, pairs.table(), stage, first, count, beams);
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
