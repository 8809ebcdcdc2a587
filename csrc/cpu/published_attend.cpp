// Attention of a few queries over the tokens whose keys and values are the published preset's
// codes. No decoded key outlives kTurn tokens and no value is ever decoded: a token's code belongs
// to all heads, so that softmax weights of all of their rows are collected in one bin for each byte
// of value codes, and a byte's bins added up to sums of 0/1 codes. Tokens are split into chunks
// that threads share; every chunk gives a softmax of its own, and the chunks are merged in their
// order.
#include "cpu/published_attend.h"
#include "common/attend_checks.h"
#include "common/buffer.h"
#include "common/share.h"
#include "cpu/attend_rows.h"
#include "cpu/published_codes.h"
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

#define COMMVQ_KERNEL "cpu/published_attend_kernel.h"
#include "cpu/each_level.h"

namespace commvq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kJobs = 16; // that tokens are split into, if there are enough
constexpr int64_t kLeastChunk = 1024;
constexpr int64_t kLongSpan = 4096, kShortSpan = 256; // tokens whose weights are held at once
constexpr int64_t kWeights = 1 << 20;                 // of a span, if it need not be shorter
constexpr int64_t kColumns = 8;                       // bytes of value codes transposed at once
constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Attend {
  const AttendKernels& kernels;
  const PublishedKernels& own;
  const RowPlan& plan;
  int64_t heads, queries, rounds, groups, blocks, turn_rows;
  const float* query;   // [batch, heads, queries, dim]
  const float* turns;   // [turn_rows, blocks, 2, pairs]: cosines, sines at a block's start
  const int16_t* words; // [heads, rounds, kBook, width]
  float softcap;
  PackedRows key_codes, value_codes;
  int64_t tiles, span;

  int64_t sums_size() const { return tiles * 2 * groups * kTileRows; }

  // What a job works in.
  struct Room {
    Buffer<float> units, angles, fours, weights, norms, bins, factors;
    Buffer<int16_t> scaled, turned, keys;
    Buffer<uint8_t> codes, bytes;

    explicit Room(const Attend& work)
        : units(work.fours()),
          angles(work.plan.width),
          fours(kTurn * kQuad),
          weights(work.tiles * work.span * kTileRows),
          norms(work.span),
          bins(kByteColumns * kTileRows),
          factors(kTileRows),
          scaled(work.fours() * work.plan.width),
          turned(work.fours() * work.plan.width),
          keys(kTurn * work.plan.width),
          codes(kTurn * work.code_stride()),
          bytes(kColumns * work.span) {
      std::fill(turned.data(), turned.data() + work.fours() * work.plan.width, int16_t{0});
      // Rows that only fill the last tile may have any scores.
      float* last = weights.data() + (work.tiles - 1) * work.span * kTileRows;
      std::fill(last, last + work.span * kTileRows, 0.0f);
    }
  };

  int64_t fours() const { return (queries + kQuad - 1) / kQuad * kQuad; }
  int64_t code_stride() const { return (2 * rounds + 7) / 8 * 8; }

  // Scores of one head's rows of the tokens [at, at + count) go to their places in the tiles.
  void score(int64_t row, int64_t head, int64_t at, int64_t count, const Room& room) const {
    const int64_t end = at + count, width = plan.width, dim = plan.subs * plan.sub_dim;
    const float* turning = turns + (turn_rows == 1 ? 0 : row) * blocks * 2 * plan.pairs;
    plan.scale(
        query + (row * heads + head) * queries * dim,
        queries,
        fours(),
        room.scaled.data(),
        room.units.data());
    for (int64_t token = at; token < end;) {
      const int64_t block = token / kTurn, offset = token % kTurn;
      const int64_t few = std::min(end, (block + 1) * kTurn) - token;
      const float* angles = plan.angles_of(turning + block * 2 * plan.pairs, room.angles.data());
      const int16_t* own_query = room.scaled.data();
      kernels.turn(
          own_query, queries, width, angles, angles + width / 2, plan.share(), room.turned.data());
      for (int64_t t = 0; t < few; ++t) {
        unpack_key(
            key_codes.at(row, token + t),
            key_codes.bytes,
            head * rounds * 2,
            rounds * 2,
            room.codes.data() + t * code_stride());
      }
      own.decode(
          room.codes.data(),
          code_stride(),
          few,
          rounds,
          words + head * rounds * kBook * width,
          plan.panel_count,
          plan.turning.data(),
          plan.steps.data() + offset * width,
          room.keys.data());
      for (int64_t r = 0; r < queries; r += kQuad) {
        kernels.multiply(
            room.keys.data(),
            few,
            width,
            room.turned.data() + r * width,
            room.units.data() + r,
            room.fours.data(),
            kQuad);
        place(head * queries + r, std::min(kQuad, queries - r), token - at, few, room);
      }
      token += few;
    }
  }

  // Up to four rows from `first` on, of `count` tokens, whose keys get their norms here.
  void place(int64_t first, int64_t rows, int64_t token, int64_t count, const Room& room) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t tile = (first + r) / kTileRows, lane = (first + r) % kTileRows;
      float* to = room.weights.data() + (tile * span + token) * kTileRows + lane;
      for (int64_t t = 0; t < count; ++t) {
        to[t * kTileRows] = room.fours[t * kQuad + r] * room.norms[token + t];
      }
    }
  }

  // Turns a tile's scores into weights; what was collected below an old peak is lowered.
  void soften(
      int64_t count, const Room& room, float* scores, float* peak, float* total, float* sums)
      const {
    if (softcap > 0.0f) {
      kernels.cap(scores, count * kTileRows, softcap);
    }
    float old[kTileRows];
    std::copy(peak, peak + kTileRows, old);
    kernels.raise(scores, count, kTileRows, peak);
    if (!std::equal(old, old + kTileRows, peak)) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        room.factors[r] = old[r] == peak[r] ? 1.0f : std::exp(old[r] - peak[r]);
        total[r] *= room.factors[r];
      }
      kernels.lower(sums, 2 * groups, kTileRows, room.factors.data());
    }
    kernels.soften(scores, count, kTileRows, peak, total);
    own.weigh(scores, count, room.norms.data());
  }

  // Adds the weights of the tokens [at, at + count) up by their value codes.
  void collect(int64_t row, int64_t at, int64_t count, const Room& room, float* sums) const {
    const int64_t bytes = value_codes.bytes - kNormBytes, width = (count + 7) / 8 * 8;
    for (int64_t first = 0; first < bytes; first += kColumns) {
      const int64_t some = std::min(bytes - first, kColumns);
      transpose_bytes(
          value_codes.at(row, at) + kNormBytes + first,
          value_codes.token_stride,
          some,
          count,
          width,
          room.bytes.data());
      for (int64_t byte = first; byte < first + some; ++byte) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          own.collect(
              room.bytes.data() + (byte - first) * width,
              count,
              room.weights.data() + tile * span * kTileRows,
              room.bins.data());
          const int64_t group = byte * kByteGroups;
          own.fold(
              room.bins.data(),
              std::min(groups - group, kByteGroups),
              sums + (tile * groups + group) * 2 * kTileRows);
        }
      }
    }
  }

  // Tokens [begin, end) of one row: sums [tiles, 2 * groups, kTileRows], peaks and totals
  // [tiles, kTileRows].
  void run(
      int64_t row, int64_t begin, int64_t end, float* sums, float* peaks, float* totals) const {
    const Room room(*this);
    std::fill(sums, sums + sums_size(), 0.0f);
    std::fill(totals, totals + tiles * kTileRows, 0.0f);
    for (int64_t at = begin; at < end; at += span) {
      const int64_t count = std::min(end - at, span);
      key_codes.norms(row, at, count, room.norms.data());
      for (int64_t head = 0; head < heads; ++head) {
        score(row, head, at, count, room);
      }
      value_codes.norms(row, at, count, room.norms.data());
      for (int64_t tile = 0; tile < tiles; ++tile) {
        soften(
            count,
            room,
            room.weights.data() + tile * span * kTileRows,
            peaks + tile * kTileRows,
            totals + tile * kTileRows,
            sums + tile * 2 * groups * kTileRows);
      }
      collect(row, at, count, room, sums);
    }
  }
};

// Merges the chunks' softmaxes of one tile, in order: `rows` rows of [columns]. A chunk's sums
// [columns, kTileRows], peaks and totals [kTileRows] are `tiles` of them from the next chunk's.
void merge(
    int64_t chunks,
    int64_t tiles,
    int64_t columns,
    int64_t rows,
    const float* sums,
    const float* peaks,
    const float* totals,
    float* out,
    float* out_peak,
    float* out_total) {
  float peak[kTileRows], total[kTileRows] = {}, factors[kTileRows];
  Buffer<float> sum(columns * kTileRows);
  std::fill(sum.data(), sum.data() + columns * kTileRows, 0.0f);
  std::fill(peak, peak + kTileRows, kNothing);
  for (int64_t at = 0; at < chunks * tiles * kTileRows; at += tiles * kTileRows) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      peak[r] = std::max(peak[r], peaks[at + r]);
    }
  }
  for (int64_t at = 0; at < chunks * tiles * kTileRows; at += tiles * kTileRows) {
    if (std::all_of(peaks + at, peaks + at + kTileRows, [](float x) { return x == kNothing; })) {
      continue; // nothing was written there
    }
    for (int64_t r = 0; r < kTileRows; ++r) {
      factors[r] = peaks[at + r] == kNothing ? 0.0f : std::exp(peaks[at + r] - peak[r]);
      total[r] += factors[r] * totals[at + r];
    }
    const float* from = sums + at * columns;
    for (int64_t i = 0; i < columns * kTileRows; i += kTileRows) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        sum[i + r] += factors[r] * from[i + r];
      }
    }
  }
  std::copy_n(peak, rows, out_peak);
  std::copy_n(total, rows, out_total);
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t r = 0; r < rows; ++r) {
      out[r * columns + column] = sum[column * kTileRows + r];
    }
  }
}

PackedRows rows_of(const Tensor& codes, int64_t batch, int64_t bits, int64_t stop) {
  const int64_t bytes = kNormBytes + (bits + 7) / 8;
  STD_TORCH_CHECK(
      codes.scalar_type() == ScalarType::Byte && codes.dim() == 4 && codes.size(0) == batch &&
          codes.size(1) == 1 && codes.size(2) >= stop && codes.size(3) == bytes &&
          codes.strides()[3] == 1,
      "published_attend: codes must be uint8 [batch, 1, at least stop, bytes of a token]");
  return {codes.const_data_ptr<uint8_t>(), codes.strides()[0], codes.strides()[2], bytes};
}

std::tuple<Tensor, Tensor, Tensor> published_attend(
    const Tensor& query,
    const Tensor& key_codes,
    const Tensor& key_words,
    const Tensor& value_codes,
    int64_t groups,
    const Tensor& turns,
    const Tensor& steps,
    const Tensor& first,
    int64_t stop,
    double softcap) {
  STD_TORCH_CHECK(
      query.scalar_type() == ScalarType::Float && query.dim() == 4 && query.size(3) % 2 == 0,
      "published_attend: query must be float32 [batch, heads, queries, an even dim]");
  const int64_t batch = query.size(0), heads = query.size(1);
  const int64_t queries = query.size(2), dim = query.size(3);
  check_turns("published_attend", turns, steps, first, batch, dim, stop, kTurn);
  const int64_t pairs = turns.size(3);
  STD_TORCH_CHECK(
      key_words.scalar_type() == ScalarType::Short && key_words.is_contiguous() &&
          key_words.dim() == 6 && key_words.size(0) == heads && key_words.size(1) >= 1 &&
          key_words.size(2) == kBook && key_words.size(3) * kPanel >= dim &&
          key_words.size(3) * kPanel < dim + kPanel && key_words.size(4) == 2 &&
          key_words.size(5) == kHalf,
      "published_attend: key_words must be contiguous int16 [heads, rounds, 64, panels, 2, 32]");
  STD_TORCH_CHECK(groups >= 1, "published_attend: groups must be at least 1");
  const int64_t rounds = key_words.size(1), columns = 2 * groups;
  const Tensor q = without_gaps(query), t = without_gaps(turns);
  const Tensor s = without_gaps(steps), f = without_gaps(first);
  const int64_t* starts = f.const_data_ptr<int64_t>();
  const RowPlan plan(1, dim, pairs, s.const_data_ptr<float>());
  const int64_t rows = heads * queries, tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t span = kWeights / std::max<int64_t>(tiles * kTileRows, 1) / kTurn * kTurn;
  const Attend work = {
      attend_kernels(),
      level_kernels(),
      plan,
      heads,
      queries,
      rounds,
      groups,
      t.size(1),
      t.size(0),
      q.const_data_ptr<float>(),
      t.const_data_ptr<float>(),
      key_words.const_data_ptr<int16_t>(),
      static_cast<float>(softcap),
      rows_of(key_codes, batch, heads * rounds * 2 * kKeyBits, stop),
      rows_of(value_codes, batch, groups * kGroupBits, stop),
      tiles,
      std::clamp(span, kShortSpan, kLongSpan)};
  Tensor sums = torch::stable::new_empty(query, {batch, heads, queries, columns});
  Tensor peaks = torch::stable::new_empty(query, {batch, heads, queries});
  Tensor totals = torch::stable::new_empty(query, {batch, heads, queries});
  if (batch * rows == 0) {
    return {sums, peaks, totals};
  }
  // As many chunks whatever the threads are, so that they do not change the result.
  const int64_t wanted = (kJobs + batch - 1) / batch;
  const int64_t least = std::max((stop + wanted - 1) / wanted, kLeastChunk);
  const int64_t length = (least + kTurn - 1) / kTurn * kTurn;
  const int64_t chunks = (stop + length - 1) / length, jobs = batch * chunks;
  Buffer<float> part_sums(jobs * work.sums_size());
  Buffer<float> part_peaks(jobs * tiles * kTileRows), part_totals(jobs * tiles * kTileRows);
  std::fill(part_peaks.data(), part_peaks.data() + jobs * tiles * kTileRows, kNothing);
  share_out(jobs, [&](int64_t job) {
    const int64_t row = job / chunks, chunk = job % chunks;
    const int64_t begin = std::max(chunk * length, std::max<int64_t>(starts[row], 0));
    const int64_t end = std::min(stop, (chunk + 1) * length);
    if (begin < end) {
      work.run(
          row,
          begin,
          end,
          part_sums.data() + job * work.sums_size(),
          part_peaks.data() + job * tiles * kTileRows,
          part_totals.data() + job * tiles * kTileRows);
    }
  });
  share_out(batch * tiles, [&](int64_t unit) {
    const int64_t tile = unit % tiles, before = unit / tiles * chunks * tiles + tile;
    const int64_t own_first = unit / tiles * rows + tile * kTileRows;
    merge(
        chunks,
        tiles,
        columns,
        std::min(kTileRows, rows - tile * kTileRows),
        part_sums.data() + before * columns * kTileRows,
        part_peaks.data() + before * kTileRows,
        part_totals.data() + before * kTileRows,
        sums.mutable_data_ptr<float>() + own_first * columns,
        peaks.mutable_data_ptr<float>() + own_first,
        totals.mutable_data_ptr<float>() + own_first);
  });
  return {sums, peaks, totals};
}

} // namespace
} // namespace commvq

STABLE_TORCH_LIBRARY_IMPL(commvq, CPU, m) {
  m.impl("published_attend", TORCH_BOX(&commvq::published_attend));
}
