// Attention of a few rows of queries over additive codes. No decoded key outlives kTurn tokens and
// no value is ever decoded: softmax weights are collected in bins, one for each codeword.
#include "cpu/additive_attend_jobs.h"

#include <memory>

namespace commvq {
namespace {

constexpr int64_t kMostRows = 16;    // query rows that are binned together
constexpr int64_t kScores = 1 << 13; // of a part's tokens and rows, so that they stay in L2
constexpr int64_t kJobs = 16;        // that tokens are split into, if there are enough
constexpr int64_t kLeastChunk = 4096;
constexpr int64_t kFetched = 256; // tokens that look up codebooks about as often as they have lines

// Reads memory once, in its order, so that what is looked up in it afterwards is near. (Prefetching
// instructions bring a third of it: those that miss the page tables' cache are dropped.)
void fetch(const int8_t* from, int64_t bytes) {
  constexpr int64_t kLine = 64;
  for (int64_t at = 0; at < bytes; at += kLine) {
    static_cast<void>(*static_cast<const volatile int8_t*>(from + at));
  }
}

// What a job works in.
struct Room {
  Buffer<float> units, scores, angles;
  Buffer<int16_t> scaled, turned, keys;

  Room(int64_t rows, int64_t width, int64_t part)
      : units(rows),
        scores(rows * part),
        angles(width),
        scaled(rows * width),
        turned(rows * width),
        keys(kTurn * width) {
    std::fill(turned.data(), turned.data() + rows * width, int16_t{0});
  }
};

// Weights of some tokens in bins [tiles, stages, 256, tile], with peaks and totals [padded].
struct Binned {
  float *bins, *peaks, *totals;
};

struct FewRows : AttendInputs {
  // Rows are padded to whole tiles; `tile` rows share their bins.
  int64_t padded, tile, tiles, part, padded_dim, stages, tile_bins;

  explicit FewRows(const AttendInputs& inputs)
      : AttendInputs(inputs), padded_dim(rounded_up(dim, kSums)) {
    const int64_t fours = rounded_up(queries, kQuad);
    tile = fours <= 4 ? 4 : fours <= 8 ? 8 : kMostRows;
    padded = rounded_up(queries, tile);
    tiles = padded / tile;
    stages = values.subs * values.stages;
    tile_bins = stages * 256 * tile;
    part = std::max(kScores / std::max<int64_t>(padded, 4) / kTurn, int64_t{4}) * kTurn;
  }

  int64_t bins() const { return tiles * tile_bins; }

  // scores [tiles, some, tile] of the tokens [at, at + count), `some` >= count.
  void score(
      int64_t row, int64_t head, int64_t at, int64_t count, int64_t some, const Room& room) const {
    const int64_t end = at + count, width = plan.width, half = width / 2;
    const KeyHead keys = plan.of(head);
    const float share = plan.share();
    for (int64_t token = at; token < end;) {
      const int64_t block = token / kTurn, offset = token % kTurn;
      const int64_t few = std::min(end, (block + 1) * kTurn) - token;
      const float* angles = plan.angles_of(turns_of(row, block), room.angles.data());
      const int16_t* query = room.scaled.data();
      kernels.turn(query, queries, width, angles, angles + half, share, room.turned.data());
      kernels.score(
          key_codes.at(row, head, token),
          key_codes.token_stride,
          few,
          keys,
          plan.steps.data() + offset * width,
          room.turned.data(),
          rounded_up(queries, kQuad),
          room.units.data(),
          room.keys.data(),
          {room.scores.data() + (token - at) * tile, some, tile});
      token += few;
    }
  }

  // Weights of the job's tokens into `own`, whose bins are zeros.
  void collect(const Job& job, const Binned& own) const {
    const int64_t row = job.row, head = job.head, end = job.to;
    if (job.from >= end) {
      return;
    }
    const Room room(padded, plan.width, part);
    Buffer<float> old(tile);
    plan.scale(
        query + (row * heads + head) * queries * dim,
        queries,
        padded,
        room.scaled.data(),
        room.units.data());
    if (end - job.from >= kFetched) {
      const int64_t book = plan.subs * plan.stages * 256 * plan.sub_dim;
      fetch(plan.words + head * book, book);
    }
    for (int64_t at = job.from; at < end; at += part) {
      const int64_t count = std::min(end - at, part);
      const int64_t some = (count + 3) / 4 * 4; // times `tile`: whole vectors
      score(row, head, at, count, some, room);
      for (int64_t t = 0; t < tiles; ++t) {
        float* scores = room.scores.data() + t * some * tile;
        float *peak = own.peaks + t * tile, *total = own.totals + t * tile;
        float* bins = own.bins + t * tile_bins;
        if (softcap > 0.0f) {
          std::fill(scores + count * tile, scores + some * tile, 0.0f);
          kernels.cap(scores, some * tile, softcap);
        }
        std::fill(scores + count * tile, scores + some * tile, kNothing);
        std::copy(peak, peak + tile, old.data());
        kernels.raise(scores, some, tile, peak);
        lower(old.data(), peak, total, bins);
        kernels.soften(scores, some, tile, peak, total);
        kernels.collect(
            value_codes.at(row, head, at),
            value_codes.token_stride,
            count,
            stages,
            scores,
            tile,
            bins);
      }
    }
  }

  // What was collected below an old peak, as seen from the new one.
  void lower(const float* old, const float* peak, float* total, float* bins) const {
    if (std::equal(old, old + tile, peak)) {
      return;
    }
    float factors[kMostRows];
    for (int64_t r = 0; r < tile; ++r) {
      factors[r] = old[r] == peak[r] ? 1.0f : std::exp(old[r] - peak[r]);
      total[r] *= factors[r];
    }
    kernels.lower(bins, stages * 256, tile, factors);
  }

  // Adds the weights of later tokens.
  void add(const Binned& own, const Binned& later) const {
    for (int64_t t = 0; t < tiles; ++t) {
      float *peak = own.peaks + t * tile, *total = own.totals + t * tile;
      const float* other = later.peaks + t * tile;
      float old[kMostRows], factors[kMostRows];
      for (int64_t r = 0; r < tile; ++r) {
        old[r] = peak[r];
        peak[r] = std::max(peak[r], other[r]);
        factors[r] = other[r] == kNothing ? 0.0f : std::exp(other[r] - peak[r]);
      }
      lower(old, peak, total, own.bins + t * tile_bins);
      for (int64_t r = 0; r < tile; ++r) {
        total[r] += later.totals[t * tile + r] * factors[r];
      }
      kernels.add(
          own.bins + t * tile_bins, later.bins + t * tile_bins, stages * 256, tile, factors);
    }
  }

  // All weights of a head times its codebooks.
  void spread(int64_t head, const Binned& own, const Softmaxes& out) const {
    Buffer<float> sums(padded * padded_dim);
    std::fill(sums.data(), sums.data() + padded * padded_dim, 0.0f);
    const int64_t book = 256 * values.sub_dim;
    fetch(values.words + head * stages * book, stages * book);
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t stage = 0; stage < stages; ++stage) {
        kernels.spread(
            own.bins + t * tile_bins + stage * 256 * tile,
            values.words + (head * stages + stage) * book,
            values.sub_dim,
            values.scales[head * stages + stage],
            tile,
            padded_dim,
            sums.data() + t * tile * padded_dim + stage / values.stages * values.sub_dim);
      }
    }
    for (int64_t r = 0; r < queries; ++r) {
      std::copy_n(sums.data() + r * padded_dim, dim, out.sums + r * dim);
      out.peaks[r] = own.peaks[r];
      out.totals[r] = own.totals[r];
    }
  }
};

// Those of a job.
struct OwnBins {
  Buffer<float> bins, peaks, totals;
  Binned all;

  explicit OwnBins(const FewRows& work)
      : bins(work.bins()),
        peaks(work.padded),
        totals(work.padded),
        all{bins.data(), peaks.data(), totals.data()} {
    std::fill(all.bins, all.bins + work.bins(), 0.0f);
    std::fill(all.peaks, all.peaks + work.padded, kNothing);
    std::fill(all.totals, all.totals + work.padded, 0.0f);
  }
};

} // namespace

void attend_few(const AttendInputs& in, const Softmaxes& out, const Done& done) {
  if (in.queries == 0) {
    return;
  }
  const FewRows work(in);
  const Split split(in, {in.queries, kJobs, kLeastChunk, work.part});
  // Chunks keep their bins, so that codebooks are multiplied once a head.
  std::vector<std::unique_ptr<OwnBins>> kept(static_cast<size_t>(split.jobs()));
  const auto run = [&](const Job& job) {
    auto& own = kept[static_cast<size_t>(job.at)];
    own = std::make_unique<OwnBins>(work);
    work.collect(job, own->all);
  };
  run_jobs(in, split, run, [&](int64_t unit) {
    auto* own = kept.data() + unit * split.chunks;
    for (int64_t chunk = 1; chunk < split.chunks; ++chunk) {
      work.add(own[0]->all, own[chunk]->all);
    }
    work.spread(unit % in.heads, own[0]->all, out.from(unit * in.queries, in.dim));
    for (int64_t chunk = 0; chunk < split.chunks; ++chunk) {
      own[chunk].reset();
    }
    done(unit);
  });
}

} // namespace commvq
