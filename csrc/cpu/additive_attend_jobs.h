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

// Rows of queries [begin, begin + count) of one head, over tokens [from, to): number `at` of all
// jobs.
struct Job {
  int64_t at, row, head, begin, count, from, to;
};

// How work is cut, by its size alone, so that the threads do not change the result.
struct Cuts {
  int64_t rows;  // of queries in a job, at most
  int64_t jobs;  // for which chunks are cut smaller
  int64_t least; // tokens of a chunk
  int64_t whole; // chunks begin at multiples of it
};

// Every row and head (a unit: [batch, heads] as one number) in `pieces` of up to `rows` rows of
// queries, and in chunks of `length` tokens.
struct Split {
  int64_t units, pieces, rows, length, chunks;

  Split(const AttendInputs& in, const Cuts& cuts) : units(in.batch * in.heads) {
    pieces = std::max<int64_t>((in.queries + cuts.rows - 1) / cuts.rows, 1);
    rows = (in.queries + pieces - 1) / pieces;
    const int64_t wanted = (cuts.jobs + units * pieces - 1) / std::max<int64_t>(units * pieces, 1);
    const int64_t least = std::max((in.stop + wanted - 1) / wanted, cuts.least);
    length = rounded_up(least, cuts.whole);
    chunks = std::max<int64_t>((in.stop + length - 1) / length, 1);
  }

  int64_t jobs() const { return in_unit() * units; }
  int64_t in_unit() const { return pieces * chunks; }

  // Jobs of a unit are neighbours, and so are chunks of a piece.
  Job job(const AttendInputs& in, int64_t at) const {
    const int64_t unit = at / in_unit(), row = unit / in.heads, chunk = at % chunks;
    const int64_t begin = at / chunks % pieces * rows;
    return {
        at,
        row,
        unit % in.heads,
        begin,
        std::min(rows, in.queries - begin),
        std::max(chunk * length, std::max<int64_t>(in.first[row], 0)),
        std::min(in.stop, (chunk + 1) * length)};
  }
};

// Calls run(job) for all jobs, and finish(unit) behind the last of a unit's.
template <class Run, class Finish>
void run_jobs(const AttendInputs& in, const Split& split, const Run& run, const Finish& finish) {
  std::vector<std::atomic<int64_t>> left(static_cast<size_t>(split.units)); // jobs of each
  for (auto& own : left) {
    own = split.in_unit();
  }
  share_out(split.jobs(), [&](int64_t at) {
    run(split.job(in, at));
    const int64_t unit = at / split.in_unit();
    if (--left[static_cast<size_t>(unit)] == 0) {
      finish(unit);
    }
  });
}

// What happens to a unit when its softmaxes are ready, on the thread that finished the last of
// them.
using Done = std::function<void(int64_t unit)>;

void attend_few(const AttendInputs& in, const Softmaxes& out, const Done& done);
void attend_many(const AttendInputs& in, const Softmaxes& out, const Done& done);

// Whichever of both is faster for as many rows.
void attend_tokens(const AttendInputs& in, const Softmaxes& out, const Done& done);

} // namespace commvq
