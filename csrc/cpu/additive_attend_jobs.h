// What attention over additive codes works on, and how its work is split: into rows of queries and
// chunks of tokens that threads share. Every chunk gives a softmax of its own, and the chunks are
// merged in their order.
#pragma once

#include "common/buffer.h"
#include "common/share.h"
#include "cpu/additive_attend.h"
#include "cpu/additive_attend_plan.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

namespace commvq {

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

struct AttendInputs {
  const AttendKernels& kernels;
  int64_t batch, heads, queries, dim, blocks, turn_rows;
  const float* query; // [batch, heads, queries, dim]
  const float* turns; // [turn_rows, blocks, 2, pairs]: cosines, sines at a block's start
  const int64_t* first;
  int64_t stop;
  float softcap;
  Codes key_codes, value_codes;
  const KeyPlan& plan;
  Values values;

  const float* turns_of(int64_t row, int64_t block) const {
    return turns + ((turn_rows == 1 ? 0 : row) * blocks + block) * 2 * plan.pairs;
  }
};

// A softmax over some tokens of some rows of queries: weighted values [rows, dim], peaks and totals
// [rows].
struct Softmaxes {
  float *sums, *peaks, *totals;

  Softmaxes from(int64_t row, int64_t dim) const {
    return {sums + row * dim, peaks + row, totals + row};
  }
};

// Rows of queries [begin, begin + count) of one head, over tokens [from, to).
struct Job {
  int64_t row, head, begin, count, from, to;
};

// How work is cut, by its size alone, so that the threads do not change the result.
struct Cuts {
  int64_t rows;  // of queries in a job, at most
  int64_t jobs;  // for which chunks are cut smaller
  int64_t least; // tokens of a chunk
  int64_t whole; // chunks begin at multiples of it
};

// Merges `chunks` softmaxes of the same rows, `apart` rows from each other.
inline void merge_chunks(
    const Softmaxes& parts,
    int64_t chunks,
    int64_t apart,
    int64_t rows,
    int64_t dim,
    const Softmaxes& out) {
  for (int64_t r = 0; r < rows; ++r) {
    float peak = kNothing, total = 0.0f, *sums = out.sums + r * dim;
    std::fill(sums, sums + dim, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      peak = std::max(peak, parts.peaks[chunk * apart + r]);
    }
    for (int64_t chunk = 0; chunk < chunks && peak > kNothing; ++chunk) {
      const int64_t at = chunk * apart + r;
      if (parts.peaks[at] == kNothing) {
        continue;
      }
      const float weight = std::exp(parts.peaks[at] - peak);
      total += weight * parts.totals[at];
      for (int64_t d = 0; d < dim; ++d) {
        sums[d] += weight * parts.sums[at * dim + d];
      }
    }
    out.peaks[r] = peak;
    out.totals[r] = total;
  }
}

// What happens to a row and head ([batch, heads] as one number) when its softmaxes are ready, on
// the thread that finished the last of them.
using Done = std::function<void(int64_t unit)>;

// Runs `run(job, softmaxes)` for all of the work and merges what comes out.
template <class Run>
void attend_in_jobs(
    const AttendInputs& in,
    const Cuts& cuts,
    const Softmaxes& out,
    const Run& run,
    const Done& done) {
  const int64_t units = in.batch * in.heads, queries = in.queries;
  if (units * queries == 0) {
    return;
  }
  const int64_t pieces = (queries + cuts.rows - 1) / cuts.rows;
  const int64_t rows = (queries + pieces - 1) / pieces, jobs = units * pieces;
  const int64_t wanted = (cuts.jobs + jobs - 1) / jobs;
  const int64_t least = std::max((in.stop + wanted - 1) / wanted, cuts.least);
  const int64_t length = (least + cuts.whole - 1) / cuts.whole * cuts.whole;
  const int64_t chunks = std::max<int64_t>((in.stop + length - 1) / length, 1);
  // A single chunk is written where it belongs.
  const int64_t kept = chunks == 1 ? 0 : units * chunks * queries;
  const Buffer<float> sums(kept * in.dim), peaks(kept), totals(kept);
  const Softmaxes parts = chunks == 1 ? out : Softmaxes{sums.data(), peaks.data(), totals.data()};
  std::vector<std::atomic<int64_t>> left(static_cast<size_t>(units)); // jobs of each
  for (auto& own : left) {
    own = pieces * chunks;
  }
  share_out(jobs * chunks, [&](int64_t at) {
    const int64_t chunk = at % chunks, piece = at / chunks % pieces;
    const int64_t unit = at / chunks / pieces, row = unit / in.heads;
    const int64_t begin = piece * rows, count = std::min(rows, queries - begin);
    const Job job = {
        row,
        unit % in.heads,
        begin,
        count,
        std::max(chunk * length, std::max<int64_t>(in.first[row], 0)),
        std::min(in.stop, (chunk + 1) * length)};
    const Softmaxes own = parts.from((unit * chunks + chunk) * queries + begin, in.dim);
    if (job.from < job.to) {
      run(job, own);
    } else {
      std::fill(own.sums, own.sums + count * in.dim, 0.0f);
      std::fill(own.peaks, own.peaks + count, kNothing);
      std::fill(own.totals, own.totals + count, 0.0f);
    }
    if (--left[static_cast<size_t>(unit)] > 0) {
      return;
    }
    if (chunks > 1) {
      merge_chunks(
          parts.from(unit * chunks * queries, in.dim),
          chunks,
          queries,
          queries,
          in.dim,
          out.from(unit * queries, in.dim));
    }
    done(unit);
  });
}

void attend_few(const AttendInputs& in, const Softmaxes& out, const Done& done);
void attend_many(const AttendInputs& in, const Softmaxes& out, const Done& done);

// Whichever of both is faster for as many rows.
void attend_tokens(const AttendInputs& in, const Softmaxes& out, const Done& done);

} // namespace commvq
