// Attention of many rows of queries over additive codes, a prompt's: a block of tokens is decoded,
// keys and values both, multiplied with all rows of a job while it is in L2, and dropped. Products
// are of whole numbers, 16 bits each, summed in 32: a query is rounded to what fits, weights of a
// row and block add up to 65000, and values fit by their codebooks.
#include "cpu/additive_attend_jobs.h"

namespace commvq {
namespace {

constexpr Cuts kCuts = {1020, 32, 2048, kBlock};
constexpr float kMostValue = 32000.0f; // times what weights add up to, still within int32

// What a job works in; `rows` is padded to whole tiles.
struct ManyRoom {
  int64_t rows, width;
  Buffer<int16_t> query, weights, key_rows, value_rows, turn;
  Buffer<int32_t> keys, values, scores;
  Buffer<float> units, angles, factors, value_units, sums, peaks, totals;

  ManyRoom(int64_t count, const AttendInputs& in)
      : rows((count + kTile - 1) / kTile * kTile),
        width((in.dim + kSums - 1) / kSums * kSums),
        query(rows * in.dim),
        weights(kTile * kBlock),
        key_rows(kTurn * in.plan.width),
        value_rows(2 * width),
        turn(in.plan.width),
        keys(kBlock * in.dim / 2),
        values(kBlock * width / 2),
        scores(kTile * kBlock),
        units(rows),
        angles(in.plan.width),
        factors(in.values.subs * in.values.stages),
        value_units(in.values.subs),
        sums(rows * width),
        peaks(rows + kSums),
        totals(rows + kSums) {
    std::fill(keys.data(), keys.data() + kBlock * in.dim / 2, 0);
    std::fill(value_rows.data(), value_rows.data() + 2 * width, int16_t{0});
    std::fill(sums.data(), sums.data() + rows * width, 0.0f);
    std::fill(peaks.data(), peaks.data() + rows + kSums, kNothing);
    std::fill(totals.data(), totals.data() + rows + kSums, 0.0f);
  }
};

struct ManyRows {
  const AttendInputs& in;
  const ManyRoom& room;
  const Job& job;

  // Queries in whole numbers; those that fill the last tile are 0.
  void round_queries() const {
    const int64_t dim = in.dim, unit = job.row * in.heads + job.head;
    const float* from = in.query + (unit * in.queries + job.begin) * dim;
    std::fill(room.query.data(), room.query.data() + room.rows * dim, int16_t{0});
    std::fill(room.units.data(), room.units.data() + room.rows, 0.0f);
    for (int64_t r = 0; r < job.count; ++r, from += dim) {
      const double factor = in.plan.factor_of(from);
      room.units[r] = factor > 0.0 ? static_cast<float>(1.0 / factor) : 0.0f;
      for (int64_t d = 0; d < dim; ++d) {
        // Adding 1.5 * 2^52 rounds.
        const double whole = from[d] * factor + 6755399441055744.0 - 6755399441055744.0;
        room.query[r * dim + d] = static_cast<int16_t>(static_cast<int32_t>(whole));
      }
    }
  }

  // What stages of values are multiplied with, for their sums to fit, and what a unit is then
  // worth.
  void fit_values() const {
    const Values& values = in.values;
    for (int64_t sub = 0; sub < values.subs; ++sub) {
      const float* scales = values.scales + (job.head * values.subs + sub) * values.stages;
      float most = 0.0f;
      for (int64_t stage = 0; stage < values.stages; ++stage) {
        most += 128.0f * std::fabs(scales[stage]);
      }
      room.value_units[sub] = most / kMostValue;
      for (int64_t stage = 0; stage < values.stages; ++stage) {
        room.factors[sub * values.stages + stage] =
            most > 0.0f ? scales[stage] / room.value_units[sub] : 0.0f;
      }
    }
  }

  // Rotated keys of tokens [at, at + count) as pairs of dims [sixteens, dim / 2, 16].
  void decode_keys(int64_t at, int64_t count) const {
    const KeyPlan& plan = in.plan;
    const KeyHead head = plan.of(job.head);
    const int64_t half = in.dim / 2, end = at + count;
    for (int64_t token = at; token < end;) {
      const int64_t block = token / kTurn, offset = token % kTurn;
      const int64_t few = std::min(end, (block + 1) * kTurn) - token;
      const float* angles = plan.angles_of(in.turns_of(job.row, block), room.angles.data());
      for (int64_t i = 0; i < plan.width; ++i) {
        room.turn[i] = RowPlan::fixed(angles[i]);
      }
      in.kernels.decode_keys(
          in.key_codes.at(job.row, job.head, token),
          in.key_codes.token_stride,
          few,
          head,
          plan.steps.data() + offset * plan.width,
          room.turn.data(),
          room.key_rows.data());
      for (int64_t t = 0; t < few; ++t) {
        const int16_t* row = room.key_rows.data() + t * plan.width;
        const int64_t place = token - at + t;
        int32_t* to = room.keys.data() + place / kSums * half * kSums + place % kSums;
        for (int64_t pair = 0; pair < half; ++pair) {
          to[pair * kSums] = both(row[plan.places[2 * pair]], row[plan.places[2 * pair + 1]]);
        }
      }
      token += few;
    }
  }

  // Values of tokens [at, at + count) as pairs of tokens [count / 2, width].
  void decode_values(int64_t at, int64_t count) const {
    const Values& values = in.values;
    const ValueHead head = {
        values.subs,
        values.stages,
        values.sub_dim,
        values.words + job.head * values.subs * values.stages * 256 * values.sub_dim,
        room.factors.data()};
    int16_t *one = room.value_rows.data(), *two = one + room.width;
    for (int64_t t = 0; t < count; t += 2) {
      if (t + 1 == count) {
        std::fill(two, two + room.width, int16_t{0});
      }
      in.kernels.decode_values(
          in.value_codes.at(job.row, job.head, at + t),
          in.value_codes.token_stride,
          std::min<int64_t>(count - t, 2),
          head,
          room.width,
          one);
      int32_t* to = room.values.data() + t / 2 * room.width;
      for (int64_t d = 0; d < room.width; ++d) {
        to[d] = both(one[d], two[d]);
      }
    }
  }

  void run(const Softmaxes& out) const {
    round_queries();
    fit_values();
    for (int64_t at = job.from; at < job.to; at += kBlock) {
      const int64_t count = std::min(job.to - at, kBlock);
      decode_keys(at, count);
      decode_values(at, count);
      for (int64_t r = 0; r < room.rows; r += kTile) {
        multiply(r, count);
      }
    }
    for (int64_t r = 0; r < job.count; ++r) {
      for (int64_t d = 0; d < in.dim; ++d) {
        const float unit = room.value_units[d / in.values.sub_dim];
        out.sums[r * in.dim + d] = unit * room.sums[r * room.width + d];
      }
      out.peaks[r] = room.peaks[r];
      out.totals[r] = room.totals[r];
    }
  }

  // Rows of one tile with the block that was decoded.
  void multiply(int64_t r, int64_t count) const {
    float keep[kSums], gain[kSums], peaks[kSums], totals[kSums];
    std::copy_n(room.peaks.data() + r, kSums, peaks);
    std::copy_n(room.totals.data() + r, kSums, totals);
    const Softmax softmax = {peaks, totals, keep, gain};
    const int64_t sixteens = (count + kSums - 1) / kSums;
    int32_t* scores = room.scores.data();
    in.kernels.products(room.query.data() + r * in.dim, in.dim, room.keys.data(), sixteens, scores);
    in.kernels.weigh(
        scores, count, room.units.data() + r, in.softcap, room.weights.data(), softmax);
    in.kernels.accumulate(
        room.weights.data(),
        room.values.data(),
        (count + 1) / 2,
        room.width,
        softmax,
        room.sums.data() + r * room.width);
    std::copy_n(peaks, kTile, room.peaks.data() + r);
    std::copy_n(totals, kTile, room.totals.data() + r);
  }

 private:
  static int32_t both(int16_t low, int16_t high) {
    return static_cast<int32_t>(
        static_cast<uint16_t>(low) | static_cast<uint32_t>(static_cast<uint16_t>(high)) << 16);
  }
};

} // namespace

void attend_many(const AttendInputs& in, const Softmaxes& out) {
  attend_in_jobs(in, kCuts, out, [&](const Job& job, const Softmaxes& own) {
    const ManyRoom room(job.count, in);
    ManyRows{in, room, job}.run(own);
  });
}

} // namespace commvq
