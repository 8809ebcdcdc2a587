// Attention of a few rows of queries over additive codes. No decoded key outlives kTurn tokens and
// no value is ever decoded: softmax weights are collected in bins, one for each codeword.
#include "cpu/additive_attend_jobs.h"

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

struct FewRows : AttendInputs {
  // Rows are padded to whole tiles; `tile` rows share their bins.
  int64_t padded, tile, part, padded_dim;

  explicit FewRows(const AttendInputs& inputs)
      : AttendInputs(inputs), padded_dim((dim + kSums - 1) / kSums * kSums) {
    const int64_t fours = (queries + kQuad - 1) / kQuad * kQuad;
    tile = fours <= 4 ? 4 : fours <= 8 ? 8 : kMostRows;
    padded = (queries + tile - 1) / tile * tile;
    part = std::max(kScores / std::max<int64_t>(padded, 4) / kTurn, int64_t{4}) * kTurn;
  }

  // scores [tiles, some, tile] of the tokens [at, at + count), `some` >= count.
  void score(
      int64_t row, int64_t head, int64_t at, int64_t count, int64_t some, const Room& room) const {
    const int64_t end = at + count, width = plan.width, half = width / 2;
    const KeyHead keys = plan.of(head);
    for (int64_t token = at; token < end;) {
      const int64_t block = token / kTurn, offset = token % kTurn;
      const int64_t few = std::min(end, (block + 1) * kTurn) - token;
      const float* angles = plan.angles_of(turns_of(row, block), room.angles.data());
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

  // All rows of queries of the job's head.
  void run(const Job& job, const Softmaxes& out) const {
    const int64_t row = job.row, head = job.head, end = job.to;
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
    if (end - job.from >= kFetched) {
      const int64_t book = plan.subs * plan.stages * 256 * plan.sub_dim;
      fetch(plan.words + head * book, book);
    }
    for (int64_t at = job.from; at < end; at += part) {
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
      std::copy_n(own_sums.data() + r * padded_dim, dim, out.sums + r * dim);
      out.peaks[r] = own_peaks[r];
      out.totals[r] = own_totals[r];
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

} // namespace

void attend_few(const AttendInputs& in, const Softmaxes& out, const Done& done) {
  const FewRows work(in);
  const Cuts cuts = {std::max<int64_t>(in.queries, 1), kJobs, kLeastChunk, work.part};
  const auto run = [&](const Job& job, const Softmaxes& own) { work.run(job, own); };
  attend_in_jobs(in, cuts, out, run, done);
}

} // namespace commvq
