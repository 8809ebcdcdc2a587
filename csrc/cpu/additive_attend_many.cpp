// Attention of many rows of queries over additive codes, a prompt's: a block of tokens is decoded,
// keys and values both, multiplied with all rows of a job while it is in L2, and dropped. Products
// are of whole numbers, 16 bits each, summed in 32: a query is rounded to what fits, weights of a
// row and block add up to 65000, and values fit by their codebooks.
#include "cpu/additive_attend_jobs.h"

namespace commvq {
namespace {

constexpr Cuts kCuts = {1024, 32, 2048, kBlock};
constexpr float kMostValue = 32000.0f; // times what weights add up to, still within int32
constexpr float kLogarithmOfTwo = 0.693147181f;

// Two neighbours as one number.
int32_t both(int16_t low, int16_t high) {
  const auto above = static_cast<uint32_t>(static_cast<uint16_t>(high)) << 16;
  return static_cast<int32_t>(above | static_cast<uint16_t>(low));
}

// What a job works in. `order` are the places of a key's numbers in a row of panels, without gaps;
// `rows` is padded to whole tiles, `width` to whole kDims.
struct ManyRoom {
  int64_t rows, width;
  Buffer<int32_t> order, query, scores, weights;
  Buffer<int16_t> key_rows, turn, keys, value_rows, values;
  Buffer<float> units, angles, factors, value_units, sums, peaks, totals;

  ManyRoom(int64_t count, const AttendInputs& in)
      : rows(rounded_up(count, kTile)),
        width(rounded_up(in.dim, kDims)),
        order(in.dim),
        query(rows * in.dim / 2),
        scores(kBlock * kTile),
        weights(kBlock / 2 * kTile),
        key_rows(kTurn * in.plan.width),
        turn(in.plan.width),
        keys(kBlock * in.dim),
        value_rows(kTurn * width),
        values(width * kBlock),
        units(rows),
        angles(in.plan.width),
        factors(in.values.subs * in.values.stages),
        value_units(in.values.subs),
        sums(rows * width),
        peaks(rows),
        totals(rows) {
    std::copy_n(in.plan.places.data(), in.dim, order.data());
    std::sort(order.data(), order.data() + in.dim);
    std::fill(query.data(), query.data() + rows * in.dim / 2, 0);
    std::fill(keys.data(), keys.data() + kBlock * in.dim, int16_t{0});
    std::fill(values.data(), values.data() + width * kBlock, int16_t{0});
    std::fill(units.data(), units.data() + rows, 0.0f);
    std::fill(sums.data(), sums.data() + rows * width, 0.0f);
    std::fill(peaks.data(), peaks.data() + rows, kNothing);
    std::fill(totals.data(), totals.data() + rows, 0.0f);
  }
};

struct ManyRows {
  const AttendInputs& in;
  const ManyRoom& room;
  const Job& job;

  // Queries in whole numbers, as pairs of them [tiles, dim / 2, kTile] in the order of keys.
  void round_queries() const {
    const int64_t dim = in.dim, unit = job.row * in.heads + job.head;
    const float* from = in.query + (unit * in.queries + job.begin) * dim;
    Buffer<int16_t> panels(in.plan.width);
    for (int64_t r = 0; r < job.count; ++r, from += dim) {
      const double factor = in.plan.factor_of(from);
      room.units[r] = factor > 0.0 ? static_cast<float>(1.0 / factor) : 0.0f;
      for (int64_t d = 0; d < dim; ++d) {
        // Adding 1.5 * 2^52 rounds.
        const double whole = from[d] * factor + 6755399441055744.0 - 6755399441055744.0;
        panels[in.plan.places[d]] = static_cast<int16_t>(static_cast<int32_t>(whole));
      }
      int32_t* to = room.query.data() + r / kTile * kTile * dim / 2 + r % kTile;
      for (int64_t i = 0; i < dim; i += 2) {
        to[i / 2 * kTile] = both(panels[room.order[i]], panels[room.order[i + 1]]);
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

  // Rotated keys of tokens [at, at + count), without the gaps of panels.
  void decode_keys(int64_t at, int64_t count) const {
    const KeyPlan& plan = in.plan;
    const KeyHead head = plan.of(job.head);
    const bool gaps = plan.width > in.dim;
    const int64_t end = at + count;
    int16_t* to = room.keys.data();
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
          gaps ? room.key_rows.data() : to);
      for (int64_t t = 0; gaps && t < few; ++t) {
        for (int64_t i = 0; i < in.dim; ++i) {
          to[t * in.dim + i] = room.key_rows[t * plan.width + room.order[i]];
        }
      }
      to += few * in.dim;
      token += few;
    }
  }

  // Values of tokens [at, at + count), dim by dim: [width, kBlock].
  void decode_values(int64_t at, int64_t count) const {
    const Values& values = in.values;
    const ValueHead head = {
        values.subs,
        values.stages,
        values.sub_dim,
        values.words + job.head * values.subs * values.stages * 256 * values.sub_dim,
        room.factors.data()};
    for (int64_t from = 0; from < count; from += kTurn) {
      const int64_t few = std::min(count - from, kTurn);
      in.kernels.decode_values(
          in.value_codes.at(job.row, job.head, at + from),
          in.value_codes.token_stride,
          few,
          head,
          room.width,
          room.value_rows.data());
      for (int64_t d = 0; d < in.dim; ++d) {
        const int16_t* own = room.value_rows.data() + d;
        int16_t* to = room.values.data() + d * kBlock + from;
        for (int64_t t = 0; t < few; ++t) {
          to[t] = own[t * room.width];
        }
      }
    }
    // An odd token's neighbour weighs nothing, whatever it is.
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
      const float* sums = room.sums.data() + r / kTile * kTile * room.width + r % kTile;
      for (int64_t d = 0; d < in.dim; ++d) {
        out.sums[r * in.dim + d] = room.value_units[d / in.values.sub_dim] * sums[d * kTile];
      }
      out.peaks[r] = room.peaks[r] * kLogarithmOfTwo;
      out.totals[r] = room.totals[r];
    }
  }

  // The tile of rows from `r` on, with the block that was decoded.
  void multiply(int64_t r, int64_t count) const {
    float keep[kTile], gain[kTile];
    const Softmax softmax = {room.peaks.data() + r, room.totals.data() + r, keep, gain};
    int32_t *scores = room.scores.data(), *weights = room.weights.data();
    const int32_t* query = room.query.data() + r * in.dim / 2;
    in.kernels.products(room.keys.data(), count, in.dim, query, scores);
    in.kernels.weigh(scores, count, room.units.data() + r, in.softcap, weights, softmax);
    float* sums = room.sums.data() + r * room.width;
    const int64_t pairs = (count + 1) / 2;
    in.kernels.accumulate(room.values.data(), weights, pairs, room.width, softmax, sums);
  }
};

// Merges `chunks` softmaxes of the same `rows`, one behind the other.
void merge_chunks(
    const Softmaxes& parts, int64_t chunks, int64_t rows, int64_t dim, const Softmaxes& out) {
  for (int64_t r = 0; r < rows; ++r) {
    float peak = kNothing, total = 0.0f, *sums = out.sums + r * dim;
    std::fill(sums, sums + dim, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      peak = std::max(peak, parts.peaks[chunk * rows + r]);
    }
    for (int64_t chunk = 0; chunk < chunks && peak > kNothing; ++chunk) {
      const int64_t at = chunk * rows + r;
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

} // namespace

void attend_many(const AttendInputs& in, const Softmaxes& out, const Done& done) {
  const Split split(in, kCuts);
  const int64_t queries = in.queries, chunks = split.chunks;
  // A single chunk is written where it belongs.
  const int64_t kept = chunks == 1 ? 0 : split.units * chunks * queries;
  const Buffer<float> sums(kept * in.dim), peaks(kept), totals(kept);
  const Softmaxes parts = chunks == 1 ? out : Softmaxes{sums.data(), peaks.data(), totals.data()};
  const auto run = [&](const Job& job) {
    const int64_t unit = job.at / split.in_unit(), part = unit * chunks + job.at % chunks;
    const Softmaxes own = parts.from(part * queries + job.begin, in.dim);
    if (job.from < job.to) {
      const ManyRoom room(job.count, in);
      ManyRows{in, room, job}.run(own);
    } else {
      std::fill(own.sums, own.sums + job.count * in.dim, 0.0f);
      std::fill(own.peaks, own.peaks + job.count, kNothing);
      std::fill(own.totals, own.totals + job.count, 0.0f);
    }
  };
  run_jobs(in, split, run, [&](int64_t unit) {
    if (chunks > 1) {
      const Softmaxes own = parts.from(unit * chunks * queries, in.dim);
      merge_chunks(own, chunks, queries, in.dim, out.from(unit * queries, in.dim));
    }
    done(unit);
  });
}

} // namespace commvq
