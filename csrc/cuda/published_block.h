// One block of attention over the published preset's codes: up to 8 rows of queries of a unit over
// a split of its tokens.
//
// A warp decodes a token, a lane a pair of a panel; then a warp scores a row of queries, a lane one
// of 32 tokens that share a turn of the query. Some hundred tokens so get weights, in shared
// memory; then a thread owns a group of value codes and up to four rows, and adds the weights of
// all those tokens up by their codes, in their order. No value is ever decoded.
#pragma once

#include "cuda/attend_page.h"

namespace commvq::gpu {

constexpr int kPublishedWarps = kRows; // of a block: each scores a row of queries
constexpr int kPublishedSpan = 512;    // tokens whose weights are held at once
constexpr int kPanelPairs = 32;        // whose real parts lie together, then imaginary ones
constexpr int kRoundWords = 64;        // of a round
constexpr int kNormBytes = 2;          // that a token's row of codes begins with
constexpr int kQuad = 4;               // rows of queries that a thread adds weights for

static_assert(kTurnBlock == kWarp && kPanelPairs == kWarp);
static_assert(kPublishedSpan % kTurnBlock == 0 && kRows % kQuad == 0);

// Rows of codes of all heads; a row begins with its norm in half precision.
struct PublishedSide {
  const uint8_t* codes;
  int64_t batch_stride, token_stride;

  COMMVQ_HD const uint8_t* at(int64_t row, int64_t token) const {
    return codes + row * batch_stride + token * token_stride;
  }
  COMMVQ_HD static float norm(const uint8_t* row) { // at any byte
    return float_of_half_bits(row[0] | static_cast<uint32_t>(row[1]) << 8);
  }
};

struct PublishedArguments {
  AttendArguments a; // without its sides; its dim is the sums' width, 2 * groups
  int64_t head_dim, rounds, panels, groups;
  const int16_t* words; // [heads, rounds, 64, panels, 2, 32]
  PublishedSide keys, values;
  int64_t tiles; // of 8 rows of queries
};

struct PublishedShared {
  static constexpr int kKeyStride = 2 * kPanelPairs + 1; // so that 32 tokens hit 32 banks

  Carver carver;
  float* keys;    // [32, kKeyStride]: a panel of 32 tokens
  float* query;   // [8, 2 * 32]: the same panel of the rows
  float* weights; // [kPublishedSpan, 8]: scores, then weights times values' norms
  float* factors; // [8]: what a row's earlier sums shrink by

  COMMVQ_HD explicit PublishedShared(Carver start)
      : carver(start),
        keys(carver.take<float>(kTurnBlock * kKeyStride)),
        query(carver.take<float>(kRows * 2 * kPanelPairs)),
        weights(carver.take<float>(kPublishedSpan * kRows)),
        factors(carver.take<float>(kRows)) {}
};

struct PublishedBlock {
  static constexpr int kThreads = kPublishedWarps * kWarp;

  struct Registers {
    float score; // of row `warp` and token `lane`
    float peak;  // of row `warp`
    float total; // a lane's part of it
  };
  using All = PerThread<Registers, kThreads>;
  struct alignas(16) Weights {
    float row[kQuad];
  };

  const PublishedArguments& m;
  const AttendArguments& a;
  const PublishedShared& shared;
  int64_t unit, row, head, split, tile;
  int rows; // of queries that there are
  Span span;

  // Block `index` of units * tiles * splits.
  COMMVQ_HD static void run(const PublishedArguments& m, int64_t index, char* memory) {
    const AttendArguments& a = m.a;
    const PublishedShared shared({memory});
    const int64_t split = index % a.splits, tile = index / a.splits % m.tiles;
    const int64_t unit = index / a.splits / m.tiles, left = a.queries - tile * kRows;
    const PublishedBlock block = {
        m,
        a,
        shared,
        unit,
        unit / a.heads,
        unit % a.heads,
        split,
        tile,
        static_cast<int>(left < kRows ? left : kRows),
        span_of(a, unit, split)};
    block.run();
  }

 private:
  COMMVQ_HD void run() const {
    All registers;
    each_thread<kThreads>([&](int thread) {
      registers[thread].peak = -infinity();
      registers[thread].total = 0.0f;
    });
    const int64_t first = span.begin / kTurnBlock * kTurnBlock;
    for (int64_t start = first; start < span.end; start += kPublishedSpan) {
      const int64_t left = span.end - start;
      const int count = static_cast<int>(left < kPublishedSpan ? left : kPublishedSpan);
      for (int local = 0; local < count; local += kTurnBlock) {
        score_tokens(start + local, local, registers);
      }
      sync_block();
      each_warp<kPublishedWarps>([&](int warp) { soften(warp, start, count, registers); });
      sync_block();
      each_thread<kThreads>([&](int thread) { collect(thread, start, count, start == first); });
      sync_block();
    }
    each_warp<kPublishedWarps>([&](int warp) { keep_row(warp, registers); });
  }

  // Where the results of the tile's first row are, counted in rows.
  COMMVQ_HD int64_t place() const { return (unit * a.splits + split) * a.queries + tile * kRows; }

  COMMVQ_HD bool seen(int64_t token) const { return token >= span.begin && token < span.end; }

  // Scores of the 32 tokens from `start` on go to their place from `local` on.
  COMMVQ_HD void score_tokens(int64_t start, int local, All& registers) const {
    each_thread<kThreads>([&](int thread) { registers[thread].score = 0.0f; });
    for (int64_t panel = 0; panel < m.panels; ++panel) {
      each_thread<kThreads>([&](int thread) {
        const int lane = thread % kWarp;
        turn_query(thread / kWarp, panel, lane, start / kTurnBlock);
        for (int t = thread / kWarp; t < kTurnBlock; t += kPublishedWarps) {
          if (seen(start + t)) {
            decode(start + t, t, panel, lane);
          }
        }
      });
      sync_block();
      each_thread<kThreads>([&](int thread) {
        if (thread / kWarp < rows && seen(start + thread % kWarp)) {
          const float* key = shared.keys + thread % kWarp * PublishedShared::kKeyStride;
          const float* query = shared.query + thread / kWarp * (2 * kPanelPairs);
          float sum = 0.0f;
          COMMVQ_UNROLL
          for (int d = 0; d < 2 * kPanelPairs; ++d) {
            sum += key[d] * query[d];
          }
          registers[thread].score += sum;
        }
      });
      sync_block();
    }
    each_thread<kThreads>([&](int thread) {
      if (thread / kWarp >= rows) {
        return;
      }
      const int64_t token = start + thread % kWarp;
      float score = -infinity();
      if (seen(token)) {
        score = registers[thread].score * PublishedSide::norm(m.keys.at(row, token));
        score = a.softcap > 0.0f ? a.softcap * tanhf(score / a.softcap) : score;
      }
      shared.weights[(local + thread % kWarp) * kRows + thread / kWarp] = score;
    });
  }

  // One pair of a row of queries, turned back by the start of a block of 32 tokens.
  COMMVQ_HD void turn_query(int r, int64_t panel, int lane, int64_t block) const {
    const int64_t pair = panel * kPanelPairs + lane;
    float x = 0.0f, y = 0.0f;
    if (r < rows && 2 * pair < m.head_dim) {
      const float* own = a.query + (unit * a.queries + tile * kRows + r) * m.head_dim + 2 * pair;
      x = own[0];
      y = own[1];
    }
    if (pair < a.pairs) {
      const int64_t turn_row = a.turn_rows == 1 ? 0 : row;
      const float* turn = a.turns + (turn_row * a.turn_blocks + block) * 2 * a.pairs + pair;
      const float cosine = turn[0], sine = turn[a.pairs], turned = x * cosine + y * sine;
      y = y * cosine - x * sine;
      x = turned;
    }
    float* to = shared.query + r * (2 * kPanelPairs) + lane;
    to[0] = x;
    to[kPanelPairs] = y;
  }

  // One pair of a token's key, without its norm, turned by its place t in the block of 32.
  COMMVQ_HD void decode(int64_t token, int t, int64_t panel, int lane) const {
    const int64_t width = m.panels * 2 * kPanelPairs, first = head * m.rounds;
    const uint8_t* codes = m.keys.at(row, token) + kNormBytes;
    const int16_t* words = m.words + first * kRoundWords * width + panel * (2 * kPanelPairs) + lane;
    int re = 0, im = 0;
    COMMVQ_UNROLL_SOME
    for (int64_t round = 0; round < m.rounds; ++round) {
      // A round's two codes of 6 bits begin at a byte or in its middle: they are in two bytes.
      const int64_t bit = (first + round) * 12;
      const int both = (codes[bit / 8] | codes[bit / 8 + 1] << 8) >> bit % 8;
      const int16_t *one = words + (both & 63) * width, *other = words + (both >> 6 & 63) * width;
      re += one[0] - other[kPanelPairs];
      im += one[kPanelPairs] + other[0];
      words += kRoundWords * width;
    }
    float x = static_cast<float>(re), y = static_cast<float>(im);
    const int64_t pair = panel * kPanelPairs + lane;
    if (pair < a.pairs) {
      const float* step = a.steps + t * 2 * a.pairs + pair;
      const float cosine = step[0], sine = step[a.pairs], turned = x * cosine - y * sine;
      y = y * cosine + x * sine;
      x = turned;
    }
    float* to = shared.keys + t * PublishedShared::kKeyStride + lane;
    to[0] = x;
    to[kPanelPairs] = y;
  }

  // Turns the scores of `count` tokens from `start` on into weights of row `warp`.
  COMMVQ_HD void soften(int warp, int64_t start, int count, All& registers) const {
    if (warp >= rows) {
      return;
    }
    PerThread<Shared, kThreads> most;
    each_lane(warp, [&](int thread) {
      most[thread] = {-infinity()};
      for (int local = thread % kWarp; local < count; local += kWarp) {
        most[thread].value = larger(shared.weights[local * kRows + warp], most[thread].value);
      }
    });
    warp_join<31>(
        warp,
        [&](int thread) -> Shared& { return most[thread]; },
        [](Shared x, Shared y) -> Shared { return {larger(x.value, y.value)}; });
    each_lane(warp, [&](int thread) {
      Registers& own = registers[thread];
      const float old = own.peak;
      own.peak = larger(most[thread].value, old);
      const float factor = old == -infinity() ? 0.0f : expf(old - own.peak);
      own.total *= factor;
      if (thread % kWarp == 0) {
        shared.factors[warp] = factor;
      }
      for (int local = thread % kWarp; local < count; local += kWarp) {
        float& place = shared.weights[local * kRows + warp];
        float weight = 0.0f;
        if (place != -infinity()) {
          weight = expf(place - own.peak);
          own.total += weight;
          weight *= PublishedSide::norm(m.values.at(row, start + local));
        }
        place = weight;
      }
    });
  }

  // Adds the weights of tokens up by the value codes of this thread's groups.
  COMMVQ_HD void collect(int thread, int64_t start, int count, bool fresh) const {
    const int64_t quads = ceil_div(rows, kQuad);
    const int begin = span.begin > start ? static_cast<int>(span.begin - start) : 0;
    for (int64_t i = thread; i < m.groups * quads; i += kThreads) {
      const int64_t group = i % m.groups;
      const int quad = static_cast<int>(i / m.groups) * kQuad;
      const int shift = static_cast<int>(group % 4) * 2;
      const uint8_t* codes = m.values.at(row, start + begin) + kNormBytes + group / 4;
      float* to = a.sums + (place() + quad) * a.dim + 2 * group;
      float first[kQuad], second[kQuad];
      COMMVQ_UNROLL
      for (int r = 0; r < kQuad; ++r) {
        const bool known = !fresh && quad + r < rows;
        first[r] = known ? to[r * a.dim] * shared.factors[quad + r] : 0.0f;
        second[r] = known ? to[r * a.dim + 1] * shared.factors[quad + r] : 0.0f;
      }
      COMMVQ_UNROLL_SOME
      for (int local = begin; local < count; ++local) {
        // Patterns 0 to 3 are (1, 0), (0, 1), (1, 1), (0, 0).
        const int code = *codes >> shift & 3;
        const bool one = (code & 1) == 0, two = ((code ^ code >> 1) & 1) != 0;
        const Weights weights =
            *reinterpret_cast<const Weights*>(shared.weights + local * kRows + quad);
        COMMVQ_UNROLL
        for (int r = 0; r < kQuad; ++r) {
          first[r] += one ? weights.row[r] : 0.0f;
          second[r] += two ? weights.row[r] : 0.0f;
        }
        codes += m.values.token_stride;
      }
      COMMVQ_UNROLL
      for (int r = 0; r < kQuad; ++r) {
        if (quad + r < rows) {
          to[r * a.dim] = first[r];
          to[r * a.dim + 1] = second[r];
        }
      }
    }
  }

  // A row that sees none of the split's tokens keeps -infinity and 0, and its sums are not read.
  COMMVQ_HD void keep_row(int warp, All& registers) const {
    if (warp >= rows) {
      return;
    }
    PerThread<Shared, kThreads> total;
    each_lane(warp, [&](int thread) { total[thread] = {registers[thread].total}; });
    warp_join<31>(
        warp,
        [&](int thread) -> Shared& { return total[thread]; },
        [](Shared x, Shared y) -> Shared { return {x.value + y.value}; });
    each_lane(warp, [&](int thread) {
      if (thread % kWarp == 0) {
        a.peaks[place() + warp] = registers[thread].peak;
        a.totals[place() + warp] = total[thread].value;
      }
    });
  }
};

} // namespace commvq::gpu
