// Attention of a few queries over the tokens whose keys and values are additive codes. No decoded
// key outlives kTurn tokens and no value is ever decoded: softmax weights are collected in bins,
// one for each codeword. Tokens are split into chunks that threads share; every chunk gives a
// softmax of its own, and the chunks are merged in their order.
#include "cpu/additive_attend.h"
#include "common/buffer.h"
#include "cpu/additive_attend_plan.h"
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

const AttendKernels& attend_kernels() {
  return level_kernels();
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostRows = 16;    // query rows that are binned together
constexpr int64_t kScores = 1 << 13; // of a part's tokens and rows, so that they stay in L2
constexpr int64_t kJobs = 16;        // that tokens are split into, if there are enough
constexpr int64_t kLeastChunk = 4096;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Codes {
  const uint8_t* data;
  int64_t batch_stride, head_stride, token_stride;

  const uint8_t* at(int64_t row, int64_t head, int64_t token) const {
    return data + row * batch_stride + head * head_stride + token * token_stride;
  }
};

struct Values {
  int64_t subs, stages, sub_dim;
  const int8_t* words;
  const float* scales;
};

// What a job works in.
struct Room {
  Buffer<float> scaled, units, scores, angles;
  Buffer<int16_t> turned, keys;

  Room(int64_t rows, int64_t width, int64_t part)
      : scaled(rows * width),
        units(rows),
        scores(rows * part),
        angles(width),
        turned(rows * width),
        keys(kTurn * width) {
    std::fill(turned.data(), turned.data() + rows * width, int16_t{0});
  }
};

struct Attend {
  const AttendKernels& kernels;
  int64_t heads, queries, dim, blocks, turn_rows;
  const float* query; // [batch, heads, queries, dim]
  const float* turns; // [turn_rows, blocks, 2, pairs]: cosines, sines at a block's start
  float softcap;
  Codes key_codes, value_codes;
  const KeyPlan& plan;
  Values values;
  // Rows are padded to whole tiles; `tile` rows share their bins.
  int64_t padded, tile, part, padded_dim;

  // scores [tiles, some, tile] of the tokens [at, at + count), `some` >= count.
  void score(
      int64_t row, int64_t head, int64_t at, int64_t count, int64_t some, const Room& room) const {
    const int64_t end = at + count, width = plan.width, half = width / 2;
    const KeyHead keys = plan.of(head);
    const float* turning = turns + (turn_rows == 1 ? 0 : row) * blocks * 2 * plan.pairs;
    for (int64_t token = at; token < end;) {
      const int64_t block = token / kTurn, offset = token % kTurn;
      const int64_t few = std::min(end, (block + 1) * kTurn) - token;
      const float* angles = plan.angles_of(turning + block * 2 * plan.pairs, room.angles.data());
      kernels.turn(room.scaled.data(), queries, width, angles, angles + half, room.turned.data());
      kernels.score(
          key_codes.at(row, head, token),
          key_codes.token_stride,
          few,
          keys,
          plan.steps.data() + offset * width,
          room.turned.data(),
          (queries + kQuad - 1) / kQuad * kQuad,
          room.units.data(),
          room.keys.data(),
          {room.scores.data() + (token - at) * tile, some, tile});
      token += few;
    }
  }

  // Tokens [begin, end) of one row and head: sums [queries, dim], peaks and totals [queries].
  void run(
      int64_t row,
      int64_t head,
      int64_t begin,
      int64_t end,
      float* sums,
      float* peaks,
      float* totals) const {
    const int64_t tiles = padded / tile;
    const int64_t stages = values.subs * values.stages, bin_count = stages * 256 * tile;
    const Room room(padded, plan.width, part);
    Buffer<float> bins(tiles * bin_count), own_peaks(padded), own_totals(padded), old(padded);
    Buffer<float> own_sums(padded * padded_dim);
    std::fill(bins.data(), bins.data() + tiles * bin_count, 0.0f);
    std::fill(own_peaks.data(), own_peaks.data() + padded, kNothing);
    std::fill(own_totals.data(), own_totals.data() + padded, 0.0f);
    plan.scale(
        query + (row * heads + head) * queries * dim,
        queries,
        padded,
        room.scaled.data(),
        room.units.data());
    for (int64_t at = begin; at < end; at += part) {
      const int64_t count = std::min(end - at, part);
      const int64_t some = (count + 3) / 4 * 4; // times `tile`: whole vectors
      score(row, head, at, count, some, room);
      for (int64_t t = 0; t < tiles; ++t) {
        float* own = room.scores.data() + t * some * tile;
        float *peak = own_peaks.data() + t * tile, *total = own_totals.data() + t * tile;
        if (softcap > 0.0f) {
          std::fill(own + count * tile, own + some * tile, 0.0f);
          kernels.cap(own, some * tile, softcap);
        }
        std::fill(own + count * tile, own + some * tile, kNothing);
        std::copy(peak, peak + tile, old.data());
        kernels.raise(own, some, tile, peak);
        lower(old.data(), peak, total, bins.data() + t * bin_count, stages * 256);
        kernels.soften(own, some, tile, peak, total);
        kernels.collect(
            value_codes.at(row, head, at),
            value_codes.token_stride,
            count,
            stages,
            own,
            tile,
            bins.data() + t * bin_count);
      }
    }
    std::fill(own_sums.data(), own_sums.data() + padded * padded_dim, 0.0f);
    const int64_t book = 256 * values.sub_dim;
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t stage = 0; stage < stages; ++stage) {
        kernels.spread(
            bins.data() + t * bin_count + stage * 256 * tile,
            values.words + (head * stages + stage) * book,
            values.sub_dim,
            values.scales[head * stages + stage],
            tile,
            padded_dim,
            own_sums.data() + t * tile * padded_dim + stage / values.stages * values.sub_dim);
      }
    }
    for (int64_t r = 0; r < queries; ++r) {
      std::copy_n(own_sums.data() + r * padded_dim, dim, sums + r * dim);
      peaks[r] = own_peaks[r];
      totals[r] = own_totals[r];
    }
  }

  // What was collected below an old peak, as seen from the new one.
  void lower(const float* old, const float* peak, float* total, float* bins, int64_t count) const {
    if (std::equal(old, old + tile, peak)) {
      return;
    }
    float factors[kMostRows];
    for (int64_t r = 0; r < tile; ++r) {
      factors[r] = old[r] == peak[r] ? 1.0f : std::exp(old[r] - peak[r]);
      total[r] *= factors[r];
    }
    kernels.lower(bins, count, tile, factors);
  }
};

Codes codes_of(const Tensor& codes, int64_t batch, int64_t heads, int64_t bytes, int64_t stop) {
  STD_TORCH_CHECK(
      codes.scalar_type() == ScalarType::Byte && codes.dim() == 4 && codes.size(0) == batch &&
          codes.size(1) == heads && codes.size(2) >= stop && codes.size(3) == bytes &&
          codes.strides()[3] == 1,
      "additive_attend: codes must be uint8 [batch, heads, at least stop, subs * stages]");
  return {
      codes.const_data_ptr<uint8_t>(), codes.strides()[0], codes.strides()[1], codes.strides()[2]};
}

void check_books(const Tensor& books, int64_t heads, int64_t dim) {
  STD_TORCH_CHECK(
      books.scalar_type() == ScalarType::Char && books.dim() == 5 && books.size(0) == heads &&
          books.size(3) == 256 && books.size(1) * books.size(4) == dim && books.is_contiguous() &&
          books.size(2) >= 1,
      "additive_attend: books must be contiguous int8 [heads, subs, stages, 256, sub_dim]");
}

// Merges the chunks' softmaxes of one unit, in order.
void merge(
    int64_t chunks,
    int64_t queries,
    int64_t dim,
    const float* sums,
    const float* peaks,
    const float* totals,
    float* out,
    float* out_peak,
    float* out_total) {
  for (int64_t r = 0; r < queries; ++r, out += dim) {
    float peak = kNothing, total = 0.0f;
    std::fill(out, out + dim, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      peak = std::max(peak, peaks[chunk * queries + r]);
    }
    for (int64_t chunk = 0; chunk < chunks && peak > kNothing; ++chunk) {
      const int64_t at = chunk * queries + r;
      if (peaks[at] == kNothing) {
        continue;
      }
      const float weight = std::exp(peaks[at] - peak);
      total += weight * totals[at];
      for (int64_t d = 0; d < dim; ++d) {
        out[d] += weight * sums[at * dim + d];
      }
    }
    out_peak[r] = peak;
    out_total[r] = total;
  }
}

std::tuple<Tensor, Tensor, Tensor> additive_attend(
    const Tensor& query,
    const Tensor& key_codes,
    const Tensor& key_books,
    const Tensor& key_gains,
    const Tensor& key_means,
    int64_t key_group,
    const Tensor& value_codes,
    const Tensor& value_books,
    const Tensor& value_scales,
    const Tensor& turns,
    const Tensor& steps,
    const Tensor& first,
    int64_t stop,
    double softcap) {
  STD_TORCH_CHECK(
      query.scalar_type() == ScalarType::Float && query.dim() == 4,
      "additive_attend: query must be float32 [batch, heads, queries, dim]");
  const int64_t batch = query.size(0), heads = query.size(1);
  const int64_t queries = query.size(2), dim = query.size(3);
  STD_TORCH_CHECK(
      turns.scalar_type() == ScalarType::Float && turns.dim() == 4 && turns.size(2) == 2 &&
          2 * turns.size(3) <= dim && (turns.size(0) == 1 || turns.size(0) == batch),
      "additive_attend: turns must be float32 [1 or batch, blocks, 2, pairs]");
  const int64_t pairs = turns.size(3);
  STD_TORCH_CHECK(
      stop >= 0 && turns.size(1) * kTurn >= stop,
      "additive_attend: turns must have a row for each block of 32 tokens before stop");
  STD_TORCH_CHECK(
      steps.scalar_type() == ScalarType::Float && steps.dim() == 3 && steps.size(0) == kTurn &&
          steps.size(1) == 2 && steps.size(2) == pairs,
      "additive_attend: steps must be float32 [32, 2, pairs]");
  STD_TORCH_CHECK(
      first.scalar_type() == ScalarType::Long && first.dim() == 1 && first.size(0) == batch,
      "additive_attend: first must be int64 [batch]");
  check_books(key_books, heads, dim);
  check_books(value_books, heads, dim);
  STD_TORCH_CHECK(
      key_books.size(4) % 2 == 0, "additive_attend: sub-vectors of keys have an even width");
  const int64_t key_stages = key_books.size(1) * key_books.size(2);
  const int64_t value_stages = value_books.size(1) * value_books.size(2);
  STD_TORCH_CHECK(
      key_gains.scalar_type() == ScalarType::Byte && key_gains.is_contiguous() &&
          key_gains.numel() == heads * key_stages,
      "additive_attend: key_gains must be contiguous uint8 [heads, subs, stages]");
  STD_TORCH_CHECK(
      key_means.scalar_type() == ScalarType::Short && key_means.is_contiguous() &&
          key_means.numel() == heads * dim,
      "additive_attend: key_means must be contiguous int16 [heads, dim]");
  STD_TORCH_CHECK(
      key_group == 1 || key_group == 2 || key_group == 4,
      "additive_attend: key_group must be 1, 2 or 4");
  STD_TORCH_CHECK(
      value_scales.scalar_type() == ScalarType::Float && value_scales.is_contiguous() &&
          value_scales.numel() == heads * value_stages,
      "additive_attend: value_scales must be contiguous float32 [heads, subs, stages]");
  const Tensor q = torch::stable::contiguous(query), t = torch::stable::contiguous(turns);
  const Tensor s = torch::stable::contiguous(steps), f = torch::stable::contiguous(first);
  const int64_t* starts = f.const_data_ptr<int64_t>();
  const AttendKernels& kernels = attend_kernels();
  const KeyPlan plan(
      heads,
      key_books.size(1),
      key_books.size(2),
      key_books.size(4),
      key_group,
      pairs,
      key_books.const_data_ptr<int8_t>(),
      key_gains.const_data_ptr<uint8_t>(),
      key_means.const_data_ptr<int16_t>(),
      s.const_data_ptr<float>());
  const int64_t fours = (queries + kQuad - 1) / kQuad * kQuad;
  const int64_t tile = fours <= 4 ? 4 : fours <= 8 ? 8 : kMostRows;
  const int64_t padded = (queries + tile - 1) / tile * tile;
  const Attend work = {
      kernels,
      heads,
      queries,
      dim,
      t.size(1),
      t.size(0),
      q.const_data_ptr<float>(),
      t.const_data_ptr<float>(),
      static_cast<float>(softcap),
      codes_of(key_codes, batch, heads, key_stages, stop),
      codes_of(value_codes, batch, heads, value_stages, stop),
      plan,
      {value_books.size(1),
       value_books.size(2),
       value_books.size(4),
       value_books.const_data_ptr<int8_t>(),
       value_scales.const_data_ptr<float>()},
      padded,
      tile,
      std::max(kScores / std::max<int64_t>(padded, 4), int64_t{4} * kTurn),
      (dim + kSums - 1) / kSums * kSums};
  Tensor sums = torch::stable::new_empty(query, {batch, heads, queries, dim});
  Tensor peaks = torch::stable::new_empty(query, {batch, heads, queries});
  Tensor totals = torch::stable::new_empty(query, {batch, heads, queries});
  const int64_t units = batch * heads, size = queries * dim;
  if (units * queries == 0) {
    return {sums, peaks, totals};
  }
  // As many chunks whatever the threads are, so that they do not change the result.
  const int64_t wanted = (kJobs + units - 1) / units;
  const int64_t least = std::max((stop + wanted - 1) / wanted, kLeastChunk);
  const int64_t length = (least + work.part - 1) / work.part * work.part;
  const int64_t chunks = (stop + length - 1) / length;
  Buffer<float> part_sums(units * chunks * size);
  Buffer<float> part_peaks(units * chunks * queries), part_totals(units * chunks * queries);
  torch::stable::parallel_for(0, units * chunks, 1, [&](int64_t from, int64_t to) {
    for (int64_t job = from; job < to; ++job) {
      const int64_t unit = job / chunks, chunk = job % chunks, row = unit / heads;
      const int64_t begin = std::max(chunk * length, std::max<int64_t>(starts[row], 0));
      const int64_t end = std::min(stop, (chunk + 1) * length);
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
    merge(
        chunks,
        queries,
        dim,
        part_sums.data() + unit * chunks * size,
        part_peaks.data() + unit * chunks * queries,
        part_totals.data() + unit * chunks * queries,
        sums.mutable_data_ptr<float>() + unit * size,
        peaks.mutable_data_ptr<float>() + unit * queries,
        totals.mutable_data_ptr<float>() + unit * queries);
  }
  return {sums, peaks, totals};
}

} // namespace
} // namespace commvq

STABLE_TORCH_LIBRARY_IMPL(commvq, CPU, m) {
  m.impl("additive_attend", TORCH_BOX(&commvq::additive_attend));
}
