// Attention of a few queries over the tokens whose keys and values are additive codes, without ever
// holding more than a block of decoded ones. Tokens are split into parts that threads share; every
// part gives a softmax of its own, and the parts are merged in their order.
#include "cpu/additive_attend.h"
#include "common/buffer.h"
#include "cpu/simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>

#define COMMVQ_KERNEL "cpu/additive_attend_kernel.h"
#include "cpu/each_level.h"

namespace commvq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPart = 2048; // tokens of a part, whatever the threads
constexpr int64_t kMostQueries = 256;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// One side's codes and codebooks, of all heads.
struct Side {
  const uint8_t* codes;
  int64_t batch_stride, head_stride, token_stride;
  Books books; // of head 0
  int64_t book_size, scale_count;

  Books of(int64_t head) const {
    Books own = books;
    own.words += head * book_size;
    own.scales += head * scale_count;
    return own;
  }
  const uint8_t* at(int64_t row, int64_t head, int64_t token) const {
    return codes + row * batch_stride + head * head_stride + token * token_stride;
  }
};

struct Attend {
  int64_t batch, heads, queries, dim, width, rotary, stop, blocks, turn_rows;
  const float* query;   // [batch, heads, queries, dim]
  const float* turns;   // [turn_rows, blocks, rotary]: cos, sin of each pair at a block's start
  const float* steps;   // [kBlock, 2 * rotary]: how token t of a block turns beyond its start
  const int64_t* first; // [batch]
  float softcap;
  Side keys, values;

  // The queries of a head, turned back by the start of a block: q . R(m + d) k = R(-m) q . R(d) k.
  void turn(const float* from, const float* turn, float* to) const {
    for (int64_t r = 0; r < queries; ++r, from += dim, to += width) {
      for (int64_t j = 0; j < rotary; j += 2) {
        const float re = from[j], im = from[j + 1], c = turn[j], s = turn[j + 1];
        to[j] = re * c + im * s;
        to[j + 1] = im * c - re * s;
      }
      std::copy(from + rotary, from + dim, to + rotary);
    }
  }

  // Tokens [begin, end) of one row and head: sums [queries, width], peaks and totals [queries].
  void run(
      int64_t row,
      int64_t head,
      int64_t begin,
      int64_t end,
      float* sums,
      float* peaks,
      float* totals) const {
    const AttendKernels& kernels = level_kernels();
    Buffer<float> turned(queries * width), tokens(kBlock * width), scores(queries * kPart);
    std::fill(turned.data(), turned.data() + queries * width, 0.0f);
    std::fill(tokens.data(), tokens.data() + kBlock * width, 0.0f);
    std::fill(sums, sums + queries * width, 0.0f);
    const Books key_books = keys.of(head), value_books = values.of(head);
    const float* own = query + (row * heads + head) * queries * dim;
    const float* turning = turns + (turn_rows == 1 ? 0 : row) * blocks * rotary;
    for (int64_t at = begin; at < end;) {
      const int64_t block = at / kBlock, offset = at % kBlock;
      const int64_t count = std::min(end, (block + 1) * kBlock) - at;
      turn(own, turning + block * rotary, turned.data());
      kernels.decode(
          keys.at(row, head, at), keys.token_stride, count, key_books, width, tokens.data());
      kernels.rotate(tokens.data(), count, width, rotary, steps + offset * 2 * rotary);
      kernels.score(
          tokens.data(), count, width, turned.data(), queries, scores.data() + (at - begin), kPart);
      at += count;
    }
    const int64_t count = end - begin;
    for (int64_t r = 0; r < queries; ++r) {
      float* own_scores = scores.data() + r * kPart;
      if (softcap > 0.0f) {
        kernels.cap(own_scores, count, softcap);
      }
      peaks[r] = *std::max_element(own_scores, own_scores + count);
      totals[r] = kernels.soften(own_scores, count, peaks[r]);
    }
    for (int64_t at = begin; at < end;) {
      const int64_t some = std::min(end - at, kBlock);
      kernels.decode(
          values.at(row, head, at), values.token_stride, some, value_books, width, tokens.data());
      kernels.add(tokens.data(), some, width, scores.data() + (at - begin), kPart, queries, sums);
      at += some;
    }
  }
};

Side side_of(
    const Tensor& codes,
    const Tensor& books,
    const Tensor& scales,
    int64_t batch,
    int64_t heads,
    int64_t dim,
    int64_t stop) {
  STD_TORCH_CHECK(
      codes.scalar_type() == ScalarType::Byte && codes.dim() == 4 && codes.size(0) == batch &&
          codes.size(1) == heads && codes.size(2) >= stop,
      "additive_attend: codes must be uint8 [batch, heads, at least stop, bytes]");
  STD_TORCH_CHECK(
      books.scalar_type() == ScalarType::Char && books.dim() == 5 && books.size(0) == heads &&
          books.size(3) == 256 && books.size(1) * books.size(4) == dim && books.is_contiguous(),
      "additive_attend: books must be contiguous int8 [heads, subs, stages, 256, sub_dim]");
  STD_TORCH_CHECK(
      scales.scalar_type() == ScalarType::Float && scales.is_contiguous() &&
          scales.numel() == heads * books.size(1) * books.size(2),
      "additive_attend: scales must be contiguous float32 [heads, subs, stages]");
  STD_TORCH_CHECK(
      codes.size(3) == books.size(1) * books.size(2) && codes.strides()[3] == 1,
      "additive_attend: a token has one byte for each sub-vector and stage");
  const int64_t count = books.size(1) * books.size(2);
  return {
      codes.const_data_ptr<uint8_t>(),
      codes.strides()[0],
      codes.strides()[1],
      codes.strides()[2],
      {books.size(1),
       books.size(2),
       256,
       books.size(4),
       books.const_data_ptr<int8_t>(),
       scales.const_data_ptr<float>()},
      count * 256 * books.size(4),
      count};
}

std::tuple<Tensor, Tensor, Tensor> additive_attend(
    const Tensor& query,
    const Tensor& key_codes,
    const Tensor& key_books,
    const Tensor& key_scales,
    const Tensor& value_codes,
    const Tensor& value_books,
    const Tensor& value_scales,
    const Tensor& turns,
    const Tensor& steps,
    const Tensor& first,
    int64_t stop,
    double softcap) {
  STD_TORCH_CHECK(
      query.scalar_type() == ScalarType::Float && query.dim() == 4 && query.size(2) >= 1 &&
          query.size(2) <= kMostQueries,
      "additive_attend: query must be float32 [batch, heads, 1 to 256 queries, head_dim]");
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
  const int64_t dim = query.size(3);
  STD_TORCH_CHECK(
      turns.scalar_type() == ScalarType::Float && turns.dim() == 3 && turns.size(2) <= dim &&
          turns.size(2) % 2 == 0 && (turns.size(0) == 1 || turns.size(0) == batch) && stop >= 0 &&
          turns.size(1) * kBlock >= stop,
      "additive_attend: turns must be float32 [1 or batch, a block of 64 tokens, rotary_dim]");
  const int64_t rotary = turns.size(2);
  STD_TORCH_CHECK(
      steps.scalar_type() == ScalarType::Float && steps.dim() == 2 && steps.size(0) == kBlock &&
          steps.size(1) == 2 * rotary,
      "additive_attend: steps must be float32 [64, 2 * rotary_dim]");
  STD_TORCH_CHECK(
      first.scalar_type() == ScalarType::Long && first.dim() == 1 && first.size(0) == batch,
      "additive_attend: first must be int64 [batch]");
  const Tensor q = torch::stable::contiguous(query), t = torch::stable::contiguous(turns);
  const Tensor s = torch::stable::contiguous(steps), f = torch::stable::contiguous(first);
  const int64_t width = (dim + kStep - 1) / kStep * kStep;
  const Attend work = {
      batch,
      heads,
      queries,
      dim,
      width,
      rotary,
      stop,
      t.size(1),
      t.size(0),
      q.const_data_ptr<float>(),
      t.const_data_ptr<float>(),
      s.const_data_ptr<float>(),
      f.const_data_ptr<int64_t>(),
      static_cast<float>(softcap),
      side_of(key_codes, key_books, key_scales, batch, heads, dim, stop),
      side_of(value_codes, value_books, value_scales, batch, heads, dim, stop)};
  Tensor sums = torch::stable::new_empty(query, {batch, heads, queries, dim});
  Tensor peaks = torch::stable::new_empty(query, {batch, heads, queries});
  Tensor totals = torch::stable::new_empty(query, {batch, heads, queries});
  const int64_t parts = (stop + kPart - 1) / kPart, units = batch * heads;
  const int64_t size = queries * width;
  Buffer<float> part_sums(units * parts * size);
  Buffer<float> part_peaks(units * parts * queries), part_totals(units * parts * queries);
  torch::stable::parallel_for(0, units * parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t job = from; job < to; ++job) {
      const int64_t unit = job / parts, part = job % parts, row = unit / heads;
      const int64_t begin = std::max(part * kPart, std::max<int64_t>(work.first[row], 0));
      const int64_t end = std::min(stop, (part + 1) * kPart);
      float* own_peaks = part_peaks.data() + job * queries;
      if (begin >= end) {
        std::fill(own_peaks, own_peaks + queries, kNothing);
        continue;
      }
      work.run(
          row,
          unit % heads,
          begin,
          end,
          part_sums.data() + job * size,
          own_peaks,
          part_totals.data() + job * queries);
    }
  });
  for (int64_t unit = 0; unit < units; ++unit) {
    for (int64_t r = 0; r < queries; ++r) {
      float* out = sums.mutable_data_ptr<float>() + (unit * queries + r) * dim;
      float peak = kNothing, total = 0.0f;
      std::fill(out, out + dim, 0.0f);
      for (int64_t part = 0; part < parts; ++part) {
        peak = std::max(peak, part_peaks[(unit * parts + part) * queries + r]);
      }
      for (int64_t part = 0; part < parts && peak > kNothing; ++part) {
        const int64_t job = unit * parts + part;
        if (part_peaks[job * queries + r] == kNothing) {
          continue;
        }
        const float weight = std::exp(part_peaks[job * queries + r] - peak);
        total += weight * part_totals[job * queries + r];
        const float* from = part_sums.data() + job * size + r * width;
        for (int64_t d = 0; d < dim; ++d) {
          out[d] += weight * from[d];
        }
      }
      peaks.mutable_data_ptr<float>()[unit * queries + r] = peak;
      totals.mutable_data_ptr<float>()[unit * queries + r] = total;
    }
  }
  return {sums, peaks, totals};
}

} // namespace
} // namespace commvq

STABLE_TORCH_LIBRARY_IMPL(commvq, CPU, m) {
  m.impl("additive_attend", TORCH_BOX(&commvq::additive_attend));
}
